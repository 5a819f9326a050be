"""Convolutions as products: every window of the input is a row.

A result is the product of its window, flattened as the weight is in memory, with the weight, added
up in the order the product has for that length; where every channel has its own filter (depthwise),
the taps' products are rounded to float32 one by one and added in the order of the weight. Either
way the order depends on the weight's shape alone, and the bias is added before the one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
MatMul = Callable[..., Tensor]

_BLOCK_BYTES = 1 << 26
"""Windows overlap, so their copies are larger than the input; more than this is done in parts."""


class Windows(NamedTuple):
    """Which windows a convolution takes: the arguments of aten::convolution after the bias."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    def sizes(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, ...]:
        """The result's channels and spatial sizes, from the two shapes."""
        spatial = zip(
            x[2:], weight[2:], self.stride, self.padding, self.dilation, self.output_padding,
            strict=True,
        )  # fmt: skip
        if self.transposed:
            sizes = [(s - 1) * t - 2 * p + d * (k - 1) + o + 1 for s, k, t, p, d, o in spatial]
            return (weight[1] * self.groups, *sizes)
        sizes = [(s + 2 * p - d * (k - 1) - 1) // t + 1 for s, k, t, p, d, _ in spatial]
        return (weight[0], *sizes)


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows, matmul: MatMul
) -> Tensor:
    """x (N, C, *S), weight (O, C / groups, *K) or (C, O / groups, *K) transposed -> (N, *S', O).

    Contiguous, in x's dtype. `matmul(a, b, bias)` is an invariant product.
    """
    pads = [(pad, pad) for pad in windows.padding]
    stride, groups = windows.stride, windows.groups
    if windows.transposed:
        x, weight, pads = _turned_around(x, weight, windows)
        stride = [1] * len(pads)
    if any(pair != (0, 0) for pair in pads):
        x = F.pad(x, [side for pair in reversed(pads) for side in pair])
    if groups > 1 and weight.shape[1] == 1:
        return _by_taps(x, weight, bias, stride, windows.dilation)
    return _by_products(_windows(x, weight, stride, windows.dilation), weight, bias, groups, matmul)


def _turned_around(
    x: Tensor, weight: Tensor, windows: Windows
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """A transposed convolution as a plain one of stride 1: input with zeros between, pads to match.

    The weight's taps change their order and its channels their places.
    """
    sizes = [(s - 1) * t + 1 for s, t in zip(x.shape[2:], windows.stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    spread[(..., *(slice(None, None, t) for t in windows.stride))] = x
    flipped = weight.flip(list(range(2, weight.dim()))).unflatten(0, (windows.groups, -1))
    sides = zip(
        windows.padding, windows.dilation, weight.shape[2:], windows.output_padding, strict=True
    )
    pads = [(d * (k - 1) - p, d * (k - 1) - p + more) for p, d, k, more in sides]
    return spread, flipped.transpose(1, 2).flatten(0, 1), pads


def _windows(
    x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """A view (N, C, *S', *K) of a padded input."""
    for dim, (size, step, gap) in enumerate(zip(weight.shape[2:], stride, dilation, strict=True)):
        x = x.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def _by_products(
    windows: Tensor, weight: Tensor, bias: Tensor | None, groups: int, matmul: MatMul
) -> Tensor:
    count, rank = weight[0].numel(), weight.dim() - 2
    filters = weight.reshape(groups, -1, count).contiguous().mT
    shift = bias if bias is None or groups == 1 else bias.view(groups, 1, -1)

    def results(part: Tensor) -> Tensor:
        """Of some windows: (N, *S', O)."""
        split = part.unflatten(1, (groups, -1))
        spatial = range(3, 3 + rank)
        rows = split.permute(1, 0, *spatial, 2, *range(3 + rank, split.dim()))
        shape = rows.shape[1 : 2 + rank]
        rows = rows.reshape(groups, -1, count).contiguous()
        if groups == 1:
            return matmul(rows[0], filters[0], shift).view(*shape, -1)
        return matmul(rows, filters, shift).view(groups, *shape, -1).movedim(0, -2).flatten(-2)

    blocks = list(_blocks(windows.shape, rank, windows.element_size()))
    if len(blocks) == 1:
        return results(windows).contiguous()
    out = windows.new_empty(windows.shape[0], *windows.shape[2 : 2 + rank], weight.shape[0])
    for samples, firsts in blocks:
        out[samples, firsts] = results(windows[samples, :, firsts])
    return out


def _blocks(shape: Sequence[int], rank: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
    """Parts of the samples and of the first spatial dim, so that a copy of each stays small."""
    samples, firsts = shape[0], shape[2]
    sample = math.prod(shape[1:]) * itemsize
    some = max(1, _BLOCK_BYTES // sample)
    lines = firsts if sample <= _BLOCK_BYTES else max(1, _BLOCK_BYTES * firsts // sample)
    for sample_at in range(0, samples, some):
        for first_at in range(0, firsts, lines):
            yield slice(sample_at, sample_at + some), slice(first_at, first_at + lines)


def _by_taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """One filter a channel, or several: sums of shifted inputs."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    windows = _windows(x.movedim(1, -1).contiguous().movedim(-1, 1), weight, stride, dilation)
    taps = weight.to(wide).flatten(2).unbind(-1)
    rank, copies = weight.dim() - 2, weight.shape[0] // x.shape[1]
    total: Any = None
    for tap, shifted in zip(taps, windows.flatten(2 + rank).unbind(-1), strict=True):
        values = shifted.movedim(1, -1).to(wide)
        if copies > 1:
            values = values.repeat_interleave(copies, -1)
        term = values * tap[:, 0]
        total = term if total is None else total.add_(term)
    if bias is not None:
        total += bias.to(wide)
    made: Tensor = total.to(x.dtype)
    return made.contiguous()
