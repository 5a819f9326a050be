"""The plain persistent product that public batch-invariant libraries use, from its description.

Tiles of 128 x 128, 64 of K at a time, 8 warps, 3 stages, as many programs as multiprocessors, each
walking tiles in groups of 8 rows; one float32 sum from the first k to the last; pointers only.
"""

# ruff: noqa: N803 - constants are uppercase

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    a,
    b,
    out,
    m,
    n,
    k,
    a_row,
    a_col,
    b_row,
    b_col,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles_m = tl.cdiv(m, BLOCK)
    tiles_n = tl.cdiv(n, BLOCK)
    steps = tl.cdiv(k, BLOCK_K)
    inner = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first, GROUP)
        row = (first + tile % (GROUP * tiles_n) % height) * BLOCK
        col = tile % (GROUP * tiles_n) // height * BLOCK
        rows = row + tl.arange(0, BLOCK)
        cols = col + tl.arange(0, BLOCK)
        if WIDE:
            rows = rows.to(tl.int64)
            cols = cols.to(tl.int64)
        safe_rows = tl.max_contiguous(tl.multiple_of(tl.where(rows < m, rows, 0), BLOCK), BLOCK)
        safe_cols = tl.max_contiguous(tl.multiple_of(tl.where(cols < n, cols, 0), BLOCK), BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for step in range(steps):
            at = step * BLOCK_K + inner
            left = k - step * BLOCK_K
            x_at = a + safe_rows[:, None] * a_row + at[None, :] * a_col
            y_at = b + at[:, None] * b_row + safe_cols[None, :] * b_col
            x = tl.load(x_at, mask=inner[None, :] < left, other=0.0)
            y = tl.load(y_at, mask=inner[:, None] < left, other=0.0)
            total = tl.dot(x, y, total)
        ok = (rows[:, None] < m) & (cols[None, :] < n)
        at = out + rows.to(tl.int64)[:, None] * n + cols[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=ok)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product of a (M, K) and b (K, N), bfloat16."""
    (m, k), n = a.shape, b.shape[1]
    out = torch.empty(m, n, device=a.device, dtype=a.dtype)
    tiles = -(-m // 128) * -(-n // 128)
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count
    launch: Any = _kernel[(min(tiles, processors),)]
    wide = max(a.numel(), b.numel()) >= 2**31
    sizes = (m, n, k, *a.stride(), *b.stride())
    launch(a, b, out, *sizes, BLOCK=128, BLOCK_K=64, GROUP=8, WIDE=wide, num_warps=8, num_stages=3)
    return out
