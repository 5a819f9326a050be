"""What the GPU kernels share: one reduction tree, and how the rows of a tensor are addressed.

The tree is a function of hidden alone, so every schedule of `triton.row` and `cuda.row`, and the
two kernels themselves, give the same bits:

    lanes = hidden rounded up to a power of two, at least 8 and at most 2048
    element i belongs to lane i % lanes, which adds its squares in order of i, starting from the
    first one; then lane j takes lane j + 1 for even j, the survivors again by pairs, up to the top
    (distances 1, 2, 4, ... lanes / 2). Absent elements count as +0.

A square of a 16-bit value is exact in float32, so adding it is one fused multiply-add; a square of
a float32 value is rounded first, as the spec says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

VECTOR = 8
"""Consecutive elements of one thread: 16 bytes of a 16-bit dtype."""
MOST_LANES = 2048
LEADING = 2
"""Leading dims, adjacent ones merged, that a kernel can address."""
REDUCTION = (
    "lanes = hidden rounded up to a power of two, at most 2048 (element i in lane i % lanes),"
    " squares added in order within a lane, then a binary tree over the lanes, nearest first"
)


def lanes(hidden: int) -> int:
    """Number of lanes of the reduction tree: a power of two in [8, 2048]."""
    return min(MOST_LANES, max(VECTOR, 1 << (hidden - 1).bit_length()))


@dataclass(frozen=True)
class Rows:
    """Row r of tensor t starts at element (r // inner) * outer[t] + (r % inner) * step[t]."""

    count: Any
    inner: Any
    outer: tuple[Any, ...]
    step: tuple[Any, ...]


def address(
    shape: Sequence[Any], strides: Sequence[Sequence[Any]], same: Any = lambda a, b: a == b
) -> Rows | None:
    """How to address the rows of tensors of one shape, or None if they need a copy first.

    shape: (..., hidden). strides: one per tensor, in elements. Sizes may be symbolic: `same` says
    whether two are known to be equal. None: last stride not 1, or more than two leading dims left
    after merging.
    """
    if any(not (same(stride[-1], 1) or same(shape[-1], 1)) for stride in strides):
        return None
    merged: list[list[Any]] = []  # [size, stride of each tensor]
    for dim, size in enumerate(shape[:-1]):
        if same(size, 1):
            continue
        steps = [stride[dim] for stride in strides]
        if merged and all(
            same(old, new * size) for old, new in zip(merged[-1][1:], steps, strict=True)
        ):
            merged[-1] = [merged[-1][0] * size, *steps]
        else:
            merged.append([size, *steps])
    if len(merged) > LEADING:
        return None
    zeros = [1, *(0 for _ in strides)]
    outer, inner = [zeros, zeros, *merged][-2:]
    return Rows(outer[0] * inner[0], inner[0], tuple(outer[1:]), tuple(inner[1:]))
