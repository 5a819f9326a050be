"""`fxpass::bi_attention`: attention with a gradient, and what F.scaled_dot_product_attention is.

One operator for all devices, masks and head counts: torch's own choice between its kernels follows
strides, gradients and the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxpass import torch_dispatcher
from fxpass.dtypes import wide
from fxpass.invariant import attention_grad
from fxpass.invariant.aten import aten
from fxpass.invariant.attention import attend, fits, like_query, padded

Tensor = torch.Tensor

_library: Any = getattr(torch.library, "Library")("fxpass", "FRAGMENT")  # noqa: B009 - untyped


def scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """F.scaled_dot_product_attention. Differentiable.

    With dropout, a mask beside `is_causal`, or other ranks than four, torch's own runs; without
    dropout that is made of products and softmax. So it does under torch.func and forward-mode
    derivatives, which an operator of a library does not have.
    """
    if torch_dispatcher.is_transformed():
        return NotImplemented
    if query.dim() != 4 or not (enable_gqa or query.shape[1] == key.shape[1]):
        return NotImplemented
    if not fits(query, key, value, attn_mask, dropout_p, is_causal):
        return NotImplemented
    out = OPERATOR(query, key, value, attn_mask, is_causal, scale)[0]
    return like_query(out, query) if query.device.type == "cpu" else out


def fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Shapes, dtypes and strides of `attend`."""
    batch, heads, length = query.shape[:3]
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    return out, query.new_empty(batch, heads, length, dtype=wide(query.dtype))


def _setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.is_causal, ctx.scale = inputs[4:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    """Gradients by torch's own kernel where it takes the tensors, else written out."""
    query, key, value, mask, out, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 6
    if grad is None:
        grad = torch.zeros_like(out)
    groups = query.shape[1] // key.shape[1]
    wide_key, wide_value = (
        t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value)
    )
    saved = (query, wide_key, wide_value, mask, out, lse)
    wants_mask = mask is not None and ctx.needs_input_grad[3]
    plain = query.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
    plain = plain and not wants_mask and grad_lse is None and not torch.is_grad_enabled()
    if plain and query.device.type == "cpu":
        found = _flash_for_cpu(grad, saved, ctx)
    elif plain and mask is None and query.device.type == "cuda":
        found = _efficient(grad, saved, ctx)
    else:
        found = _written_out(grad, saved, ctx, wants_mask, grad_lse)
    grad_query, grad_key, grad_value, grad_mask = found
    grad_key, grad_value = (
        t.unflatten(1, (-1, groups)).sum(2) if groups > 1 else t for t in (grad_key, grad_value)
    )
    return grad_query, grad_key, grad_value, grad_mask, None, None


Saved = tuple[Tensor, Tensor, Tensor, "Tensor | None", Tensor, Tensor]


def _flash_for_cpu(grad: Tensor, saved: Saved, ctx: Any) -> tuple[Any, ...]:
    query, key, value, mask, out, lse = saved
    if mask is not None:
        mask = _added(mask, query, key)
    made = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, ctx.is_causal, attn_mask=mask, scale=ctx.scale
    )
    return (*made, None)


def _added(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as torch's CPU kernel takes it: added to the scores, of four dims."""
    if mask.dtype == torch.bool:
        kept = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
        mask = kept.masked_fill(mask.logical_not(), float("-inf"))
    mask = mask[(None,) * (4 - mask.dim())]
    return mask.expand(*mask.shape[:2], query.shape[2], key.shape[2])


def _efficient(grad: Tensor, saved: Saved, ctx: Any) -> tuple[Any, ...]:
    query, key, value, _, out, lse = saved
    seed = torch.zeros((), dtype=torch.long, device=query.device)
    made = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, key, value, None, out, padded(lse), seed, seed, 0.0,
        [True, True, True, False], ctx.is_causal, scale=ctx.scale,
    )  # fmt: skip
    return (*made[:3], None)


def _written_out(
    grad: Tensor, saved: Saved, ctx: Any, wants_mask: bool, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    """Of operators that have gradients themselves."""
    mask = saved[3]
    *made, scores = attention_grad.gradients(
        (grad, *saved[:3], *saved[4:]), mask, ctx.is_causal, ctx.scale,
        product=torch.matmul, row_sum=lambda x: x.sum(-1, keepdim=True), grad_lse=grad_lse,
    )  # fmt: skip
    if wants_mask and mask is not None:
        return *made, scores.sum_to_size(mask.shape).to(mask.dtype)
    return *made, None


def _define() -> Any:
    _library.define(
        "bi_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal,"
        " float? scale) -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.impl("bi_attention", attend, "CompositeExplicitAutograd")
    torch.library.register_fake("fxpass::bi_attention", fake, lib=_library)
    backward, setup = torch_dispatcher.untraced(_backward), torch_dispatcher.untraced(_setup)
    torch.library.register_autograd(
        "fxpass::bi_attention", backward, setup_context=setup, lib=_library
    )
    return torch.ops.fxpass.bi_attention.default


OPERATOR = _define()
