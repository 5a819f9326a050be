"""What the GPU kernels share: one reduction tree, and how the rows of a tensor are addressed.

The tree is a function of hidden alone, so every schedule of `triton.row` and `cuda.row`, and the
two kernels themselves, give the same bits:

    lanes = hidden rounded up to a power of two, at least 8 and at most 8192; the row is cut into
    chunks of that many elements, and each chunk into units of 8
    in a unit, squares are added nearest first: ((0+1)+(2+3))+((4+5)+(6+7))
    unit u adds what it has in each chunk, in order of the chunks, starting from +0
    then unit u takes unit u + 1 for even u, the survivors again by pairs, up to the top
    absent elements count as +0

A square of a 16-bit value is exact in float32, so a fused multiply-add that adds it gives the same
bits; a square of a float32 value is rounded first, as the spec says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fxpass.spec import NormSpec

VECTOR = 8
"""Consecutive elements of one thread: 16 bytes of a 16-bit dtype."""
MOST_LANES = 8192
LEADING = 2
"""Leading dims, adjacent ones merged, that a kernel can address."""
REDUCTION = (
    "a binary tree, nearest elements first, over chunks of up to 8192 elements; between chunks each"
    " unit of 8 elements is added in order"
)


def lanes(hidden: int) -> int:
    """Number of lanes of the reduction tree: a power of two in [8, 8192]."""
    return min(MOST_LANES, max(VECTOR, 1 << (hidden - 1).bit_length()))


def moved(spec: NormSpec, hidden: int) -> int:
    """Bytes of one row that have to be read and written."""
    dtypes = [spec.x, spec.residual, spec.out, spec.normed if "sum" in spec.outputs else None]
    return hidden * sum(dtype.itemsize for dtype in dtypes if dtype is not None)


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
    zeros = [0 for _ in strides]
    if any(same(size, 0) for size in shape[:-1]):
        return Rows(0, 1, tuple(zeros), tuple(zeros))
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
    single = [1, *zeros]
    # One leading dim is the outer one: Triton then drops the division by an inner of 1.
    outer, inner = [*merged, single, single][:2]
    return Rows(outer[0] * inner[0], inner[0], tuple(outer[1:]), tuple(inner[1:]))


def dense(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
