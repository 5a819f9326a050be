"""Operators of which torch has another kernel for another memory layout, in other last bits.

A slice `video[:, 0]` is dense if the batch is one sample, and not if it is two: the layout follows
the batch. Here the input is made contiguous first, and the result gets the layout torch gives it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from fxpass.invariant.aten import Operator, aten, is_empty
from fxpass.kernels.invariant import dispatch
from fxpass.torch_dispatcher import suggested_format

Tensor = torch.Tensor


def _by_contiguous(overload: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A call of `overload` whose first argument lies in memory as its shape says."""
    if dispatch.is_through() or not dispatch.takes(x):
        return NotImplemented  # Inductor's code is one for all layouts
    if x.is_contiguous():
        return overload(x, *args, **kwargs)
    made = overload(x.contiguous(), *args, **kwargs)
    return made.contiguous(memory_format=suggested_format(x))


def contiguous_first(overload: Any) -> Operator:
    """The replacement of an operator with one result."""
    return functools.partial(_by_contiguous, overload)


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """aten::native_batch_norm with statistics that are there already; training mixes all rows."""
    if training or running_mean is None or running_var is None:
        return NotImplemented
    given = (weight, bias, running_mean, running_var, training, momentum, eps)
    rest: list[Tensor] = []

    def out(x: Tensor) -> Tensor:
        found: Tensor
        found, *rest[:] = aten.native_batch_norm(x, *given)
        return found

    made = _by_contiguous(out, input)
    return made if made is NotImplemented else (made, *rest)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """aten::_weight_norm_interface: (v * g / norm, norm); norms over all dims but `dim`.

    torch's own follows the number of threads where that is the last.
    """
    same = v.dtype == g.dtype and v.dtype in (torch.bfloat16, torch.float32, torch.float64)
    if not same or dim not in (0, v.dim() - 1) or is_empty(v) or not dispatch.takes(v):
        return NotImplemented
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    rows = v.flatten(1) if dim == 0 else v.flatten(0, -2).mT
    norms = dispatch.row_norm(rows, 2.0, dtype=wide).view(g.shape)
    return (v.to(wide) * (g.to(wide) / norms)).to(v.dtype).contiguous(), norms
