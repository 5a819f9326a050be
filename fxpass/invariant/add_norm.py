"""A residual add and the norm after it, in place: what serving stacks call on their own buffers."""

from __future__ import annotations

import functools
from typing import Any

import torch

from fxpass import torch_dispatcher
from fxpass.dtypes import is_exact_cast, short
from fxpass.errors import FxpassError
from fxpass.invariant.norms import PLAIN, RMS_ROW, invariant_kernel
from fxpass.kernels.invariant import dispatch
from fxpass.spec import NormSpec, Rounding, Step

Tensor = torch.Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_HERE = (torch.strided, True)
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
            one storage, expanded ones, or x and residual that require a gradient. Nothing was
            written then.
    """
    if torch.is_grad_enabled() and (x.requires_grad or residual.requires_grad):
        raise FxpassError("a tensor requires a gradient; call add_rms_norm_ under torch.no_grad()")
    told = _EPS if eps is None else float(eps)
    # A call of the operator costs 10 us of host time more.
    run = torch.ops.fxpass.add_norm_ if _is_watched(x, residual, weight) else _run
    run(x, residual, weight, told, rounding, weight_offset)
    return x, residual


def _is_watched(*tensors: Tensor | None) -> bool:
    """Whether somebody has to see an operator: a compiler, a mode, a tensor with its own ways."""
    if torch.compiler.is_compiling() or torch_dispatcher.is_traced():
        return True
    return any(t is not None and (type(t) not in PLAIN or t.is_meta) for t in tensors)


def _spec_of(
    x: Tensor, residual: Tensor, weight: Tensor | None, rounding: str, weight_offset: float
) -> NormSpec:
    """What the arguments mean. Raises FxpassError."""
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight)):
        if tensor is not None and (tensor.layout, tensor.device.type in dispatch.DEVICES) != _HERE:
            raise FxpassError(
                f"{name} is {tensor.layout} on {tensor.device}, needs a strided CPU or GPU tensor"
            )
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
    return NormSpec(
        x=x,
        row=RMS_ROW,
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
    if not x.numel():
        return
    _check_memory(x, residual, weight)
    found = invariant_kernel(spec, x.device, x.shape[-1])
    if found is None:
        raise FxpassError(f"no batch-invariant kernel for {short(x.dtype)} on {x.device}: {spec}")
    found.overwriting(spec)(x, residual, weight, None, eps)


def _check_memory(x: Tensor, residual: Tensor, weight: Tensor | None) -> None:
    """Raises FxpassError where writing x or residual would change something else, or fail."""
    given = {"x": x, "residual": residual, **({} if weight is None else {"weight": weight})}
    for name, tensor in given.items():
        if tensor.is_neg():
            raise FxpassError(f"{name} has a negation that waits; pass {name}.resolve_neg()")
    for name, tensor in (("x", x), ("residual", residual)):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and step == 0 for size, step in steps):
            raise FxpassError(f"{name} is expanded: several elements in one place; pass a copy")
        if tensor.is_inference() and not torch.is_inference_mode_enabled():
            raise FxpassError(f"{name} is an inference tensor; write it under inference_mode()")
    places = [tensor.untyped_storage().data_ptr() for tensor in given.values()]
    if len(set(places)) < len(places):
        raise FxpassError(f"{', '.join(given)} share memory; x and residual are written over")


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
