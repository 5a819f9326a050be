"""Slow kernels whose rows are invariant by construction, in place of the real ones.

Every sum is a binary tree of element-wise additions along the last dim.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def tree(x: Tensor) -> Tensor:
    """The sum over the last dim, neighbours first."""
    if not x.shape[-1]:
        return x.sum(-1)
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.nn.functional.pad(x, (0, 1))
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def matmul(a, b, bias=None, *, alpha=1.0, beta=1.0, out_dtype=None, tf32=False):
    made = tree(wide(a).unsqueeze(-2) * wide(b).mT.unsqueeze(-3)) * alpha
    if bias is not None and beta:
        made = made + wide(bias) * beta
    return made.to(out_dtype or a.dtype).contiguous()


def row_sum(x, *, dtype):
    return tree(wide(x)).to(dtype)


def row_mean(x, *, dtype):
    return (tree(wide(x)) / x.shape[-1]).to(dtype)


def row_norm(x, p, *, dtype):
    x = wide(x).abs()
    if p in (float("inf"), float("-inf")):
        return (x.amax(-1) if p > 0 else x.amin(-1)).to(dtype)
    if p == 0:
        return tree((x != 0).to(x.dtype)).to(dtype)
    return (tree(x * x).sqrt() if p == 2 else tree(x.pow(p)).pow(1 / p)).to(dtype)


def row_logsumexp(x, *, dtype):
    x = wide(x)
    top = x.amax(-1, keepdim=True).nan_to_num(neginf=0.0, posinf=0.0)
    return (tree((x - top).exp()).log() + top[..., 0]).to(dtype)


def row_softmax(x, *, dtype, log):
    x = wide(x)
    x = x - x.amax(-1, keepdim=True)
    total = tree(x.exp())[..., None]
    return (x - total.log() if log else x.exp() / total).to(dtype)


def row_var_mean(x, correction, *, dtype):
    x = wide(x)
    mean = tree(x) / x.shape[-1]
    spread = x - mean[..., None]
    return (tree(spread * spread) / (x.shape[-1] - correction)).to(dtype), mean.to(dtype)


def row_layer_norm(x, weight, bias, eps):
    var, mean = row_var_mean(x, 0.0, dtype=wide(x).dtype)
    rstd = (var + eps).rsqrt()
    made = (wide(x) - mean[..., None]) * rstd[..., None]
    made = made if weight is None else made * wide(weight)
    made = made if bias is None else made + wide(bias)
    return made.to(x.dtype), mean, rstd


def row_cumsum(x, *, dtype):
    made = [wide(x)[..., 0]]
    for i in range(1, x.shape[-1]):
        made.append(made[-1] + wide(x)[..., i])
    return torch.stack(made, -1).to(dtype)


def attention(q, k, v, mask=None, *, causal=False, scale=None):
    groups, out_dtype = q.shape[1] // k.shape[1], q.dtype
    q, k, v = wide(q), wide(k.repeat_interleave(groups, 1)), wide(v.repeat_interleave(groups, 1))
    dtype = q.dtype
    scores = matmul(q, k.mT, alpha=q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        mask = torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask
        scores = scores + mask
    lse = row_logsumexp(scores, dtype=dtype)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return matmul(weights, v, out_dtype=out_dtype), lse
