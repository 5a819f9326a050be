"""Convolutions as products: every window of the input is a row.

A result is the product of its window, flattened as the weight is in memory, with the weight, added
up in the order the product has for that length; where every channel has its own filter (depthwise),
the taps' products are rounded to float32 one by one and added in the order of the weight. Either
way the order depends on the weight's shape alone, and the bias is added before the one rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
MatMul = Callable[..., Tensor]

_BLOCK_BYTES = 1 << 26
"""Windows overlap, so their copies are larger than the input; more than this is done in parts."""
_CACHED_BYTES = 1 << 20
"""On a CPU, sums that every tap adds to stay in a cache: up to 3 times as fast as all at once."""


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
    """The result (N, *S', O), contiguous and in x's dtype.

    x (N, C, *S); weight (O, C / groups, *K), or (C, O / groups, *K) if transposed; bias (O,).
    `matmul(a, b, bias)` is an invariant product.
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
    inside: Any = (..., *(slice(None, None, t) for t in windows.stride))
    spread[inside] = x
    flipped = weight.flip(list(range(2, weight.dim())))
    flipped = flipped.view(windows.groups, -1, *weight.shape[1:])
    sides = zip(
        windows.padding, windows.dilation, weight.shape[2:], windows.output_padding, strict=True
    )
    pads = [(d * (k - 1) - p, d * (k - 1) - p + more) for p, d, k, more in sides]
    return spread, flipped.transpose(1, 2).flatten(0, 1), pads


def _windows(x: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
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
        split = part.view(part.shape[0], groups, -1, *part.shape[2:])
        spatial = range(3, 3 + rank)
        rows = split.permute(1, 0, *spatial, 2, *range(3 + rank, split.dim()))
        shape = rows.shape[1 : 2 + rank]
        rows = rows.reshape(groups, -1, count).contiguous()
        if groups == 1:
            return matmul(rows[0], filters[0], shift).view(*shape, -1)
        return matmul(rows, filters, shift).view(groups, *shape, -1).movedim(0, -2).flatten(-2)

    samples, firsts = windows.shape[0], windows.shape[2]
    copied = windows[0].numel() * windows.element_size()
    blocks = list(_blocks(samples, firsts, copied, _BLOCK_BYTES))
    if len(blocks) == 1:
        return results(windows).contiguous()
    out = windows.new_empty(windows.shape[0], *windows.shape[2 : 2 + rank], weight.shape[0])
    for some, lines in blocks:
        out[some, lines] = results(windows[some, :, lines])
    return out


def _blocks(
    samples: int, firsts: int, sample_bytes: int, limit: int
) -> Iterator[tuple[slice, slice]]:
    """Parts of the samples and of their first spatial dim, so that each takes `limit` bytes."""
    some = max(1, limit // sample_bytes)
    lines = firsts if sample_bytes <= limit else max(1, limit * firsts // sample_bytes)
    for sample in range(0, samples, some):
        for first in range(0, firsts, lines):
            yield slice(sample, sample + some), slice(first, first + lines)


def _by_taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """One filter a channel, or several: sums of shifted inputs."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rank, copies = weight.dim() - 2, weight.shape[0] // x.shape[1]
    values = x.movedim(1, -1).to(wide, memory_format=torch.contiguous_format)
    if copies > 1:
        values = values.repeat_interleave(copies, -1)
    shifts = _windows(values.movedim(-1, 1), weight, stride, dilation).movedim(1, 1 + rank)
    out = x.new_empty(shifts.shape[: 2 + rank])
    taps = list(_taps(weight.to(wide)))
    sample = out[0].numel() * values.element_size()
    limit = _CACHED_BYTES if x.device.type == "cpu" else _BLOCK_BYTES
    for block in _blocks(out.shape[0], out.shape[1], sample, limit):
        part = shifts[block]
        total = part[taps[0][0]] * taps[0][1]
        term = torch.empty_like(total)  # once: fresh memory costs more than the product
        for place, factors in taps[1:]:
            total += torch.mul(part[place], factors, out=term)
        if bias is not None:
            total += bias.to(wide)
        out[block] = total
    return out


def _taps(weight: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Of weight (O, 1, *K): an index of its last dims and the factors of all channels there."""
    for tap in itertools.product(*map(range, weight.shape[2:])):
        place: Any = (..., *tap)
        yield place, weight[place][:, 0].contiguous()
