"""Operators of which torch has another kernel for another memory layout, in other last bits.

A slice `video[:, 0]` is dense if the batch is one sample, and not if it is two: the layout follows
the batch. Here the input is made contiguous first, and the result gets the layout torch gives it.
"""

from __future__ import annotations

from typing import Any

import torch

from fxpass.dtypes import wide
from fxpass.invariant.aten import Operator, aten, is_empty
from fxpass.kernels.invariant import dispatch
from fxpass.torch_dispatcher import suggested_format

Tensor = torch.Tensor


def _takes(x: Tensor) -> bool:
    return not dispatch.is_through() and dispatch.takes(x)  # Inductor's code is one for all layouts


def _laid_out(made: Tensor, x: Tensor) -> Tensor:
    """What came of x.contiguous(), as it would lie in memory had it come of x."""
    return made if x.is_contiguous() else made.contiguous(memory_format=suggested_format(x))


def contiguous_first(overload: Any) -> Operator:
    """The replacement of an operator with one result."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not _takes(x):
            return NotImplemented
        return _laid_out(overload(x.contiguous(), *args, **kwargs), x)

    return call


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
    if training or running_mean is None or running_var is None or not _takes(input):
        return NotImplemented
    made, *rest = aten.native_batch_norm(
        input.contiguous(), weight, bias, running_mean, running_var, training, momentum, eps
    )
    return _laid_out(made, input), *rest


def vendor_batch_norm(
    results: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    exponential_average_factor: float,
    epsilon: float,
) -> Any:
    """aten::cudnn_batch_norm or miopen's, of 4 or 3 `results`, as the plain one multiplies.

    What they save for training is empty, as theirs is.
    """
    given = (weight, bias, running_mean, running_var, training, exponential_average_factor, epsilon)
    found = batch_norm(input, *given)
    if found is NotImplemented:
        return found
    saved = (weight.new_empty(0), weight.new_empty(0), input.new_empty(0, dtype=torch.uint8))
    return (found[0], *saved)[:results]


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Any:
    """aten::_weight_norm_interface: (v * g / norm, norm); norms over all dims but `dim`.

    torch's own follows the number of threads where that is the last.
    """
    same = v.dtype == g.dtype and v.dtype in (torch.bfloat16, torch.float32, torch.float64)
    if not same or dim not in (0, v.dim() - 1) or is_empty(v) or not dispatch.takes(v):
        return NotImplemented
    single = wide(v.dtype)
    rows = v.flatten(1) if dim == 0 else v.flatten(0, -2).mT
    norms = dispatch.row_norm(rows, 2.0, dtype=single).view(g.shape)
    return (v.to(single) * (g.to(single) / norms)).to(v.dtype).contiguous(), norms
