"""Entry points end to end, through Inductor: as few compiles as the questions allow."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from cases_rounding import unit
from helpers import NEEDS_ROUNDINGS, tensor, tensors
from torch._inductor.utils import run_and_get_code

import fxpass
from fxpass import matching

RMS = {"providers": ("reference",), "strict": True}
CONFIG = torch._inductor.config


def llama(x, w):
    return w * unit(x).to(w.dtype)


def block(x, r, w):
    h = x + r
    return llama(h, w), h


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    fxpass.reset_report()
    with (
        CONFIG.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    assert CONFIG.post_grad_custom_pre_pass is None


def _compiled(function, **options):
    given = {**RMS, **options}
    return torch.compile(function, backend=fxpass.rmsnorm_backend, options=given, fullgraph=True)


X, W = tensors("bf16[4,64]", "bf16[64]")


def _rewritten() -> int:
    return len(fxpass.last_report().rewritten)


# --- the backend -------------------------------------------------------------------------------


def test_backend_by_name_and_by_function() -> None:
    with torch.no_grad():
        named = torch.compile(llama, backend="rmsnorm", options=RMS)(X, W)
        assert _rewritten() == 1
        torch._dynamo.reset()
        direct = _compiled(llama)(X, W)
    assert _rewritten() == 2
    assert torch.equal(named, llama(X, W))
    assert torch.equal(direct, named)


def test_inductor_options_pass_through() -> None:
    with torch.no_grad():
        found = _compiled(llama, **{"triton.cudagraphs": False, "max_fusion_size": 8})(X, W)
    assert torch.equal(found, llama(X, W))


def test_unknown_option_is_one_line_with_the_nearest_name() -> None:
    with pytest.raises(Exception, match=r"option 'providerz' is unknown; did you mean 'providers'"):
        torch.compile(llama, backend=fxpass.rmsnorm_backend, options={"providerz": 1})(X, W)


def test_batch_is_never_specialised() -> None:
    with torch.no_grad():
        compiled = _compiled(block)
        x = tensor("bf16[5,64]")
        torch._dynamo.mark_dynamic(x, 0)
        r = x.sin()
        torch._dynamo.mark_dynamic(r, 0)
        compiled(x, r, W)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for rows in (2, 3, 17, 64):
                x, r = tensors(f"bf16[{rows},64]", f"bf16[{rows},64]")
                for found, wanted in zip(compiled(x, r, W), block(x, r, W), strict=True):
                    assert torch.equal(found, wanted)
    assert _rewritten() == 1


def test_graph_breaks_are_followed() -> None:
    def broken(x, w):
        y = llama(x, w)
        torch._dynamo.graph_break()
        return llama(y, w)

    with torch.no_grad():
        compiled = torch.compile(broken, backend=fxpass.rmsnorm_backend, options=RMS)
        assert torch.equal(compiled(X, W), broken(X, W))
    assert _rewritten() == 2


def test_training_gradients() -> None:
    inputs = tensors("!f32[4,64]", "!f32[4,64]", "!f32[64]")

    def loss(function):
        out, total = function(*inputs)
        return torch.autograd.grad((out.square() + total.sin()).sum(), inputs)

    wanted = loss(block)
    found = loss(_compiled(block))
    assert _rewritten() == 1
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)  # sums in another order


def test_expect_raises_with_the_reason() -> None:
    def wrong(x, w):
        return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6) * w

    with (
        torch.no_grad(),
        pytest.raises(Exception, match=r"expected 1 rewritten norms, found 0.*dim"),
    ):
        _compiled(wrong, expect=1)(X.float(), W.float())


def test_fuel_stops_after_the_first_sites() -> None:
    def two(x, w):
        return llama(llama(x, w), w)

    with torch.no_grad():
        found = _compiled(two, fuel=1)(X, W)
    assert _rewritten() == 1
    torch.testing.assert_close(found, two(X, W), rtol=2e-2, atol=2e-2)  # Inductor's own rounding


# --- a bug in the pass -------------------------------------------------------------------------


def _break(monkeypatch) -> None:
    def fail(graph):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(matching, "find", fail)


def test_a_bug_leaves_the_model_running_and_warns(monkeypatch) -> None:
    _break(monkeypatch)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = _compiled(llama, strict=False)(X, W)
    ours = [w for w in caught if "fxpass" in str(w.message)]
    assert len(ours) == 1
    assert "planted" in str(ours[0].message)
    torch.testing.assert_close(found, llama(X, W), rtol=2e-2, atol=2e-2)  # Inductor's own rounding
    assert fxpass.last_report().errors == ["ZeroDivisionError: planted"]


def test_a_bug_raises_when_strict(monkeypatch) -> None:
    _break(monkeypatch)
    with torch.no_grad(), pytest.raises(Exception, match="planted"):
        _compiled(llama)(X, W)


# --- the pass alone ----------------------------------------------------------------------------


class Counting:
    """A user's own pass."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph) -> None:
        self.calls += 1

    def uuid(self):
        return "counting"


