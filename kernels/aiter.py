"""AMD's aiter kernels, each code path with a contract of its own.

    aiter.rms_norm      one HIP kernel: multiplies by the weight in float32, then rounds once
    aiter.rms_norm_ck   what it was in old versions, which read rows without gaps only
    aiter.rms_norm_t5   the model-sensitive flag: Hugging Face's order, in another kernel
    aiter.rms_norm_add  the same with a residual add that rounds the sum first

Without the flag the residual kernel normalises the sum before it is rounded, which no spec means,
so it is never used. Which kernel a call reaches depends on rank, dtype, hidden and flag; the
contracts only let through what is certain to reach the one they describe.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fxpass.dtypes import short
from fxpass.kernels import aiter_api, steps
from fxpass.kernels.contract import Contract, Hidden, Kernel, Layout, Outputs
from fxpass.spec import Inverse, NormSpec, Rounding

_PLAIN = Contract(
    platforms=("rocm",),
    x=(torch.bfloat16, torch.float16),
    weight=("same",),
    # Loads are 16 bytes; above 8192 a call takes another path.
    hidden=Hidden(8, 8192, multiple=8),
    layout=Layout(rows="strided_2d", rank=2),
    rounding=(Rounding.SCALE_THEN_CAST,),
    inverse=(Inverse.RSQRT,),
    programs="rms",
    accumulate=torch.float32,
    residual=False,
    residual_rounded=True,
    weight_offset=False,
    weight_rows=False,
    bias=False,
    outputs=("out",),
    mutates=(),
    deterministic=True,
    batch_invariant=False,  # nobody has tested it; in some versions blocks follow the rows
    reduction="per thread, then across the block; the block size follows hidden and the version",
)
_T5 = dataclasses.replace(
    _PLAIN,
    layout=Layout(rows="contiguous", rank=2),
    rounding=(Rounding.CAST_THEN_SCALE,),
)
_CK = dataclasses.replace(_PLAIN, layout=Layout(rows="contiguous", rank=2))
_ADD = dataclasses.replace(_T5, residual=True, outputs=("out", "sum"))


def launch(
    spec: NormSpec,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Outputs:
    """Call aiter. x and residual are 2-D; zero rows never reach it."""
    assert weight is not None
    assert bias is None
    if torch.version.hip and x.device.type != "cuda":  # a memory fault otherwise
        raise RuntimeError(f"aiter: x is on the {x.device.type}, needs a GPU")
    given = {"input": x, "weight": weight.reshape(-1), **_scalars(spec, eps)}
    if residual is not None:
        return _with_add(spec, given, residual)
    if not x.shape[0]:
        return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)
    api = aiter_api.load()
    return (api.plain(*(given[name] for name in api.version.plain)),)


def _with_add(spec: NormSpec, given: dict[str, Any], residual: torch.Tensor) -> Outputs:
    x = given["input"]
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if x.shape[0]:
        api = aiter_api.load()
        given |= {"out": out, "residual_in": residual, "residual_out": total}
        api.add(*(given[name] for name in api.version.add))
    return (out, total)[: len(spec.outputs)]


def _scalars(spec: NormSpec, eps: float) -> dict[str, Any]:
    """The other arguments. eps as the float32 eager adds: the HIP kernel adds it as a double."""
    return {
        "epsilon": steps.single(eps if spec.has_eps else 0.0),
        "use_model_sensitive_rmsnorm": int(spec.rounding is Rounding.CAST_THEN_SCALE),
        "gemma_norm": False,
    }


def refusal(spec: NormSpec) -> str | None:
    """What the contracts' fields cannot say: one dtype throughout, and the exact steps."""
    narrow = short(spec.x)
    for role, dtype in (("residual", spec.residual), ("sum", spec.sum), ("result", spec.out)):
        if dtype is not None and dtype != spec.x:
            return f"{role} is {short(dtype)}, needs x's {narrow}"
    if spec.square != torch.float32:
        return f"squares rounded to {short(spec.square)}"
    wanted = (
        f"mul_row:f32 cast:{narrow} mul_weight:{narrow}"
        if spec.rounding is Rounding.CAST_THEN_SCALE
        else f"mul_row:f32 mul_weight:f32 cast:{narrow}"
    )
    found = " ".join(map(str, spec.element))
    return None if found == wanted else f"element program {found}, needs {wanted}"


def _plain_refusal(spec: NormSpec) -> str | None:
    if not aiter_api.known().row_stride:
        return "the installed aiter reads no row stride"
    return refusal(spec)


def _ck_refusal(spec: NormSpec) -> str | None:
    if aiter_api.known().row_stride:
        return "not in this version of aiter"
    return refusal(spec)


def _t5_refusal(spec: NormSpec) -> str | None:
    if not aiter_api.known().model_sensitive:
        return "the installed aiter has no use_model_sensitive_rmsnorm"
    return refusal(spec)


def _add_refusal(spec: NormSpec) -> str | None:
    return "no residual add in the spec" if spec.residual is None else _t5_refusal(spec)


def _truncates(spec: NormSpec, arch: str) -> str | None:
    if spec.x != torch.bfloat16:
        return None
    return f"bf16 may be truncated, not rounded to nearest{' on ' + arch if arch else ''}"


def _plain_truncates(spec: NormSpec, arch: str) -> str | None:
    return None if arch in aiter_api.known().nearest else _truncates(spec, arch)


def unavailable() -> str | None:
    """None, or why no kernel can run here, without importing aiter where there is no AMD GPU."""
    if not torch.version.hip or not torch.cuda.is_available():
        return "no AMD GPU"
    return aiter_api.problem()


def prepare(spec: NormSpec, hidden: int | None) -> str | None:
    """None, or why the kernels cannot be called. aiter builds what is missing at the first call."""
    return unavailable()


PLAIN = Kernel(
    "aiter.rms_norm", _PLAIN, launch, prepare, unavailable,
    refuses=_plain_refusal, inexact=_plain_truncates,
)  # fmt: skip
CK = Kernel(
    "aiter.rms_norm_ck", _CK, launch, prepare, unavailable,
    refuses=_ck_refusal, inexact=_truncates,
)  # fmt: skip
T5 = Kernel(
    "aiter.rms_norm_t5", _T5, launch, prepare, unavailable,
    refuses=_t5_refusal, inexact=_truncates,
)  # fmt: skip
ADD = Kernel(
    "aiter.rms_norm_add", _ADD, launch, prepare, unavailable,
    refuses=_add_refusal, inexact=_truncates,
)  # fmt: skip
KERNELS = (PLAIN, CK, T5, ADD)
