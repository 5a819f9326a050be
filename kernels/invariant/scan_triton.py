# ruff: noqa: N803 - constants are uppercase, constant conditions stand alone
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,import-untyped"
"""Running sums along a row in Triton, whose bits depend on the elements up to each place.

A row is cut into blocks of `BLOCK` elements. In a block, at level w = 1, 2, 4, ... every run of 2w
elements has its left half done; the right half's elements each add the left half's last one. To an
element's sum in its block is then added the carry: the last sum of the block before, 0 at first.

`tl.associative_scan` adds in an order that follows the layout. Here the one value that is handed on
is picked by a sum with zeros, which is exact in any order.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 2048
"""Elements of a block: part of the meaning, so the same for every length."""


@triton.jit
def _block(y, LEVELS: tl.constexpr):
    """Running sums of each row of (rows, 2**LEVELS)."""
    rows: tl.constexpr = y.shape[0]
    size: tl.constexpr = y.shape[1]
    half = tl.arange(0, 2)[None, None, :, None]
    for level in tl.static_range(LEVELS):
        runs = tl.reshape(y, [rows, size // (2 << level), 2, 1 << level])
        place = tl.arange(0, 1 << level)[None, None, None, :]
        last = tl.sum(tl.where(place == (1 << level) - 1, runs, 0.0), axis=3, keep_dims=True)
        left = tl.sum(tl.where(half == 0, last, 0.0), axis=2, keep_dims=True)
        y = tl.reshape(tl.where(half == 1, runs + left, runs), [rows, size])
    return y


@triton.jit(do_not_specialize=["rows"])
def row_cumsum(
    x, out, rows, size, inner, x_outer, x_step,
    ROWS: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Arguments as in `reduce_triton`; blocks of 2**LEVELS elements, BLOCK unless a row is less."""
    dtype = tl.float64 if WIDE else tl.float32
    length: tl.constexpr = 1 << LEVELS
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, length)[None, :]
    x += (r // inner).to(tl.int64) * x_outer + (r % inner).to(tl.int64) * x_step
    out += r.to(tl.int64) * size
    carry = tl.zeros([ROWS, 1], dtype)
    for start in range(0, size, length):
        there = (r < rows) & (start + lane < size)
        v = tl.load(x + start + lane, mask=there, other=0.0).to(dtype)
        y = carry + _block(v, LEVELS)
        tl.store(out + start + lane, y.to(out.dtype.element_ty), mask=there)
        carry = tl.sum(tl.where(lane == length - 1, y, 0.0), axis=1, keep_dims=True)