def test_pass_in_the_hook() -> None:
    ours = fxpass.RMSNormPass(**RMS)
    with torch.no_grad(), CONFIG.patch(post_grad_custom_pre_pass=ours):
        assert torch.equal(torch.compile(llama)(X, W), llama(X, W))
    assert len(ours.report.rewritten) == 1


def test_backend_keeps_the_users_pass() -> None:
    users = Counting()
    with torch.no_grad(), CONFIG.patch(post_grad_custom_pre_pass=users):
        assert torch.equal(_compiled(llama)(X, W), llama(X, W))
    assert users.calls == 1
    assert _rewritten() == 1


def test_backend_keeps_a_pass_given_as_an_option() -> None:
    users = Counting()
    with torch.no_grad():
        _compiled(llama, post_grad_custom_pre_pass=users)(X, W)
    assert users.calls == 1
    assert _rewritten() == 1


def test_install_keeps_the_users_pass_and_restores_it() -> None:
    users = Counting()
    with torch.no_grad(), CONFIG.patch(post_grad_custom_pre_pass=users):
        with fxpass.install(**RMS) as installed:
            torch.compile(llama)(X, W)
        assert users.calls == 1
        assert len(installed.report.rewritten) == 1
        assert CONFIG.post_grad_custom_pre_pass is users


def test_install_as_a_call() -> None:
    installed = fxpass.install(RMS)
    try:
        with torch.no_grad():
            assert torch.equal(torch.compile(llama)(X, W), llama(X, W))
        assert len(installed.report.rewritten) == 1
    finally:
        installed.uninstall()
    installed.uninstall()  # twice does no harm


def test_uuid_follows_options_and_kernels() -> None:
    plain = fxpass.RMSNormPass()
    assert plain.uuid() == fxpass.RMSNormPass().uuid()
    others = [fxpass.RMSNormPass(fuel=1), fxpass.RMSNormPass(providers="reference")]
    assert len({plain.uuid(), *(other.uuid() for other in others)}) == 3


def test_pass_survives_pickling() -> None:
    import pickle

    ours = fxpass.RMSNormPass(fuel=3)
    copy = pickle.loads(pickle.dumps(ours))
    assert copy.options == ours.options
    assert copy.uuid() == ours.uuid()


# --- threads and caches ------------------------------------------------------------------------


def test_threads_compile_at_once() -> None:
    def of_width(width):
        x, w = tensors(f"bf16[3,{width}]", f"bf16[{width}]")
        with torch.no_grad():
            return torch.equal(_compiled(lambda x, w: llama(x, w))(x, w), llama(x, w))

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert all(pool.map(of_width, (32, 48, 80)))
    assert _rewritten() == 3


SCRIPT = """
    import torch, fxpass
    from torch._dynamo.utils import counters
    def norm(x, w):
        h = x.float()
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
    torch.manual_seed(0)
    x, w = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    options = {"providers": ("reference",), "expect": 1, "fuel": FUEL}
    with torch.no_grad():
        found = torch.compile(norm, backend="rmsnorm", options=options)(x, w)
    assert torch.equal(found, norm(x, w))
    inductor, aot = counters["inductor"], counters["aot_autograd"]
    hits = inductor["fxgraph_cache_hit"] + aot["autograd_cache_hit"]
    print(hits > 0, len(fxpass.last_report().rewritten))
"""


