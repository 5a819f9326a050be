"""Operators that are no norms of x, or other norms: not touched, not even mentioned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import ignored

F32, V = "f32[2,8,64]", "f32[64]"


@ignored(F32, V, V)
def layer_norm(x, w, b):
    return F.layer_norm(x, (64,), w, b)


@ignored(F32)
def layer_norm_without_weight(x):
    return F.layer_norm(x, (64,))


@ignored(F32, "f32[8]", "f32[8]")
def group_norm(x, w, b):
    return F.group_norm(x, 4, w, b)


@ignored(F32, "f32[8]", "+f32[8]")
def batch_norm(x, m, v):
    return F.batch_norm(x, m, v)


@ignored(F32)
def instance_norm(x):
    return F.instance_norm(x)


@ignored(F32)
def softmax(x):
    return x.softmax(-1)


@ignored(F32)
def root_mean_square_alone(x):
    return torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@ignored(F32)
def inverse_alone(x):
    return torch.rsqrt(x.pow(2).mean(-1) + 1e-6)


@ignored(F32, F32)
def mean_squared_error(x, y):
    return F.mse_loss(x, y)


@ignored(F32, F32)
def mean_squared_error_by_hand(x, y):
    return (x - y).pow(2).mean().sqrt()


@ignored(F32)
def standard_deviation(x):
    return x.std(-1), x.var(-1, keepdim=True)


@ignored(F32)
def standardised(x):
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


@ignored(F32, F32, V)
def adam(p, g, v):
    m = v * 0.9 + g * g * 0.1
    return p - 1e-3 * g / (m.sqrt() + 1e-8)


@ignored("i64[2,8,64]")
def integers(x):
    return x * x.sum(-1, keepdim=True)


@ignored("c64[2,8,64]")
def complex_numbers(x):
    return x / x.abs()


@ignored(F32, F32)
def attention(q, k):
    return F.scaled_dot_product_attention(q[None], k[None], k[None])


@ignored(F32)
def silu(x):
    return F.silu(x) * x


@ignored(F32)
def rotary(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * b.cos() - b * a.sin(), b * a.cos() + a * b.sin()), -1)


@ignored(F32)
def squares(x):
    return x.pow(2).mean(-1)


@ignored("f32[]")
def scalar(x):
    return x * torch.rsqrt(x + 1e-6)


@ignored(F32)
def logsumexp(x):
    return x - x.logsumexp(-1, keepdim=True)


@ignored(F32)
def median(x):
    return x / x.median(-1, keepdim=True).values


@ignored(F32)
def scaled_by_largest(x):
    return x / x.abs().amax(-1, keepdim=True)
