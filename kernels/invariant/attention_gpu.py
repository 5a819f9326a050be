"""Attention on a GPU; the bits of a query row depend on it and on the keys its mask lets in.

So a decoded token and the same position of a causal prefill agree, and padding that is masked out,
by False or -inf, changes nothing, even if it holds NaN: see `attention_triton` for the arithmetic.
Positions count: the same keys after left padding are other blocks. Scores, sums and results are
float32; the weights are rounded to v's dtype for the product with v. float32 inputs are multiplied
in float32.
"""

from __future__ import annotations

from typing import Any

import torch

from fxpass.kernels.gpu_call import keep
from fxpass.kernels.invariant.attention_plan import Plan
from fxpass.kernels.triton_launch import ALIGNED

Tensor = torch.Tensor

_HEAD_MOST = 256
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

_plans: dict[Any, Plan] = {}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q @ k^T * scale + mask) @ v.

    Args:
        q: (B, Hq, Lq, D), bfloat16, float16 or float32.
        k: (B, Hkv, Lk, D), q's dtype; Hq is a multiple of Hkv, whose heads are shared in order.
        v: (B, Hkv, Lk, Dv), q's dtype.
        mask: bool (True lets a key in) or additive, broadcastable to (B, Hq, Lq, Lk).
        causal: query i sees keys 0 to i.
        scale: 1 / sqrt(D) if None.

    Returns:
        out (B, Hq, Lq, Dv) in q's dtype, in memory (B, Lq, Hq, Dv) as torch's own kernels leave it,
        and the natural logsumexp of the scores, (B, Hq, Lq), float32. A row that sees no key is 0
        in both.

    Raises:
        TypeError: for dtypes that no kernel takes, or tensors of two dtypes or devices.
        ValueError: for shapes that do not fit, or heads of more than 256 elements.
    """
    at = q.data_ptr() | k.data_ptr() | v.data_ptr() | (0 if mask is None else mask.data_ptr())
    key = (
        at % ALIGNED == 0,
        causal,
        scale,
        *_kind(q),
        *_kind(k),
        *_kind(v),
        None if mask is None else _kind(mask),
    )
    plan = _plans.get(key)
    if plan is None:
        _check(q, k, v, mask)
        made = Plan(q, k, v, mask, causal, scale, aligned=at % ALIGNED == 0)
        plan = keep(_plans, key, made)
    return plan(q, k, v, mask)


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    """All that `_check` and a plan look at."""
    return tensor.get_device(), tensor.dtype, tensor.shape, tensor.stride()


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if q.dtype not in _FLOATS:
        raise TypeError(f"attention of {q.dtype}; needs bfloat16, float16 or float32")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, needs {q.dtype} on {q.device}"
            )
    if not (q.dim() == k.dim() == v.dim() == 4 and k.shape[:3] == v.shape[:3]):
        raise ValueError(f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}; needs (B, H, L, D) each")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {_shape(q)} and k {_shape(k)} differ in the first or the last dim")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads of q, needs a multiple of k's {k.shape[1]}")
    if not 0 < max(q.shape[3], v.shape[3]) <= _HEAD_MOST:
        raise ValueError(
            f"heads of {q.shape[3]} and {v.shape[3]} elements, needs 1 to {_HEAD_MOST}"
        )
    if mask is not None and (mask.device != q.device or mask.dtype not in (torch.bool, *_FLOATS)):
        raise TypeError(f"mask is {mask.dtype} on {mask.device}, needs bool or float on {q.device}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
