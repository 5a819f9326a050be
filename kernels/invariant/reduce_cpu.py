"""Reductions over the last dim on a CPU; the bits of a row depend on that row alone.

Sums follow the tree of `cpu.row` (64 lanes, blocks of 4096, then a binary tree over the lanes),
whatever the number of rows, threads and strides, so `row_mean(x.float().pow(2))` has the bits of
the norm in `cpu.row`. Everything is computed in float32, in float64 if x or `dtype` is, and rounded
once to `dtype`. x is not rounded to `dtype` first; where ATen means that, the caller casts.

exp is our own (cpu_exp.h, 1 ulp): that of a vector library differs between the vector part and
the rest of a loop.

Every function raises TypeError for a dtype that is not bfloat16, float16, float32 or float64.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch

from fxpass.dtypes import wide
from fxpass.kernels.invariant import cpu_library, reduce_plain
from fxpass.kernels.invariant.cpu_library import TYPES

Tensor = torch.Tensor

_FORMAT = struct.Struct("6P 6q 2d")  # FxRows of reduce_cpu.h
_WHAT = {
    name: number
    for number, name in enumerate(
        "sum mean count absolute square power most least "
        "logsumexp softmax log_softmax var_mean layer_norm cumsum".split()
    )
}


def row_sum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...); 0 for R = 0."""
    return _reduced("sum", x, dtype)


def row_mean(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...): the sum divided by R, as eager; NaN for R = 0."""
    return _reduced("mean", x, dtype)


def row_norm(x: Tensor, p: float, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...). p: 0, 1, 2, an infinity, or another float.

    Raises RuntimeError for R = 0 where p is negative or infinite: there is no value to start from.
    """
    if x.shape[-1] == 0 and (p < 0 or math.isinf(p)):
        raise RuntimeError(f"a norm of order {p} needs at least one element, R is 0")
    names = {0.0: "count", 1.0: "absolute", 2.0: "square", math.inf: "most", -math.inf: "least"}
    return _reduced(names.get(float(p), "power"), x, dtype, p)


def row_logsumexp(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...); -inf for R = 0, and infinities as in torch."""
    return _reduced("logsumexp", x, dtype)


def row_softmax(x: Tensor, *, dtype: torch.dtype, log: bool) -> Tensor:
    """(..., R) -> (..., R), contiguous; (log-)softmax of each row."""
    return _mapped("log_softmax" if log else "softmax", x, dtype)


def row_var_mean(x: Tensor, correction: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., R) -> variance (...), mean (...). The variance divides by max(R - correction, 0)."""
    x = _computable(x, dtype)
    var, mean = (_made(x, x.shape[:-1], dtype) for _ in range(2))
    _run("var_mean", x, first=var, second=mean, p=float(correction))
    return var.to(dtype), mean.to(dtype)


def row_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm: (..., R), weight and bias (R,) or None -> out, mean (...), rstd (...).

    `out` is of x's dtype and contiguous; mean and rstd are float32, float64 if x is.

    Raises:
        ValueError: weight or bias has another shape.
    """
    x = _computable(x, x.dtype)
    for name, shared in (("weight", weight), ("bias", bias)):
        if shared is not None and shared.shape != x.shape[-1:]:
            raise ValueError(f"{name} is {tuple(shared.shape)}, a row of x {x.shape[-1]}")
    out = torch.empty(x.shape, dtype=x.dtype)
    mean, rstd = (_made(x, x.shape[:-1], wide(x.dtype)) for _ in range(2))
    affine = [None if t is None else t.to(mean.dtype).contiguous() for t in (weight, bias)]
    _run("layer_norm", x, out, mean, rstd, *affine, eps=eps)
    return out, mean, rstd


def row_cumsum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (..., R), contiguous: running sums, added one by one in float64."""
    return _mapped("cumsum", x, dtype)


def _reduced(what: str, x: Tensor, dtype: torch.dtype, p: float = 0.0) -> Tensor:
    x = _computable(x, dtype)
    out = _made(x, x.shape[:-1], dtype)
    _run(what, x, first=out, p=p)
    return out.to(dtype)


def _mapped(what: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    x = _computable(x, dtype)
    out = _made(x, x.shape, dtype)
    _run(what, x, out)
    return out.to(dtype)


def _computable(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x`, in float64 if the result is."""
    if x.dtype not in TYPES or dtype not in TYPES:
        raise TypeError(f"needs bfloat16, float16, float32 or float64, not {x.dtype} to {dtype}")
    return x.to(torch.float64) if dtype == torch.float64 else x


def _made(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An output of `dtype`, if the library of x writes it, else of the type that x is summed in."""
    written = dtype if dtype in (x.dtype, wide(x.dtype)) else wide(x.dtype)
    return torch.empty(shape, dtype=written)


def _run(
    what: str,
    x: Tensor,
    out: Tensor | None = None,
    first: Tensor | None = None,
    second: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    p: float = 0.0,
    eps: float = 0.0,
) -> None:
    """Run one function of reduce_cpu.h; out, first and second are written."""
    size = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    if rows == 0 or (size == 0 and first is None):
        return
    x = _matrix(x, rows, size)
    run = cpu_library.library("rows", x.dtype)
    if run is None:
        reduce_plain.run(what, x, out, first, second, weight, bias, p, eps)
        return
    tensors = (x, out, first, second, weight, bias)
    made = first if out is None else out
    assert made is not None
    run(
        _FORMAT.pack(
            *(0 if t is None else t.data_ptr() for t in tensors),
            *(rows, size, x.stride(0), _WHAT[what]),
            made.dtype != x.dtype,
            cpu_library.threads(rows * size),
            *(p, eps),
        )
    )


def _matrix(x: Tensor, rows: int, size: int) -> Tensor:
    """`x` as rows of contiguous elements, any distance apart; a view where strides allow it."""
    x = x.detach()
    flat = x if x.dim() == 2 else x.reshape(rows, size)
    return flat if size <= 1 or flat.stride(1) == 1 else flat.contiguous()
