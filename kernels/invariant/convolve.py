"""Convolutions as products: every window of the input is a row.

A result is the product of its window, flattened as the weight is in memory, with the weight, added
up in the order the product has for that length. A transposed convolution multiplies every element
by the taps and adds what falls together, in the order of the taps. Where few filters read one
channel (depthwise), the taps' products are rounded to float32 and added one by one.
Each order depends on the weight's shape per group alone, and on a GPU on whether there is more than
one group, since batched products are cut into chunks of their own. The bias is added before the one
rounding. Zeros that pad the input are multiplied like any others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fxpass.dtypes import wide

Tensor = torch.Tensor
MatMul = Callable[..., Tensor]

_BLOCK_BYTES = 1 << 26
"""Windows overlap, so their copies are larger than the input; more than this is done in parts."""
_CACHED_BYTES = 1 << 20
"""On a CPU, sums that every tap adds to stay in a cache: up to 3 times as fast as all at once."""
_FEW_FILTERS = 8
"""Of one channel: below that products are slower than sums of taps."""
_COLUMNS = 256
"""Of a product of a transposed convolution, which takes as many taps at once."""


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
    `matmul(a, b, bias, out_dtype=...)` is an invariant product.
    """
    channels, *sizes = windows.sizes(x.shape, weight.shape)
    if not x.numel():
        return x.new_empty(x.shape[0], *sizes, channels)
    if windows.transposed:
        sample = 4 * math.prod(x.shape[2:]) * max(_COLUMNS, weight.shape[1]) * windows.groups
        some = max(1, _BLOCK_BYTES // sample)
        parts = [x[first : first + some] for first in range(0, x.shape[0], some)]
        return torch.cat([_transposed(x, weight, bias, windows, sizes, matmul) for x in parts])
    if any(windows.padding):
        x = F.pad(x, [pad for pad in reversed(windows.padding) for _ in range(2)])
    if weight.shape[1] == 1 and weight.shape[0] // windows.groups < _FEW_FILTERS:
        return _by_taps(x, weight, bias, windows)
    return _by_products(x, weight, bias, windows, matmul)


# ---- One product a window ------------------------------------------------------------------------


def _by_products(
    x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows, matmul: MatMul
) -> Tensor:
    groups, count, rank = windows.groups, weight[0].numel(), weight.dim() - 2
    views = _views(x, weight, windows)
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

    sizes = (x.shape[0], *views.shape[2 : 2 + rank])
    copied = math.prod(views.shape[1:]) * views.element_size()
    blocks = list(_blocks(sizes, copied, _BLOCK_BYTES))
    if len(blocks) == 1:
        return results(views).contiguous()
    out = x.new_empty(*sizes, weight.shape[0])
    for block in blocks:
        out[block] = results(views[(block[0], slice(None), *block[1:])])
    return out


def _views(x: Tensor, weight: Tensor, windows: Windows) -> Tensor:
    """A view (N, C, *S', *K) of a padded input."""
    every = zip(weight.shape[2:], windows.stride, windows.dilation, strict=True)
    for dim, (size, step, gap) in enumerate(every):
        x = x.unfold(2 + dim, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def _blocks(sizes: Sequence[int], sample_bytes: int, limit: int) -> Iterator[Any]:
    """Indices of parts of the samples, and of the longest dim after them, of `limit` bytes each."""
    samples, *spatial = sizes
    some = max(1, limit // sample_bytes)
    longest = max(spatial)
    lines = longest if sample_bytes <= limit else max(1, limit * longest // sample_bytes)
    at = spatial.index(longest)
    for sample in range(0, samples, some):
        for first in range(0, longest, lines):
            index = [slice(None)] * len(spatial)
            index[at] = slice(first, first + lines)
            yield (slice(sample, sample + some), *index)


# ---- One sum of taps a result --------------------------------------------------------------------


def _by_taps(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows) -> Tensor:
    """Few filters a channel: sums of shifted inputs."""
    single, rank = wide(x.dtype), weight.dim() - 2
    values = _last(x, weight.shape[0])
    shifts = _views(values.movedim(-1, 1), weight, windows).movedim(1, 1 + rank)
    out = x.new_empty(shifts.shape[: 2 + rank])
    taps = [(place, weight.to(single)[place][:, 0].contiguous()) for place in _places(weight)]
    sample = math.prod(out.shape[1:]) * values.element_size()
    limit = _CACHED_BYTES if x.device.type == "cpu" else _BLOCK_BYTES
    for block in _blocks(out.shape[:-1], sample, limit):
        part = shifts[block]
        total = part[taps[0][0]] * taps[0][1]
        term = torch.empty_like(total)  # once: fresh memory costs more than the product
        for place, factors in taps[1:]:
            total += torch.mul(part[place], factors, out=term)
        if bias is not None:
            total += bias.to(single)
        out[block] = total
    return out


def _places(weight: Tensor) -> Iterator[Any]:
    """The taps in order, as indices of the last dims."""
    return ((..., *tap) for tap in itertools.product(*map(range, weight.shape[2:])))


def _last(x: Tensor, channels: int) -> Tensor:
    """The input (N, *S, channels), every channel as often as filters read it."""
    values = x.movedim(1, -1).to(wide(x.dtype), memory_format=torch.contiguous_format)
    copies = channels // x.shape[1]
    return values.repeat_interleave(copies, -1) if copies > 1 else values


# ---- Transposed ----------------------------------------------------------------------------------


def _transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    windows: Windows,
    sizes: Sequence[int],
    matmul: MatMul,
) -> Tensor:
    """What every element gives each tap, added where it falls."""
    single, channels = wide(x.dtype), weight.shape[1] * windows.groups
    reach = zip(x.shape[2:], weight.shape[2:], windows.stride, windows.dilation, strict=True)
    whole = [(s - 1) * t + d * (k - 1) + 1 for s, k, t, d in reach]
    ends = [pad + size for pad, size in zip(windows.padding, sizes, strict=True)]
    total = x.new_zeros(x.shape[0], *map(max, whole, ends), channels, dtype=single)
    for tap, term in _terms(x, weight, windows.groups, matmul):
        every = zip(tap, windows.dilation, windows.stride, x.shape[2:], strict=True)
        at: Any = tuple(slice(k * d, k * d + (s - 1) * t + 1, t) for k, d, t, s in every)
        total[(slice(None), *at)] += term
    inside: Any = tuple(slice(p, end) for p, end in zip(windows.padding, ends, strict=True))
    made = total[(slice(None), *inside)]
    if bias is not None:
        made += bias.to(single)
    return made.to(x.dtype).contiguous()


def _terms(
    x: Tensor, weight: Tensor, groups: int, matmul: MatMul
) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(tap, what all elements give it: (N, *S, O) unrounded), in the order of the taps."""
    inside, outside = weight.shape[0] // groups, weight.shape[1]
    taps = list(itertools.product(*map(range, weight.shape[2:])))
    if inside == 1 and outside < _FEW_FILTERS:
        values, factors = _last(x, outside * groups), weight.to(wide(x.dtype)).flatten(2)
        for place, tap in enumerate(taps):
            yield tap, values * factors[..., place].flatten()
        return
    rows = x.movedim(1, -1).reshape(-1, groups, inside).transpose(0, 1).contiguous()
    shape = (x.shape[0], *x.shape[2:], groups * outside)
    filters = weight.reshape(groups, inside, outside, -1)
    several = max(1, _COLUMNS // outside)
    for first in range(0, len(taps), several):
        some = filters[..., first : first + several].transpose(2, 3).flatten(2)
        made = _product(rows, some.contiguous(), matmul)
        made = made.view(groups, len(rows[0]), -1, outside).permute(2, 1, 0, 3)
        for tap, term in zip(taps[first:], made, strict=False):
            yield tap, term.reshape(shape)


def _product(rows: Tensor, filters: Tensor, matmul: MatMul) -> Tensor:
    """(G, M, K) @ (G, K, N) unrounded; of one group as a product of two matrices."""
    out_dtype = wide(rows.dtype)
    if len(rows) == 1:
        return matmul(rows[0], filters[0], None, out_dtype=out_dtype).unsqueeze(0)
    return matmul(rows, filters, None, out_dtype=out_dtype)
