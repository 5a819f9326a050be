"""Scaled dot-product attention: ATen's overloads of it over one kernel."""

from __future__ import annotations

from typing import Any

import torch

from fxpass.invariant.aten import is_empty
from fxpass.kernels.invariant import dispatch
from fxpass.torch_private import statically_known_true

Tensor = torch.Tensor
_LSE_MULTIPLE = 32
"""The memory-efficient backward reads logsumexp in rows padded to this."""


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """(out, logsumexp); out is dense in the order batch, length, head, dim, as torch's are."""
    out, lse = dispatch.attention(query, key, value, mask, causal=is_causal, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def like_query(out: Tensor, query: Tensor) -> Tensor:
    """A result of `attend` in the memory order that torch's CPU kernel gives it: the query's."""
    as_is = query.shape[-1] == out.shape[-1] and query.stride(-1) == 1
    heads_first = statically_known_true(query.stride(1) > query.stride(2))
    return out if as_is and not heads_first else out.contiguous()


def fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> bool:
    """Whether the kernel takes these arguments, and torch would."""
    if dropout_p or (is_causal and mask is not None):
        return False
    tensors = (query, key, value)
    if any(t.dim() != 4 or not dispatch.takes(t, product=True) or is_empty(t) for t in tensors):
        return False
    same = all(
        (t.dtype, t.device, t.shape[0]) == (query.dtype, query.device, query.shape[0])
        for t in tensors
    )
    if not same or query.shape[-1] != key.shape[-1] or key.shape[1:3] != value.shape[1:3]:
        return False
    if query.shape[1] % key.shape[1]:
        return False
    return mask is None or mask_fits(mask, query, key)


def mask_fits(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask broadcasts to (batch, heads, query length, key length)."""
    full = (*query.shape[:3], key.shape[2])
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    known = mask.dtype == torch.bool or mask.dtype in (query.dtype, torch.float32)
    return known and 2 <= mask.dim() <= 4 and all(s in (1, t) for s, t in sizes)


def flash_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Any:
    """(out, logsumexp (B, H, L))."""
    if not fits(query, key, value, attn_mask, dropout_p, is_causal):
        return NotImplemented
    out, lse = attend(query, key, value, attn_mask, is_causal, scale)
    return like_query(out, query), lse


def efficient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """(out, padded logsumexp, seed, offset)."""
    if not fits(query, key, value, attn_bias, dropout_p, is_causal):
        return NotImplemented
    out, lse = attend(query, key, value, attn_bias, is_causal, scale)
    seed = torch.zeros((), dtype=torch.long, device=query.device)
    return out, padded(lse) if compute_log_sumexp else lse[..., :0], seed, seed.clone()


def padded(lse: Tensor) -> Tensor:
    """Logsumexp as the memory-efficient backward reads it: padded with infinity."""
    missing = -lse.shape[-1] % _LSE_MULTIPLE
    if isinstance(missing, int) and not missing:
        return lse
    return torch.nn.functional.pad(lse, (0, missing), value=float("inf"))


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """(out, logsumexp, None, None, max_q, max_k, rng state, unused, debug mask)."""
    if return_debug_mask or not fits(query, key, value, None, dropout_p):
        return NotImplemented
    out, lse = attend(query, key, value, None, is_causal, scale)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused, debug = (
        torch.empty(0, dtype=d, device=query.device) for d in (torch.uint64, out.dtype)
    )
    return out, lse, None, None, query.shape[2], key.shape[2], state, unused, debug


def cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> Any:
    """(out, nothing, None, None, max_q, max_k, seed, offset, debug mask).

    Only without logsumexp: cuDNN's backward needs what cuDNN's own forward saved.
    """
    if compute_log_sumexp or return_debug_mask:
        return NotImplemented
    if not fits(query, key, value, attn_bias, dropout_p, is_causal):
        return NotImplemented
    out, lse = attend(query, key, value, attn_bias, is_causal, scale)
    seed = torch.zeros((), dtype=torch.long, device=query.device)
    debug = torch.empty(0, dtype=out.dtype, device=query.device)
    sizes = (query.shape[2], key.shape[2])
    return out, lse[..., :0], None, None, *sizes, seed, seed.clone(), debug
