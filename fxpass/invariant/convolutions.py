"""Convolutions of one, two and three dims, plain and transposed: aten::convolution."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from fxpass import torch_dispatcher
from fxpass.invariant.aten import aten, is_empty
from fxpass.kernels.invariant import dispatch
from fxpass.kernels.invariant.convolve import Windows
from fxpass.torch_private import statically_known_true

Tensor = torch.Tensor


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    """aten::convolution, in the memory format torch gives its result."""
    windows = _windows(weight, stride, padding, dilation, transposed, output_padding, groups)
    if not _fits(input, weight, bias, windows):
        return NotImplemented
    last = torch_dispatcher.convolution_is_channels_last(input, weight, bias, windows)
    return dispatch.convolution(input, weight, bias, windows, channels_last=last, tf32=_tf32(input))


def convolution_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Any:
    """aten::convolution_backward: the input's gradient is a convolution, turned the other way.

    Those of the weight and the bias are sums over all rows, and torch's own.
    """
    windows = _windows(weight, stride, padding, dilation, transposed, output_padding, groups)
    if not output_mask[0] or not _fits(input, weight, None, windows):
        return NotImplemented
    back = windows._replace(transposed=not transposed, output_padding=(0,) * len(windows.stride))
    if not transposed:  # how far windows were from the end
        reached = back.sizes(grad_output.shape, weight.shape)[1:]
        missing = [size - end for size, end in zip(input.shape[2:], reached, strict=True)]
        back = back._replace(output_padding=missing)
    found = convolution(grad_output, weight, None, *back)
    if found is NotImplemented:
        return NotImplemented
    rest: Sequence[Tensor | None] = (None, None, None)
    if any(output_mask[1:]):
        rest = aten.convolution_backward(
            grad_output, input, weight, bias_sizes, *windows, [False, *output_mask[1:]]
        )
    return found, *rest[1:]


def _windows(
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Windows:
    """With one value per dim; ATen takes a single one for all."""

    def each(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values) * (weight.dim() - 2) if len(values) == 1 else tuple(values)

    return Windows(
        each(stride), each(padding), each(dilation), transposed, each(output_padding), groups
    )


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows) -> bool:
    """Whether torch would take these, and we have a kernel for them."""
    rank = weight.dim() - 2
    tensors = [t for t in (x, weight, bias) if t is not None]
    if not 1 <= rank <= 3 or x.dim() != weight.dim() or any(is_empty(t) for t in tensors):
        return False
    if any((t.dtype, t.device) != (x.dtype, x.device) for t in tensors):
        return False
    if not all(dispatch.takes(t, product=True) for t in tensors):
        return False
    given = (windows.stride, windows.padding, windows.dilation, windows.output_padding)
    if any(len(values) != rank for values in given):
        return False
    if min(windows.stride) < 1 or min(windows.dilation) < 1 or min(windows.padding) < 0:
        return False
    most = map(max, windows.stride, windows.dilation)
    if windows.transposed and not all(map(operator.lt, windows.output_padding, most)):
        return False
    return _sizes_fit(x, weight, bias, windows)


def _sizes_fit(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows) -> bool:
    groups = windows.groups
    if groups < 1 or weight.shape[0] % groups:
        return False
    channels = weight.shape[0] if windows.transposed else weight.shape[1] * groups
    made, *sizes = windows.sizes(x.shape, weight.shape)
    return (
        x.shape[1] == channels
        and (bias is None or (bias.dim() == 1 and bias.shape[0] == made))
        and not any(statically_known_true(size < 1) for size in sizes)
    )


def _tf32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cuda and torch_dispatcher.tf32_allowed("cudnn.conv")
