"""Reductions: sums, means, norms, softmax, variance, running sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxpass.dtypes import wide
from fxpass.invariant.aten import NARROW, along, as_reduced, dims_of, folded, is_empty, unfolded
from fxpass.kernels.invariant import dispatch
from fxpass.torch_private import statically_known_true

Tensor = torch.Tensor
Dims = Sequence[int] | int | None


def sum_dims(
    self: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The sum over some dims."""
    return _reduced(self, dim, keepdim, dtype, dispatch.row_sum)


def sum_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    """The sum of all elements."""
    return sum_dims(self, dtype=dtype)


def nansum(
    self: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The sum over some dims, NaN counting as zero."""
    if not self.is_floating_point():
        return NotImplemented
    return sum_dims(torch.where(self.isnan(), 0, self), dim, keepdim, dtype=dtype)


def mean_dims(
    self: Tensor, dim: Dims = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """The mean over some dims.

    On the CPU torch adds up in float32 what it shall round to 16 bits; elsewhere it casts first.
    """
    if dtype in NARROW and self.dtype != dtype and self.device.type == "cpu":
        made = mean_dims(self, dim, keepdim, dtype=torch.float32)
        return made if made is NotImplemented else made.to(dtype)
    return _reduced(self, dim, keepdim, dtype, dispatch.row_mean)


def mean_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Any:
    """The mean of all elements."""
    return mean_dims(self, dtype=dtype)


def vector_norm(
    self: Tensor,
    ord: Any = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """The p-norm over some dims."""
    if not self.is_floating_point() or isinstance(ord, complex):
        return NotImplemented
    if dtype is not None and torch.promote_types(self.dtype, dtype) != dtype:
        return NotImplemented
    p = float(ord)
    return _reduced(
        self, dim, keepdim, dtype, lambda x, dtype: dispatch.row_norm(x, p, dtype=dtype)
    )


def norm(
    self: Tensor,
    p: Any = 2,
    dim: Dims = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """torch.norm of a vector: `p` may be None, which is 2."""
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


def logsumexp(self: Tensor, dim: Dims, keepdim: bool = False) -> Any:
    """log(sum(exp(x))) over some dims."""
    if not self.is_floating_point():
        return NotImplemented
    return _reduced(self, dim, keepdim, None, dispatch.row_logsumexp)


def softmax(self: Tensor, dim: int, half_to_float: bool) -> Any:
    """Softmax; `half_to_float` gives float32 of float16."""
    return _softmax(self, dim, half_to_float, log=False)


def log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Any:
    """Log-softmax; `half_to_float` gives float32 of float16."""
    return _softmax(self, dim, half_to_float, log=True)


def _softmax(x: Tensor, dim: int, half_to_float: bool, log: bool) -> Any:
    if is_empty(x) or not dispatch.takes(x):
        return NotImplemented
    if half_to_float and (x.dtype not in NARROW or x.device.type == "cpu"):
        return NotImplemented
    dtype = torch.float32 if half_to_float else x.dtype
    made = along(x, dim, lambda rows: dispatch.row_softmax(rows, dtype=dtype, log=log))
    return NotImplemented if made is None else made


def cumsum(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Running sums along a dim."""
    found = as_reduced(self, dtype)
    if found is None:
        return NotImplemented
    x, out = found
    made = along(x, dim, lambda rows: dispatch.row_cumsum(rows, dtype=out))
    return NotImplemented if made is None else made


def var(self: Tensor, dim: Dims = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    """The variance over some dims."""
    return _spread(self, dim, correction, keepdim, root=False, means=False)


def std(self: Tensor, dim: Dims = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    """The standard deviation over some dims."""
    return _spread(self, dim, correction, keepdim, root=True, means=False)


def var_mean(
    self: Tensor, dim: Dims = None, *, correction: Any = None, keepdim: bool = False
) -> Any:
    """Variance and mean over some dims."""
    return _spread(self, dim, correction, keepdim, root=False, means=True)


def std_mean(
    self: Tensor, dim: Dims = None, *, correction: Any = None, keepdim: bool = False
) -> Any:
    """Standard deviation and mean over some dims."""
    return _spread(self, dim, correction, keepdim, root=True, means=True)


def _spread(
    self: Tensor, dim: Dims, correction: Any, keepdim: bool, root: bool, means: bool
) -> Any:
    dims = dims_of(dim, self.dim())
    found = as_reduced(self, None)
    if dims is None or found is None or isinstance(correction, complex):
        return NotImplemented
    less = 1.0 if correction is None else float(correction)
    if statically_known_true(math.prod(self.shape[d] for d in dims) <= less):
        return NotImplemented  # NaN or infinity, and torch's warning
    x = folded(self, dims)
    single = wide(x.dtype)
    spread, mean = dispatch.row_var_mean(x, less, dtype=single)
    made = [
        unfolded(value.to(self.dtype), self, dims, keepdim)
        for value in (_root(spread) if root else spread, mean)
    ]
    return tuple(made) if means else made[0]


def _root(x: Tensor) -> Tensor:
    """The square root, rounded right: eager's own and Inductor's differ in the last float32 bit."""
    return x.double().sqrt().to(x.dtype)


def _reduced(
    self: Tensor,
    dim: Dims,
    keepdim: bool,
    dtype: torch.dtype | None,
    reduce: Callable[..., Tensor],
) -> Any:
    dims = dims_of(dim, self.dim())
    found = None if dims is None else as_reduced(self, dtype)
    if dims is None or found is None:
        return NotImplemented
    x, out = found
    return unfolded(reduce(folded(x, dims), dtype=out), self, dims, keepdim)
