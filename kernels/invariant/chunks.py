"""The order in which a product's sums are added: a function of K, N and dtype alone.

`sum_k a[m, k] * b[k, n]` is cut into chunks of `mm_chunk(K, N, dtype)` elements of K, from 0 on;
the last may be shorter. Inside a chunk a float32 accumulator starts at zero and takes the products
in order of k, in the groups that the device's matrix instruction adds at once (one at a time for
true float32). The chunks' sums are then added in order, starting from zero. Zeros after the last k
change nothing, so a chunk may be walked in blocks of any length that divides `UNIT`.

Nothing here depends on the number of rows: tile shapes, the split of chunks over programs, strides
and alignment decide only when and where a sum is made, never which.
"""

from __future__ import annotations

import torch

UNIT = 128
"""Every chunk is a multiple of this, and every block of K divides it."""
BATCHED_CHUNK = 1024
"""For products of matrices in a batch: independent of K, so that rows keep their bits when zeros
are appended to K, as attention over a growing cache needs it."""

_WIDE = 2048
"""From this many columns on tiles of 16 columns alone keep a large GPU busy: one chunk, which is
fastest for many rows."""
_FILLED_BY = 4096
"""Chunks times columns to aim at below that."""
_SHORTEST = 1024


def mm_chunk(k: int, n: int, dtype: torch.dtype, *, batched: bool = False) -> int:
    """Length of a chunk of K.

    Args:
        k: length of the sums.
        n: columns of the result.
        dtype: of the operands; all have the same rule so far.
        batched: the operands are three-dimensional.

    Returns:
        A multiple of `UNIT`; at least k if there is one chunk.
    """
    if batched:
        return BATCHED_CHUNK
    parts = 1 if n >= _WIDE else _FILLED_BY // max(1, n)
    return max(_SHORTEST, _up(-(-k // parts)))


def _up(length: int) -> int:
    return -(-length // UNIT) * UNIT
