# ruff: noqa: N803 - constants are uppercase, constant conditions stand alone
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,import-untyped"
"""Forward substitution in Triton, with the bits of `solve.by_columns`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def solve_lower(
    a, b, out, size, columns,
    UNIT: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for COLUMNS right-hand sides of one of the contiguous matrices.

    a (B, size, size); b and out (B, size, columns); size at most SIZE.
    """
    parts = (columns + COLUMNS - 1) // COLUMNS
    matrix = (tl.program_id(0) // parts).to(tl.int64)
    row = tl.arange(0, SIZE)[:, None]
    column = tl.program_id(0) % parts * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < size) & (column < columns)
    a += matrix * size * size
    place = matrix * size * columns + row * columns + column
    x = tl.load(b + place, mask=there, other=0.0)
    for j in range(size):
        left = tl.load(a + row * size + j, mask=(row >= j) & (row < size), other=0.0)
        # A sum with zeros: exact in any order, and of no other row.
        found = tl.sum(tl.where(row == j, x, 0.0), axis=0, keep_dims=True)
        if not UNIT:
            pivot = tl.sum(tl.where(row == j, left, 0.0), axis=0, keep_dims=True)
            found = found / pivot if x.dtype == tl.float64 else tl.div_rn(found, pivot)
        x = tl.where(row == j, found, tl.where(row > j, x - left * found, x))
    tl.store(out + place, x, mask=there)
