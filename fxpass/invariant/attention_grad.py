"""Gradients of attention, written out as products of one head after another.

torch's CPU kernel multiplies by a vendor's small products, whose last bit follows alignment and the
number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fxpass.invariant.attention import fits
from fxpass.kernels.invariant import dispatch
from fxpass.torch_dispatcher import is_traced

Tensor = torch.Tensor

_SCRATCH = 1 << 24
"""Elements of the scores at a time."""


def flash_for_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """(grad_query, grad_key, grad_value), dense in torch's order: batch, length, head, dim."""
    if not fits(query, key, value, attn_mask, dropout_p, is_causal):
        return NotImplemented
    if key.shape[1] != query.shape[1] or grad_out.dtype != query.dtype:
        return NotImplemented
    saved = (grad_out, query, key, value, out, logsumexp)
    if is_traced():
        return _of_part(saved, attn_mask, is_causal, scale)
    made = tuple(torch.empty_permuted(t.shape, (0, 2, 1, 3), dtype=t.dtype) for t in saved[1:4])
    for part in _parts(query, key):
        mask = None if attn_mask is None else _cut(attn_mask, part)
        found = _of_part([t[part] for t in saved], mask, is_causal, scale)
        for whole, some in zip(made, found, strict=True):
            whole[part] = some
    return made


def gradients(
    saved: Any,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    *,
    product: Callable[[Tensor, Tensor], Tensor],
    row_sum: Callable[[Tensor], Tensor],
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of query, key and value, in their dtype, and of the scores, in logsumexp's.

    Args:
        saved: The gradient of the result, query, key, value (all with as many heads), the result
            and logsumexp, whose dtype is computed in.
        mask: As attention's.
        is_causal: As attention's.
        scale: As attention's.
        product: Of two (B, H, ., .) tensors.
        row_sum: Over the last dim, which stays.
        grad_lse: The gradient of logsumexp, if there is one.
    """
    lse, dtype = saved[5], saved[1].dtype
    d, q, k, v, o = (t.to(lse.dtype) for t in saved[:5])
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = _masked(product(q, k.mT) * scale, mask, is_causal)
    weights = torch.where(lse.isfinite()[..., None], (scores - lse[..., None]).exp(), 0.0)
    inner = product(d, v.mT) - row_sum(d * o)
    if grad_lse is not None:
        inner = inner + grad_lse[..., None]
    grad_scores = weights * inner
    grad_query = product(grad_scores, k) * scale
    grad_key = product(grad_scores.mT, q) * scale
    grad_value = product(weights.mT, d)
    return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), grad_scores


def _masked(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(mask.logical_not(), float("-inf"))
    return scores + mask


def _of_part(
    saved: Any, mask: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, ...]:
    return gradients(saved, mask, is_causal, scale, product=_product, row_sum=_row_sum)[:3]


def _product(a: Tensor, b: Tensor) -> Tensor:
    made = dispatch.matmul(a.flatten(0, 1), b.flatten(0, 1))
    return made.view(*a.shape[:2], *made.shape[1:])


def _row_sum(x: Tensor) -> Tensor:
    return dispatch.row_sum(x, dtype=x.dtype).unsqueeze(-1)


def _parts(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice]]:
    """Batches and heads to do at a time."""
    batch, heads = query.shape[:2]
    size = query.shape[2] * key.shape[2]
    some_heads = max(1, min(heads, _SCRATCH // size))
    some = max(1, _SCRATCH // (size * heads))
    for first in range(0, batch, some):
        for head in range(0, heads, some_heads):
            yield slice(first, first + some), slice(head, head + some_heads)


def _cut(mask: Tensor, part: tuple[slice, slice]) -> Tensor:
    """The part of a mask for some batches and heads, where it has these dims."""
    sizes = mask.shape[:-2]
    given = part[len(part) - len(sizes) :]
    return mask[tuple(s if n > 1 else slice(None) for s, n in zip(given, sizes, strict=True))]
