"""A residual add and the norm after it, in place: what serving stacks call on their own buffers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fxpass.dtypes import is_exact_cast, short
from fxpass.errors import FxpassError
from fxpass.invariant.norms import invariant_kernel
from fxpass.spec import NormSpec, Rounding, Step

Tensor = torch.Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_EPS = torch.finfo(torch.float32).eps
_ORDERS = (Rounding.CAST_THEN_SCALE.value, Rounding.SCALE_THEN_CAST.value)
_library: Any = getattr(torch.library, "Library")("fxpass", "FRAGMENT")  # noqa: B009 - untyped


def add_rms_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    rounding: str = "cast_then_scale",
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`residual += x`, then `x = rms_norm(residual) * weight`; both in place.

    The bits are those of the two operators one after the other in batch-invariant mode, on every
    device: the kernel is the plain norm's, reading the sum rounded to residual's dtype. `cuda.row`
    writes over contiguous inputs; elsewhere the results are made beside them and copied.

    Args:
        x: (..., hidden), bfloat16, float16 or float32; becomes the normalised values.
        residual: x's shape and device, x's dtype or float32; becomes the sum.
        weight: (hidden,) of x's dtype or, if it scales before the cast, float32; or None.
        eps: added to the mean of squares; None is float32's machine epsilon, as in torch.
        rounding: cast_then_scale (Hugging Face Llama) or scale_then_cast (torch, Gemma).
        weight_offset: added to the weight in float32, 1.0 for Gemma.

    Returns:
        (x, residual), the same tensors.

    Raises:
        FxpassError: for shapes, dtypes, devices or an order that do not fit together, tensors of
            one storage, or x and residual that require a gradient. Nothing was written then.
    """
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        raise FxpassError("a tensor requires a gradient; call add_rms_norm_ under torch.no_grad()")
    told = _EPS if eps is None else float(eps)
    # A call of the operator costs 10 us of host time more.
    run = torch.ops.fxpass.add_norm_ if torch.compiler.is_compiling() else _run
    run(x, residual, weight, told, rounding, weight_offset)
    return x, residual


def _spec_of(
    x: Tensor, residual: Tensor, weight: Tensor | None, rounding: str, weight_offset: float
) -> NormSpec:
    """What the arguments mean. Raises FxpassError."""
    if rounding not in _ORDERS:
        raise FxpassError(f"rounding {rounding!r}, needs one of {_ORDERS}")
    if residual.shape != x.shape or residual.device != x.device or x.dim() == 0:
        raise FxpassError(f"residual is {_told(residual)}, needs x's {_told(x)}")
    if weight is not None and (weight.shape != x.shape[-1:] or weight.device != x.device):
        needed = f"({x.shape[-1]},) on {x.device}"
        raise FxpassError(f"weight is {_told(weight)}, needs {needed}")
    return _spec(
        x.dtype, residual.dtype, None if weight is None else weight.dtype, rounding, weight_offset
    )


@functools.cache
def _spec(
    x: torch.dtype, residual: torch.dtype, weight: torch.dtype | None, rounding: str, offset: float
) -> NormSpec:
    f32 = torch.float32
    if x not in _FLOATS:
        raise FxpassError(f"x is {x}, needs bfloat16, float16 or float32")
    if residual not in (x, f32):
        raise FxpassError(f"residual is {residual}, needs {x} or float32: it holds the sum")
    early = rounding == Rounding.CAST_THEN_SCALE.value
    if weight is not None and weight not in ((x,) if early else (x, f32)):
        raise FxpassError(f"weight is {weight}, needs {x} for {rounding}")
    cast = [] if is_exact_cast(f32, x) else [Step("cast", x)]
    scale = [] if weight is None else [Step("mul_weight", x if early else f32)]
    row = (Step("mean", f32), Step("add_eps", f32), Step("rsqrt", f32))
    return NormSpec(
        x=x,
        row=row,
        element=(Step("mul_row", f32), *(cast + scale if early else scale + cast)),
        residual=residual,
        sum=residual,
        weight=weight,
        weight_offset=offset,
        weight_offset_dtype=f32 if offset and weight is not None else None,
        outputs=("out", "sum"),
    )


def _run(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    rounding: str,
    weight_offset: float,
) -> None:
    spec = _spec_of(x, residual, weight, rounding, weight_offset)
    if x.untyped_storage().data_ptr() == residual.untyped_storage().data_ptr() and x.numel():
        raise FxpassError("x and residual share memory; each is written over")
    if not x.numel():
        return
    found = invariant_kernel(spec, x.device.type, x.shape[-1])
    if found is None:
        raise FxpassError(f"no batch-invariant kernel for {short(x.dtype)} on {x.device}: {spec}")
    found.overwriting(spec)(x, residual, weight, None, eps)


def _told(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} on {tensor.device}"


def _define() -> None:
    _library.define(
        "add_norm_(Tensor(a!) x, Tensor(b!) residual, Tensor? weight, float eps, str rounding,"
        " float weight_offset) -> ()",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.impl("add_norm_", _run, "CompositeExplicitAutograd")
    torch.library.register_fake("fxpass::add_norm_", lambda *_: None, lib=_library)


_define()