def test_caches_cold_warm_and_with_other_options(tmp_path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONSAFEPATH": "1"}
    seen = []
    same = '1, "emulate_precision_casts": False'  # its default: the code in the cache fits
    for fuel in ("1", "1", same, "2"):
        script = textwrap.dedent(SCRIPT).replace("FUEL", fuel)
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        seen.append(done.stdout.split())
    assert seen == [["False", "1"], ["True", "1"], ["True", "1"], ["False", "1"]]


def test_expect_holds_where_another_graph_left_the_code_in_the_cache() -> None:
    def spelled_otherwise(x, w):
        h = x.to(torch.float32)
        h = h * torch.rsqrt(torch.pow(h, 2).mean(-1, keepdim=True) + 1e-6)
        return w * h.to(w.dtype)

    fresh = torch._inductor.utils.fresh_cache
    with torch.no_grad(), fresh(), CONFIG.patch(fx_graph_cache=True):
        _compiled(llama, expect=1)(X, W)
        _compiled(spelled_otherwise, expect=1)(X, W)  # the same ATen graph: a hit
    assert _rewritten() == 2


def test_passes_leave_the_hook_in_any_order() -> None:
    first, second, third = fxpass.install(), fxpass.install(), fxpass.install()
    for installed in (second, first, third):
        installed.uninstall()
    assert CONFIG.post_grad_custom_pre_pass is None


def test_training_a_norm_of_transposed_heads() -> None:
    def heads(x, w):
        return llama(x.view(2, 4, 2, 32).transpose(1, 2), w)

    x, w = tensors("!bf16[2,4,64]", "!bf16[32]")
    out = _compiled(heads, expect=1)(x, w)
    assert torch.equal(out, heads(x, w))
    assert out.stride() == heads(x, w).stride()
    found = torch.autograd.grad(out.float().square().sum(), (x, w))
    wanted = torch.autograd.grad(heads(x, w).float().square().sum(), (x, w))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)  # Inductor's own bf16 roundings


def test_a_hook_does_not_take_expect() -> None:
    with pytest.raises(fxpass.OptionsError, match="expect is for the backend"):
        fxpass.install(expect=1)


def test_numerics_is_refused_where_the_rest_of_the_graph_is_out_of_reach() -> None:
    with pytest.raises(fxpass.OptionsError, match="numerics='eager' is for the backend; a hook"):
        fxpass.install(numerics="eager")
    with pytest.raises(fxpass.OptionsError, match="a hook"):
        fxpass.RMSNormPass({"numerics": "eager"})
    with pytest.raises(fxpass.OptionsError, match="rewrite"):
        fxpass.rewrite(torch.fx.symbolic_trace(torch.nn.Identity()), numerics="eager")


@NEEDS_ROUNDINGS
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed")  # Inductor's, on a CPU
def test_a_value_cast_to_both_16_bit_types_keeps_both_roundings() -> None:
    def function(x, w):
        return w * unit(x).half().bfloat16()  # Inductor's default drops .half(): 5 % differ

    given = tensors("bf16[32,128]", "bf16[128]")
    options = {"providers": ("reference",), "expect": 1, "numerics": "eager"}
    compiled = torch.compile(function, backend=fxpass.rmsnorm_backend, options=options)
    assert torch.equal(compiled(*given), function(*given))


def test_an_eps_that_dynamic_shapes_make_a_tensor_is_read_without_the_dispatcher() -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(64).bfloat16())
            self.eps = 1e-5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
            return self.weight * h.to(x.dtype)

    model, x = Norm(), torch.randn(5, 64).bfloat16()
    options = {"strict": True, "expect": 1}
    with torch.no_grad():
        compiled = torch.compile(
            model, dynamic=True, backend=fxpass.rmsnorm_backend, options=options
        )
        found, (code,) = run_and_get_code(compiled, x)
        assert torch.equal(found, model(x))
        model.eps = 0.5  # a value of the graph, not a constant of the code
        assert torch.equal(compiled(x), model(x))
    (call,) = [line for line in code.splitlines() if "cpu.row" in line]
    assert "extern_kernels.fxpass" in call
    assert ".item())" in call


def test_rows_without_elements_under_dynamic_shapes() -> None:
    def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-2:], w)

    compiled = torch.compile(norm, dynamic=True, backend=fxpass.rmsnorm_backend)
    assert compiled(torch.randn(2, 0, 7), torch.randn(0, 7)).shape == (2, 0, 7)
