"""Systems of equations: aten::linalg_solve_triangular."""

from __future__ import annotations

from typing import Any

import torch

from fxpass.invariant.aten import broadcast, is_empty
from fxpass.kernels.invariant import dispatch, solve

Tensor = torch.Tensor


def solve_triangular(
    self: Tensor,
    B: Tensor,  # noqa: N803 - ATen's name
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Any:
    """X with self @ X = B, or X @ self = B unless `left`; dense by columns, as torch's."""
    if self.dim() < 2 or B.dim() < 2:
        return NotImplemented
    if not left:
        turned = solve_triangular(self.mT, B.mT, upper=not upper, unitriangular=unitriangular)
        return turned if turned is NotImplemented else _dense_by_columns(turned.mT)
    if not _fits(self, B):
        return NotImplemented
    try:
        batch = broadcast(self.shape[:-2], B.shape[:-2])
    except RuntimeError:
        return NotImplemented  # torch says it better
    a, b = (t.expand(*batch, *t.shape[-2:]).reshape(-1, *t.shape[-2:]) for t in (self, B))
    if upper:
        a, b = a.flip(-2, -1), b.flip(-2)
    made = dispatch.solve_lower(a, b, unitriangular)
    return _dense_by_columns((made.flip(-2) if upper else made).reshape(*batch, *B.shape[-2:]))


def _dense_by_columns(x: Tensor) -> Tensor:
    """A copy whose columns are contiguous, strides of dims of one element included."""
    return x.mT.clone(memory_format=torch.contiguous_format).mT


def _fits(a: Tensor, b: Tensor) -> bool:
    size = a.shape[-1]
    return (
        a.dtype == b.dtype
        and a.dtype in (torch.float32, torch.float64)
        and a.device == b.device
        and a.shape[-2] == size == b.shape[-2]
        and not is_empty(a)
        and not is_empty(b)
        and dispatch.takes(a, product=size > solve.BLOCK)
        and b.layout == torch.strided
    )
