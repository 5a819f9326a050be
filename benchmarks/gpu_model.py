"""Llama-3-8B and Qwen3-8B in short: their shapes and their rounding, random weights, static cache.

Norms, rotary embedding and the MLP are written as transformers writes them. The attention of a
decode step lets the heads that share keys stand as query positions, so no key is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

Tensor = torch.Tensor
Cache = tuple[Tensor, Tensor]
"""Keys and values: (batch, kv_heads, positions, head) each."""


@dataclass(frozen=True)
class Shape:
    """What a model is made of."""

    name: str
    vocab: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    theta: float
    eps: float
    qk_norm: bool
    layers: int
    cache: int = 512
    """Positions of the static cache."""

    @property
    def norms(self) -> int:
        """Norm sites in the model."""
        return (4 if self.qk_norm else 2) * self.layers + 1

    def tiny(self) -> Shape:
        """The same, small enough for a smoke run."""
        return replace(self, vocab=256, hidden=128, inner=192, heads=4, kv_heads=2, head=32)


def shapes(layers: int) -> dict[str, Shape]:
    """The two models, with that many layers."""
    llama = Shape("llama", 128_256, 4096, 14_336, 32, 8, 128, 5e5, 1e-5, False, layers)
    qwen = Shape("qwen3", 151_936, 4096, 12_288, 32, 8, 128, 1e6, 1e-6, True, layers)
    return {shape.name: shape for shape in (llama, qwen)}


class RMSNorm(nn.Module):
    """As LlamaRMSNorm and Qwen3RMSNorm have it."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise in float32, round, then scale."""
        h = x.to(torch.float32)
        variance = h.pow(2).mean(-1, keepdim=True)
        h = h * torch.rsqrt(variance + self.eps)
        return self.weight * h.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention; a decode step writes its keys into the cache in place."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head, bias=False)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head, bias=False)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head, bias=False)
        self.o_proj = nn.Linear(s.heads * s.head, s.hidden, bias=False)
        if s.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(s.head, s.eps), RMSNorm(s.head, s.eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """`at`: the position of the one token of a decode step; None in a prefill."""
        s = self.s
        batch, count, _ = x.shape
        q = self.q_proj(x).view(batch, count, s.heads, s.head)
        k = self.k_proj(x).view(batch, count, s.kv_heads, s.head)
        v = self.v_proj(x).view(batch, count, s.kv_heads, s.head).transpose(1, 2)
        if s.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = _rotated(q.transpose(1, 2), cos, sin)
        k = _rotated(k.transpose(1, 2), cos, sin)
        if at is None or cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            cache[0].index_copy_(2, at, k)
            cache[1].index_copy_(2, at, v)
            seen = torch.arange(s.cache, device=x.device) <= at
            q = q.reshape(batch, s.kv_heads, s.heads // s.kv_heads, s.head)
            mask = seen.expand(batch, 1, q.shape[2], s.cache)
            y = F.scaled_dot_product_attention(q, cache[0], cache[1], attn_mask=mask)
            y = y.reshape(batch, s.heads, 1, s.head)
        return self.o_proj(y.transpose(1, 2).reshape(batch, count, s.heads * s.head))


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)
        self.gate_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.inner, bias=False)
        self.down_proj = nn.Linear(s.inner, s.hidden, bias=False)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, at: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """Attention and MLP, each with its norm before and its residual add after."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, at, cache)
        h = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Model(nn.Module):
    """Tokens to the logits of the last position."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embed = nn.Embedding(s.vocab, s.hidden)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)
        self.lm_head = nn.Linear(s.hidden, s.vocab, bias=False)
        self.register_buffer("frequencies", torch.empty(s.head // 2), persistent=False)

    def forward(
        self, tokens: Tensor, at: Tensor | None = None, caches: list[Cache] | None = None
    ) -> Tensor:
        """Decode: tokens (batch, 1), `at` (1,), one cache per layer. Prefill: tokens alone."""
        x = self.embed(tokens)
        places = torch.arange(tokens.shape[1], device=tokens.device) if at is None else at
        angles = torch.outer(places.to(torch.float32), self.frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, at, None if caches is None else caches[i])
        return self.lm_head(self.norm(x[:, -1:]))[:, 0]

    def caches(self, batch: int) -> list[Cache]:
        """Empty caches of all layers."""
        s, weight = self.s, self.lm_head.weight
        size = (batch, s.kv_heads, s.cache, s.head)
        return [(weight.new_zeros(size), weight.new_zeros(size)) for _ in range(s.layers)]


def build(s: Shape, device: str) -> Model:
    """A model with random bf16 weights, the same ones every time; norm weights away from 1."""
    with torch.device("meta"):
        model = Model(s).to(torch.bfloat16)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.uniform_(0.5, 1.5)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.normal_(std=0.02)
    steps = torch.arange(0, s.head, 2, dtype=torch.float32, device=device) / s.head
    model.frequencies = 1.0 / s.theta**steps
    return model
