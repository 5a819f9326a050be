"""Attention on a CPU, made of the product and the exponentials that depend on one row alone.

A score is a row of q times a key (mm_cpu), scaled, then masked. The sum of the exponentials follows
the tree of cpu_row.h, and the product with v passes over keys whose probability is 0. Both are
prefix-stable: a row's bits depend on the keys up to the last that its mask lets in. So decode and
prefill of one position agree, and masked keys change nothing, even when they hold NaN.
"""

from __future__ import annotations

import math
import struct

import torch

from fxpass.dtypes import wide
from fxpass.kernels.invariant import cpu_library, mm_plain, reduce_plain
from fxpass.kernels.invariant.cpu_library import TYPES
from fxpass.kernels.invariant.mm_cpu import product

Tensor = torch.Tensor

_FORMAT = struct.Struct("4P 6q 4q 3q d")  # FxScores of attention_cpu.h
_SCRATCH = 16 << 20  # bytes of scores at a time
_CAUSAL_ROWS = 128  # more rows at a time would compute more scores that no row may see


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product attention. Not differentiable.

    Args:
        q: (B, Hq, Lq, D), bf16, fp16, fp32 or fp64, any strides.
        k: (B, Hkv, Lk, D), Hq a multiple of Hkv, q's dtype, any strides.
        v: (B, Hkv, Lk, Dv) like `k`.
        mask: Bool (True lets a key in) or added to the scores; broadcasts to (B, Hq, Lq, Lk). An
            added -inf masks a key; finfo.min is a number like others.
        causal: Query i sees the keys up to i.
        scale: Of the scores; None is 1 / sqrt(D).

    Returns:
        (B, Hq, Lq, Dv) in q's dtype and the logsumexp (B, Hq, Lq) in float32, float64 for fp64. A
        row that may see no key is 0 in both, as in torch's CPU kernel.

    Raises:
        ValueError: Shapes or dtypes that do not fit.
    """
    _check(q, k, v)
    batch, heads, length, _ = q.shape
    keys = k.shape[2]
    dtype = wide(q.dtype)
    out = q.new_zeros(batch, heads, length, v.shape[3])
    logs = torch.zeros(batch, heads, length, dtype=dtype)
    if logs.numel() == 0 or keys == 0:
        return out, logs
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(dtype)
        mask = mask.expand(batch, heads, length, keys)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    one_row = heads * keys * dtype.itemsize
    batches = max(1, min(batch, _SCRATCH // one_row))
    rows = max(1, min(_CAUSAL_ROWS if causal else length, _SCRATCH // (one_row * batches)))
    for b in range(0, batch, batches):
        some = slice(b, b + batches)
        masks = None if mask is None else mask[some]
        for first in range(0, length, rows):
            _block(
                q[some, :, first : first + rows], k[some], v[some], masks,
                out[some], logs[some], first, causal, scale,
            )  # fmt: skip
    return out, logs


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    logs: Tensor,
    first: int,
    causal: bool,
    scale: float,
) -> None:
    """Write the rows `first` and following of `out` and `logs`: those of `q`."""
    batch, heads, rows, size = q.shape
    groups = k.shape[1]
    last = first + rows
    if causal:
        k, v = k[:, :, :last], v[:, :, :last]
    # The heads that share keys are rows of one product.
    shared = q.reshape(batch, groups, heads // groups * rows, size)
    scores = product(shared, k.transpose(2, 3), out_dtype=wide(q.dtype))
    keys = k.shape[2]
    sums = _exponentials(scores.view(batch, heads, rows, keys), logs, mask, first, causal, scale)
    divisor = sums.view(batch, groups, -1)
    found = product(scores, v, out_dtype=out.dtype, divisor=divisor, skip_zeros=True)
    out[:, :, first:last] = found.view(batch, heads, rows, v.shape[3])


def _exponentials(
    scores: Tensor, logs: Tensor, mask: Tensor | None, first: int, causal: bool, scale: float
) -> Tensor:
    """The sums of the exponentials that `scores` (B, H, rows, keys) becomes; fills in `logs`."""
    sums = torch.empty(scores.shape[:-1], dtype=scores.dtype)
    run = cpu_library.library("scores", scores.dtype)
    if run is None:
        _plain_exponentials(scores, sums, logs, mask, first, causal, scale)
        return sums
    run(
        _FORMAT.pack(
            scores.data_ptr(),
            sums.data_ptr(),
            logs.data_ptr(),
            0 if mask is None else mask.data_ptr(),
            *scores.shape,
            *(logs.shape[2], first),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            *(mask is not None and mask.dtype == torch.bool, causal),
            cpu_library.threads(scores.numel()),
            scale,
        )
    )
    return sums


def _plain_exponentials(
    scores: Tensor,
    sums: Tensor,
    logs: Tensor,
    mask: Tensor | None,
    first: int,
    causal: bool,
    scale: float,
) -> None:
    """As attention_cpu.h, in elementwise torch: same bits."""
    rows, keys = scores.shape[2:]
    last = first + rows
    scores.mul_(scale)
    if mask is not None:
        part = mask[:, :, first:last, :keys]
        shut = ~part if part.dtype == torch.bool else part == -math.inf
        scores.add_(0.0 if part.dtype == torch.bool else part).masked_fill_(shut, -math.inf)
    if causal:
        later = torch.arange(keys) > torch.arange(first, last)[:, None]
        scores.masked_fill_(later, -math.inf)
    flat = scores.view(-1, keys)
    shift = torch.where(flat.isnan(), -math.inf, flat).amax(-1)
    shift.masked_fill_(shift == -math.inf, 0.0)
    flat.copy_(reduce_plain.exponential(flat - shift[:, None]))
    total = reduce_plain.summed(flat)
    sums.copy_(torch.where(total == 0, 1.0, total).view(sums.shape))
    found = torch.where(total == 0, 0.0, shift + reduce_plain.logarithm(total))
    logs[:, :, first:last] = mm_plain.one_nan(found.view(sums.shape))


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)) or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"needs (batch, heads, length, size) with k and v alike: {shapes}")
    heads_fit = k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not heads_fit:
        raise ValueError(f"q does not fit k: {shapes}")
    if q.dtype not in TYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"needs one float dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
