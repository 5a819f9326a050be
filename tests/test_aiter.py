"""The aiter provider against a strict stand-in: versions, contracts, layouts, roundings."""

from __future__ import annotations

import sys
from typing import Any

import aiter_standin
import pytest
import torch
from aiter_standin import ContractError
from cases_rounding import unit
from helpers import capture, changed, rewritten, tensors
from kernel_cases import same_bits
from torch.nn import functional

import fxpass
from fxpass.kernels import aiter, aiter_api, by_name, reference
from fxpass.options import Options
from fxpass.select import candidates
from fxpass.spec import NormSpec

VERSIONS = tuple(aiter_api.VERSIONS)
NEWEST = "gemma_norm before the flag"
GFX942 = {"platform": "rocm:gfx942", "strict": True}
NAMED = Options(providers=("aiter",), **GFX942)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> aiter_standin.Standin:
    return aiter_standin.install(monkeypatch, NEWEST)


def llama(x, w):
    return w * unit(x).to(w.dtype)


def nn_norm(x, w):
    return functional.rms_norm(x, (x.shape[-1],), w, 1e-6)


def add_llama(x, r, w):
    total = x + r
    return llama(total, w), total


FORMS = {
    "W32": (nn_norm, ("f16[6,64]", "f16[64]"), "aiter.rms_norm"),
    "HF": (llama, ("f16[6,64]", "f16[64]"), "aiter.rms_norm_t5"),
    "residual HF": (add_llama, ("f16[6,64]", "f16[6,64]", "f16[64]"), "aiter.rms_norm_add"),
}


def _level(function, inputs, dynamic=None):
    with torch.no_grad():
        return capture(function, inputs, dynamic=dynamic).graphs("aten")[-1]


def _sites(function, inputs, options=NAMED):
    """The rewritten sites, after a run of the rewritten graph with the graph's own results."""
    level = _level(function, inputs)
    _, report = rewritten(level, options)
    assert not changed(level, options)
    return report.rewritten


# ---- Versions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True], ids=["named", "wrapped"])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_version_gets_its_own_argument_order(form, version, hidden, monkeypatch) -> None:
    made = aiter_standin.install(monkeypatch, version, hidden=hidden)
    function, texts, kernel = FORMS[form]
    if form != "W32" and version == VERSIONS[0]:
        _, report = rewritten(_level(function, tensors(*texts)), NAMED)
        assert "no use_model_sensitive_rmsnorm" in report.declined[0].reason
        return
    (site,) = _sites(function, tensors(*texts))
    assert site.kernel == (kernel if made.order.row_stride else "aiter.rms_norm_ck")
    assert site.numerics == "same roundings, reduction order may differ"
    assert [call.model_sensitive for call in made.calls] == [int(form != "W32")]


# ---- What reaches it ----------------------------------------------------------------------------

