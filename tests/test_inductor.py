"""Inductor's own code for a norm: the roundings of the spec stay, and its neighbours fuse."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases_rounding import unit
from helpers import NEEDS_ROUNDINGS, tensors
from kernel_cases import ROW_STEPS_16BIT, SPECS, Inputs, inputs
from torch._inductor.utils import run_and_get_code

import fxpass
from fxpass import lowering, ops
from fxpass.kernels import by_name, reference
from fxpass.spec import NormSpec, is_narrow

KERNEL = by_name("inductor.fused")
pytestmark = NEEDS_ROUNDINGS
OPTIONS = {"providers": ("inductor",), "strict": True}


@pytest.fixture(autouse=True)
def clean():
    torch._dynamo.reset()
    fxpass.reset_report()
    lowering.register()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch.no_grad(),
    ):
        yield


def _norm(spec: NormSpec, given: Inputs):
    """The operator of a rewritten graph."""
    tensors = (given.x, given.residual, given.weight, given.bias)
    made = ops.op_for(spec.outputs)(*tensors, None, given.eps, KERNEL.name, str(spec))
    return made if isinstance(made, tuple) else (made,)


def _compiled(pairs: list[tuple[NormSpec, Inputs]]) -> list[dict[str, torch.Tensor]]:
    """All norms in one graph, so that there is one build."""
    wanted = [(ops.op_for(spec.outputs), given.eps, str(spec)) for spec, given in pairs]

    def every(tensors):
        return [
            op(*of_norm, None, eps, KERNEL.name, spec)
            for of_norm, (op, eps, spec) in zip(tensors, wanted, strict=True)
        ]

    tensors = [(given.x, given.residual, given.weight, given.bias) for _, given in pairs]
    made, code = run_and_get_code(torch.compile(every, fullgraph=True), tensors)
    assert not any("fxpass" in text for text in code)
    return [
        dict(zip(spec.outputs, out if isinstance(out, tuple) else (out,), strict=True))
        for (spec, _), out in zip(pairs, made, strict=True)
    ]


def _equal_share(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert found.stride() == wanted.stride()
    return (found == wanted).float().mean().item()


ACCEPTED = {
    name: NormSpec.parse(text)
    for name, text in SPECS.items()
    if KERNEL.refusal(NormSpec.parse(text), "cpu", 64) is None
}


def test_what_is_refused() -> None:
    assert set(SPECS) - set(ACCEPTED) == {"mixed_16bit"}
    mixed = KERNEL.refusal(NormSpec.parse(SPECS["mixed_16bit"]), "cpu", 64)
    assert "bf16 and f16 in one kernel" in str(mixed)
    spec = SPECS["each_step"].replace("sqrt:bf16", "rsqrt:bf16").replace("div_row", "mul_row")
    assert "16-bit rsqrt" in str(KERNEL.refusal(NormSpec.parse(spec), "cpu", 64))
    assert "platform rocm" in str(KERNEL.refusal(NormSpec.parse(SPECS["llama"]), "rocm", 64))


@pytest.mark.parametrize("shape", [(48, 257), (2, 8, 4, 128)])
def test_every_rounding_is_kept(shape: tuple[int, ...]) -> None:
    pairs = [(spec, inputs(spec, *shape)) for spec in ACCEPTED.values()]
    for name, (spec, given), found in zip(ACCEPTED, pairs, _compiled(pairs), strict=True):
        wanted = given.run(reference.KERNEL, spec)
        if "sum" in found:
            assert _equal_share(found["sum"], wanted["sum"]) == 1
        share = _equal_share(found["out"], wanted["out"])
        if not is_narrow(spec.out):
            torch.testing.assert_close(found["out"], wanted["out"], rtol=1e-6, atol=1e-6)
        elif name in ROW_STEPS_16BIT:
            assert share >= 0.95, name  # a flip of the row value moves its row
        else:
            assert share >= 0.999, name


def test_another_order_of_roundings_is_another_result() -> None:
    # The control: the test above would see a rounding left out.
    spec = NormSpec.parse(SPECS["llama"])
    other = NormSpec.parse(SPECS["nn_rms_norm"])
    given = inputs(spec, 48, 257)
    (found,) = _compiled([(other, given)])
    assert _equal_share(found["out"], given.run(reference.KERNEL, spec)["out"]) < 0.9


def test_per_head_weights_and_strided_heads() -> None:
    spec = NormSpec.parse(SPECS["llama"])
    heads = inputs(spec, 6, 4, 48, weight_rows=4)
    sliced = inputs(spec, 6, 12, 48).map_rows(lambda t: t[:, 4:8])
    for given, found in zip(
        (heads, sliced), _compiled([(spec, heads), (spec, sliced)]), strict=True
    ):
        wanted = given.run(reference.KERNEL, spec)["out"]
        assert _equal_share(found["out"], wanted.contiguous()) >= 0.999


# ---- What is around a norm ----------------------------------------------------------------------


def llama(x, w):
    return w * unit(x).to(w.dtype)


def gated(x, w, gate):
    return llama(x, w) * torch.nn.functional.silu(gate)


def rotary(q, w, cos, sin):
    q = llama(q, w)
    half = q.shape[-1] // 2
    turned = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
    return q * cos + turned * sin


FUSED = {
    "gate": (gated, ("bf16[32,128]", "bf16[128]", "bf16[32,128]")),
    "rope": (rotary, ("bf16[16,4,64]", "bf16[64]", "bf16[16,1,64]", "bf16[16,1,64]")),
    "producer": (
        lambda x, w, y: llama(x * torch.tanh(y), w),
        ("bf16[32,128]", "bf16[128]", "bf16[32,128]"),
    ),
}


def biased(x, w, a, b):
    return (unit(x) * w.float() + (a * b).float()).to(x.dtype)


COMPUTED = {
    "weight": (lambda x, a, b: llama(x, a * b), ("bf16[32,128]", "bf16[128]", "bf16[128]")),
    "bias": (biased, ("bf16[32,128]", "bf16[128]", "bf16[128]", "bf16[128]")),
}


@pytest.mark.parametrize("name", FUSED)
def test_neighbours_are_fused_and_roundings_kept(name: str) -> None:
    function, texts = FUSED[name]
    given = tensors(*texts)
    options = {**OPTIONS, "expect": 1, "numerics": "eager"}
    compiled = torch.compile(function, backend=fxpass.rmsnorm_backend, options=options)
    found, (code, *_) = run_and_get_code(compiled, *given)
    assert code.count("async_compile.cpp_pybinding(") == 1
    assert "fxpass" not in code
    assert _equal_share(found, function(*given)) >= 0.999


@pytest.mark.parametrize("name", COMPUTED)
def test_a_weight_that_is_computed_is_rounded_before_it_is_used(name: str) -> None:
    function, texts = COMPUTED[name]
    given = tensors(*texts)
    options = {**OPTIONS, "expect": 1}
    compiled = torch.compile(function, backend=fxpass.rmsnorm_backend, options=options)
    assert _equal_share(compiled(*given), function(*given)) >= 0.999


def test_a_symbolic_number_of_heads() -> None:
    options = {**OPTIONS, "expect": 1}
    compiled = torch.compile(llama, backend=fxpass.rmsnorm_backend, options=options)
    for heads in (4, 7):
        x, w = tensors(f"bf16[5,{heads},64]", f"bf16[{heads},64]")
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(w, 0)
        with torch._dynamo.config.patch(error_on_recompile=heads != 4):
            assert _equal_share(compiled(x, w), llama(x, w)) >= 0.999


def test_a_symbolic_number_of_rows() -> None:
    compiled = torch.compile(llama, backend=fxpass.rmsnorm_backend, options=OPTIONS)
    w = tensors("bf16[64]")[0]
    for rows in (5, 17):
        (x,) = tensors(f"bf16[{rows},64]")
        torch._dynamo.mark_dynamic(x, 0)
        with torch._dynamo.config.patch(error_on_recompile=rows != 5):
            assert _equal_share(compiled(x, w), llama(x, w)) >= 0.999


def test_outside_a_compiler_it_is_the_reference() -> None:
    spec = NormSpec.parse(SPECS["residual"])
    given = inputs(spec, 5, 64)
    for found, wanted in zip(
        _norm(spec, given), given.run(reference.KERNEL, spec).values(), strict=True
    ):
        assert torch.equal(found, wanted)


LOAD = """
import sys, torch
model = torch._inductor.aoti_load_package(sys.argv[1])
x, wanted = torch.load(sys.argv[2])
assert (model(x) == wanted).float().mean() >= 0.999
assert "fxpass" not in sys.modules
"""


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(64).bfloat16())

    def forward(self, x):
        return llama(x, self.weight)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")
def test_a_package_built_ahead_of_time_runs_without_fxpass(tmp_path) -> None:
    model, (x,) = Block(), tensors("bf16[8,64]")
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
    package, data = tmp_path / "model.pt2", tmp_path / "data.pt"
    with fxpass.install(strict=True) as installed:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
    (site,) = installed.report.rewritten
    assert site.kernel == "inductor.fused"
    assert any("must run without fxpass" in reason for reason in site.refusals)
    torch.save((x, model(x)), data)
    command = [sys.executable, "-c", LOAD, package, data]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
