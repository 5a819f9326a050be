"""Reductions over the last dim on a GPU; the bits of a row depend on that row alone.

Sums follow the tree of `gpu_rows`, whatever the number of rows, strides and alignment, so
`row_mean(x.float().pow(2))` has the bits of the norm in `triton.row` and `cuda.row`. Everything is
computed in float32, in float64 if x or `dtype` is, and rounded once to `dtype`. x is not rounded to
`dtype` first; where ATen means that, the caller casts.

Accuracy besides the sums': softmax and log_softmax use an exp of 2 ulp and a log of 1 ulp, softmax
multiplies by a rounded inverse (one more rounding); norms other than 0, 1, 2 and infinities take
their powers through float64.

Every function raises TypeError for a dtype that is not bfloat16, float16, float32 or float64.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch

from fxpass.kernels import gpu_rows
from fxpass.kernels.gpu_call import addressed
from fxpass.kernels.invariant.triton_launch import launch

Tensor = torch.Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WIDEST = torch.float64
_OF_A_WARP = 512
"""Elements of a row (or of several short rows) for one warp: 16 for each thread."""
_FEW_ROWS = 264
"""Twice the multiprocessors of an H200: below that a long row is spread over more threads."""
_EXCHANGED = 5
"""Levels of the tree that are left when several warps exchange their sums of units."""


def row_sum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...); 0 for R = 0."""
    return _summed(x, dtype, 1.0)


def row_mean(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...): the sum times the float32 inverse of R, as eager; NaN for R = 0."""
    return _summed(x, dtype, 1.0 / x.shape[-1] if x.shape[-1] else math.nan)


def row_norm(x: Tensor, p: float, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...). p: 0, 1, 2, an infinity, or another float.

    Raises RuntimeError for R = 0 where p is negative or infinite: there is no value to start from.
    """
    if x.shape[-1] == 0 and (p < 0 or math.isinf(p)):
        raise RuntimeError(f"a norm of order {p} needs at least one element, R is 0")
    if math.isinf(p):
        return _reduced("row_extreme", x, dtype, (), SIGN=1 if p > 0 else -1)
    kind = {0.0: "nonzero", 1.0: "abs", 2.0: "square"}.get(float(p), "power")
    if kind in ("nonzero", "abs"):
        return _summed(x, dtype, 1.0, kind)
    return _summed(x, dtype, 1.0 / p, kind, p)


def row_logsumexp(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...); -inf for R = 0, and infinities as in torch."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -math.inf, dtype=dtype)
    return _reduced("row_softmax", x, dtype, (), KIND="logsumexp", **_tree(x), **_kept(x))


def row_softmax(x: Tensor, *, dtype: torch.dtype, log: bool) -> Tensor:
    """(..., R) -> contiguous (..., R)."""
    wide = _is_wide(x, dtype)
    out = torch.empty(x.shape, dtype=_WIDEST if wide else dtype, device=x.device)
    kind = "log_softmax" if log else "softmax"
    _launch("row_softmax", x, [out], (), wide, KIND=kind, **_tree(x), **_kept(x))
    return out.to(dtype)


def row_var_mean(x: Tensor, correction: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., R) -> two of (...): the mean, then the squared distances' sum / max(0, R - correction).

    NaN for R = 0.
    """
    size, wide = x.shape[-1], _is_wide(x, dtype)
    if size == 0:
        empty = x.new_full(x.shape[:-1], math.nan, dtype=dtype)
        return empty, empty.clone()
    var, mean = (_values(x, _WIDEST if wide else dtype) for _ in range(2))
    factor = _bits(max(0.0, size - correction))
    _moments(x, [mean, mean, var, mean, mean], (factor, 0), wide, NORM=False)
    return var.to(dtype), mean.to(dtype)


def row_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., R), weight and bias (R,) or None -> out (..., R) in x's dtype, mean and rstd (...).

    mean and rstd have x.shape[:-1] and are float32, float64 if x is.

    Raises:
        ValueError: weight or bias has another shape or device.
    """
    size, wide = x.shape[-1], _is_wide(x, x.dtype)
    for name, shared in (("weight", weight), ("bias", bias)):
        if shared is not None and (shared.shape != (size,) or shared.device != x.device):
            raise ValueError(
                f"{name} is {tuple(shared.shape)} on {shared.device}, needs ({size},) on {x.device}"
            )
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    single = _WIDEST if wide else torch.float32
    if size == 0:
        mean = x.new_zeros(x.shape[:-1], dtype=single)
        return out, mean, torch.full_like(mean, math.nan)
    mean, rstd = _values(x, single), _values(x, single)
    given = [out if shared is None else shared.contiguous() for shared in (weight, bias)]
    _moments(
        x, [out, mean, rstd, *given], (0, _bits(eps)), wide,
        NORM=True, WEIGHT=weight is not None, BIAS=bias is not None,
    )  # fmt: skip
    return out, mean, rstd