SPEC = (
    "x=f16 row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,mul_weight:f32,cast:f16"
    " weight=f16"
)
HF = SPEC.replace("mul_weight:f32,cast:f16", "cast:f16,mul_weight:f16")
ADD = HF.replace("x=f16", "x=f16 residual=f16 sum=f16") + " outputs=out,sum"
REFUSED = {
    "f32": ("rms_norm", SPEC.replace("f16", "f32"), 64, "x is f32, needs bf16 or f16"),
    "weight f32": ("rms_norm", SPEC.replace("weight=f16", "weight=f32"), 64, "weight is other"),
    "no weight": ("rms_norm", SPEC.replace(" weight=f16", ""), 64, "weight is none"),
    "long": ("rms_norm", SPEC, 8200, "hidden 8200 > 8192"),
    "odd": ("rms_norm", SPEC, 65, "hidden 65 is not a multiple of 8"),
    "dynamic": ("rms_norm", SPEC, None, "hidden is known only at run time"),
    "order": ("rms_norm", HF, 64, "rounding cast_then_scale, needs scale_then_cast"),
    "order T5": ("rms_norm_t5", SPEC, 64, "rounding scale_then_cast, needs cast_then_scale"),
    "add W32": ("rms_norm_add", ADD.replace(HF[HF.index("el") :], SPEC[SPEC.index("el") :]), 64,
                "rounding scale_then_cast, needs cast_then_scale"),
    "add": ("rms_norm", SPEC.replace("x=f16", "x=f16 residual=f16 sum=f16"), 64, "no residual"),
    "sum f32": ("rms_norm_add", ADD.replace("sum=f16", "sum=f32"), 64, "sum is f32, needs"),
    "row": ("rms_norm", SPEC + " outputs=out,row", 64, "cannot return row"),
    "gemma": ("rms_norm", SPEC + " offset=1.0:f32", 64, "no weight offset (1.0)"),
    "weight first": ("rms_norm", SPEC.replace("mul_row:f32,mul_weight", "mul_weight:f32,mul_row"),
                     64, "element program mul_weight:f32 mul_row:f32 cast:f16, needs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    kernel, text, hidden, reason = REFUSED[name]
    found = by_name(f"aiter.{kernel}").refusal(NormSpec.parse(text), "rocm", hidden)
    assert reason in str(found)


@pytest.mark.parametrize("text", [SPEC, SPEC.replace(",add_eps:f32", ""), HF, ADD])
def test_a_launch_is_the_reference(text: str, standin) -> None:
    spec = NormSpec.parse(text)
    given = tensors("f16[5,64]", "f16[5,64]" if spec.residual else None, "f16[64]", None, 1e-6)
    kernel = (
        aiter.ADD if spec.residual else aiter.PLAIN if spec.rounding.value[0] == "s" else aiter.T5
    )
    assert kernel.refusal(spec, "rocm", 64) is None
    for rows in (5, 1, 0):
        cut = [t[:rows] if isinstance(t, torch.Tensor) and t.dim() == 2 else t for t in given]
        made = kernel.launch(spec, *cut)
        wanted = reference.launch(spec, *cut)
        assert all(map(same_bits, made, wanted))
    assert len(standin.calls) == 2  # zero rows never reach it


@pytest.mark.parametrize("text", [SPEC, ADD])
def test_memory_of_the_host_never_reaches_a_gpu(text: str, standin, monkeypatch) -> None:
    """Where the platform is asked for by name, tensors may still be on the CPU: a memory fault."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    spec = NormSpec.parse(text)
    given = tensors("f16[5,64]", "f16[5,64]" if spec.residual else None, "f16[64]", None, 1e-6)
    with pytest.raises(RuntimeError, match="aiter: x is on the cpu, needs a GPU"):
        aiter.launch(spec, *given)
    assert not standin.calls


def test_weights_of_several_rows_go_elsewhere(standin) -> None:
    def per_head(x, w):
        return w * unit(x).to(w.dtype)

    level = _level(per_head, tensors("f16[8,4,64]", "f16[4,64]"))
    _, report = rewritten(level, NAMED)
    assert not report.rewritten
    if report.declined:
        assert "weight has several rows" in report.declined[0].reason


def test_a_weight_cast_by_the_model_stays_cast(standin) -> None:
    level = _level(lambda x, w: nn_norm(x, w.half()), tensors("f16[6,64]", "f32[64]"))
    made, report = rewritten(level, NAMED)
    assert [site.kernel for site in report.rewritten] == ["aiter.rms_norm"]
    assert sum("convert_element_type" in str(node.target) for node in made.graph.nodes) == 1
    assert not changed(level, NAMED)
    assert len(standin.calls) == 1


@pytest.mark.parametrize(("x", "w"), [("f16", "f32"), ("bf16", "f32"), ("bf16", "f16")])
def test_a_weight_is_never_cast_for_it(x, w) -> None:
    """No dtype fits into x's 16 bits without a loss."""
    (x, w) = tensors(f"{x}[6,64]", f"{w}[64]")
    function = lambda x, w: (unit(x) * w.float()).to(x.dtype)  # noqa: E731
    _, report = rewritten(_level(function, (x, w)), NAMED)
    (declined,) = report.declined
    assert "refused aiter.rms_norm: weight is other, needs same" in declined.reason


@pytest.mark.parametrize(
    ("providers", "kernel"),
    [("auto", "triton.row"), ("aiter,auto", "aiter.rms_norm"), ("triton", "triton.row")],
)
def test_the_environment_turns_it_on_and_off(providers, kernel, monkeypatch) -> None:
    monkeypatch.setenv("FXPASS_PROVIDERS", providers)
    level = _level(nn_norm, tensors("bf16[6,64]", "bf16[64]"))
    _, report = rewritten(level, Options.make(**GFX942))
    assert [site.kernel for site in report.rewritten] == [kernel]


@pytest.mark.parametrize("dims", [(64,), (4, 16)])
def test_a_weight_over_several_dims_is_one_row(dims, standin) -> None:
    x, w = tensors("f16[3,4,16]" if len(dims) > 1 else "f16[3,64]", f"f16{list(dims)}")
    (site,) = _sites(lambda x, w: functional.rms_norm(x, dims, w, 1e-6), (x, w))
    assert site.kernel == "aiter.rms_norm"


def test_compiled_code_never_traces_into_it(standin) -> None:
    x, w = tensors("f16[2,3,64]", "f16[64]")
    compiled = torch.compile(
        llama, backend=lambda g, i: fxpass.rmsnorm_backend(g, i, options=NAMED)
    )
    with torch.no_grad():
        assert same_bits(compiled(x, w), llama(x, w))
    assert [call.shape for call in standin.calls] == [(6, 64)]


# ---- The stand-in itself ------------------------------------------------------------------------

WRONG = {
    "3-D": lambda x, w: (x.view(2, 3, 64), w, 1e-6, 0),
    "last stride": lambda x, w: (x.t().contiguous().t(), w, 1e-6, 0),
    "row stride under the flag": lambda x, w: (x[:, :32], w[:32], 1e-6, 1),
    "one row for all": lambda x, w: (x[:1].expand(6, 64), w, 1e-6, 0),
    "empty": lambda x, w: (x[:0], w, 1e-6, 0),
    "float32": lambda x, w: (x.float(), w.float(), 1e-6, 0),
    "weight dtype": lambda x, w: (x, w.float(), 1e-6, 0),
    "weight gaps": lambda x, w: (x[:, :32], torch.stack([w, w], -1)[:32, 0], 1e-6, 0),
    "eps a tensor": lambda x, w: (x, w, torch.tensor(1e-6), 0),
    "order": lambda x, w: (x, w, 1e-6, False),
    "count": lambda x, w: (x, w, 1e-6),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_stand_in_takes_nothing_else(name: str, standin) -> None:
    function: Any = sys.modules["aiter"].rmsnorm2d_fwd
    with pytest.raises((ContractError, TypeError)):
        function(*WRONG[name](*tensors("f16[6,64]", "f16[64]")))


def test_the_stand_in_refuses_shared_memory(standin) -> None:
    function: Any = sys.modules["aiter"].rmsnorm2d_fwd_with_add
    x, r, w, out = tensors("f16[6,64]", "f16[6,64]", "f16[64]", "f16[6,64]")
    with pytest.raises(ContractError, match="shares memory"):
        function(out, x, r, r, w, 1e-6, False, 1)


# ---- bf16 is truncated --------------------------------------------------------------------------


def test_truncated_bf16_only_by_name(monkeypatch) -> None:
    aiter_standin.install(monkeypatch, NEWEST, truncates=True)
    level = _level(nn_norm, tensors("bf16[64,64]", "bf16[64]"))
    _, report = rewritten(level, Options(**GFX942))
    (site,) = report.rewritten
    assert site.kernel == "triton.row"
    assert (
        "refused aiter.rms_norm: bf16 may be truncated, not rounded to nearest on gfx942;"
        " name aiter in options.providers to have it all the same" in site.refusals
    )
    _, report = rewritten(level, NAMED)
    (site,) = report.rewritten
    assert site.numerics == "bf16 may be truncated, not rounded to nearest on gfx942"
    assert changed(level, NAMED)


@pytest.mark.parametrize(
    ("version", "arch", "kernel"),
    [
        (NEWEST, "gfx950", "aiter.rms_norm"),
        (NEWEST, "gfx942", "triton.row"),
        (VERSIONS[1], "gfx950", "triton.row"),
    ],
)
def test_bf16_is_rounded_where_the_hardware_does_it(version, arch, kernel, monkeypatch) -> None:
    aiter_standin.install(monkeypatch, version)
    level = _level(nn_norm, tensors("bf16[6,64]", "bf16[64]"))
    _, report = rewritten(level, Options(platform=f"rocm:{arch}", strict=True))
    assert [site.kernel for site in report.rewritten] == [kernel]


def test_order_of_kernels_on_gfx942() -> None:
    """aiter where it is legal and exact, then Triton; the rest is not for that platform."""
    inputs = tensors("f16[6,64]", "f16[64]")
    report = fxpass.explain(nn_norm, *inputs, options=Options(platform="rocm:gfx942"))
    assert [site.kernel for site in report.rewritten] == ["aiter.rms_norm"]
    names = [kernel.name for kernel in candidates(Options(), "rocm")]
    legal = [name for name in names if "rocm" in by_name(name).contract.platforms]
    assert legal == [kernel.name for kernel in aiter.KERNELS] + ["triton.row"]
