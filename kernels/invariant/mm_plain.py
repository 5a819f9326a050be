"""The CPU product where no kernel can be built: elementwise torch, correct and slow.

The order is that of mm_cpu.h, with a product and a sum in place of each fused multiply-add, so rows
are as independent as there but the bits differ.
"""

from __future__ import annotations

import torch

from fxpass.dtypes import wide

_CHUNK = 256  # as in mm_cpu.h


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
    beta: float,
    divisor: torch.Tensor | None,
    skip_zeros: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """As mm_cpu.product."""
    dtype = wide(b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    k = a.shape[-1]
    total = _chunk(a[..., :_CHUNK], b[..., :_CHUNK, :], skip_zeros)
    for start in range(_CHUNK, k, _CHUNK):
        end = min(start + _CHUNK, k)
        total += _chunk(a[..., start:end], b[..., start:end, :], skip_zeros)
    total *= alpha
    total += 0.0 if bias is None else beta * bias
    if divisor is not None:
        total /= divisor[..., None]
    return one_nan(total.to(out_dtype))


def one_nan(x: torch.Tensor) -> torch.Tensor:
    """`x` with every NaN of one bit pattern, as `stored` of cpu_words.h."""
    return x.masked_fill_(x.isnan(), torch.nan)


def _chunk(a: torch.Tensor, b: torch.Tensor, skip_zeros: bool) -> torch.Tensor:
    total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=a.dtype)
    for k in range(a.shape[-1]):
        factor = a[..., k : k + 1]
        term = factor * b[..., k : k + 1, :]
        if skip_zeros:
            term.masked_fill_(factor == 0, 0.0)
        total += term
    return total