def row_cumsum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> contiguous (..., R): element i depends on elements 0 to i alone."""
    from fxpass.kernels.invariant import scan_triton
    from fxpass.kernels.invariant.triton_math import FIXED

    wide = _is_wide(x, dtype)
    out = torch.empty(x.shape, dtype=_WIDEST if wide else dtype, device=x.device)
    if not x.numel():
        return out.to(dtype)
    x, rows = _addressed(x)
    lanes = min(scan_triton.BLOCK, 1 << (x.shape[-1] - 1).bit_length())
    together = max(1, _OF_A_WARP // lanes)
    numbers = (rows.count, x.shape[-1], rows.inner, rows.outer[0], rows.step[0])
    launch(
        scan_triton.row_cumsum, (-(-rows.count // together),), (x, out), numbers,
        {"ROWS": together, "LEVELS": lanes.bit_length() - 1, "WIDE": wide},
        {"num_warps": max(1, lanes // _OF_A_WARP), **FIXED},
    )  # fmt: skip
    return out.to(dtype)


# ---- Launches ------------------------------------------------------------------------------------


def _summed(
    x: Tensor, dtype: torch.dtype, factor: float, kind: str = "", power: float = 1.0
) -> Tensor:
    if x.shape[-1] == 0:  # no program would write it
        return x.new_full(x.shape[:-1], 0.0 * factor, dtype=dtype)
    numbers = (_bits(factor), _bits(power))
    root = kind in ("square", "power")
    return _reduced("row_sum", x, dtype, numbers, KIND=kind, ROOT=root, **_tree(x))


def _reduced(
    name: str, x: Tensor, dtype: torch.dtype, numbers: tuple[int, ...], **meta: Any
) -> Tensor:
    """Launch a kernel that writes one value a row."""
    wide = _is_wide(x, dtype)
    out = _values(x, _WIDEST if wide else dtype)
    _launch(name, x, [out], numbers, wide, **meta)
    return out.to(dtype)


def _moments(
    x: Tensor, tensors: list[Tensor], numbers: tuple[int, ...], wide: bool, **meta: Any
) -> None:
    out, mean, second, weight, bias = tensors
    flags = {"WEIGHT": False, "BIAS": False, **meta, **_tree(x), **_kept(x)}
    _launch("row_moments", x, [out, mean, second, weight, bias], numbers, wide, **flags)


def _launch(
    name: str, x: Tensor, tensors: list[Tensor], numbers: tuple[int, ...], wide: bool, **meta: Any
) -> None:
    """Launch a kernel of `reduce_triton` on every row of x."""
    from fxpass.kernels.invariant import reduce_triton
    from fxpass.kernels.invariant.triton_math import FIXED

    if not x.numel():
        return
    x, rows = _addressed(x)
    together, warps = schedule(x.shape[-1], rows.count)
    place = (rows.count, x.shape[-1], rows.inner, rows.outer[0], rows.step[0])
    if together > 1 or warps == 1:
        meta = _without_exchange(meta)
    launch(
        getattr(reduce_triton, name), (-(-rows.count // together),), (x, *tensors),
        (*place, *numbers),
        {"ROWS": together, "LANES": gpu_rows.lanes(x.shape[-1]), "WIDE": wide, **meta},
        {"num_warps": warps, **FIXED},
    )  # fmt: skip


def schedule(size: int, rows: int) -> tuple[int, int]:
    """(rows per program, warps). Changes no bit."""
    lanes = gpu_rows.lanes(size)
    together = max(1, _OF_A_WARP // lanes)
    warps = min(8, max(1, lanes // _OF_A_WARP))
    return together, warps * 2 if rows <= _FEW_ROWS and lanes >= 2 * _OF_A_WARP else warps


def _tree(x: Tensor) -> dict[str, int]:
    """How many levels the tree over a row's units has before and after the warps' exchange."""
    levels = (gpu_rows.lanes(x.shape[-1]) // gpu_rows.VECTOR).bit_length() - 1
    last = _EXCHANGED if levels > _EXCHANGED else 0
    return {"LEVELS": levels - last, "LAST": last}


def _without_exchange(meta: dict[str, Any]) -> dict[str, Any]:
    if "LAST" not in meta:
        return meta
    return {**meta, "LEVELS": meta["LEVELS"] + meta["LAST"], "LAST": 0}


def _kept(x: Tensor) -> dict[str, bool]:
    return {"KEPT": x.shape[-1] <= gpu_rows.MOST_LANES}


def _addressed(x: Tensor) -> tuple[Tensor, gpu_rows.Rows]:
    """x, copied if its rows cannot be addressed, and the way to its rows."""
    rows, copies = addressed(x, None)
    return x.contiguous() if copies else x, rows


def _values(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=dtype, device=x.device)


def _is_wide(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether to compute in float64."""
    for given in (x.dtype, dtype):
        if given not in _FLOATS:
            raise TypeError(f"a reduction of {x.dtype} to {dtype}; needs floating-point dtypes")
    return _WIDEST in (x.dtype, dtype)


def _bits(value: float) -> int:
    """A float64 as the integer that `triton_math.float_of` reads."""
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return int(bits)
