"""Decoding that gives a request the same tokens alone and inside a shuffled batch.

A small Llama-like model with a key-value cache decodes six requests, three greedily and three by
sampling with a seed of their own: each by itself, then all together in another order.

python examples/same_tokens.py [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import fxpass

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, LENGTH = 512, 256, 2, 4, 2, 64, 24
HOW = ("plain", "eager", "compiled")


@dataclass(frozen=True)
class Request:
    """A prompt; with a seed, tokens are sampled, else the likeliest is taken."""

    prompt: tuple[int, ...]
    seed: int | None = None


REQUESTS = tuple(
    Request(tuple((7 * i + 3 * j * j) % VOCAB for j in range(2 + i)), seed=i if i % 2 else None)
    for i in range(6)
)


class Layer(torch.nn.Module):
    """Attention over the cache, then a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        wide = (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.norm, self.mlp_norm = torch.nn.RMSNorm(HIDDEN), torch.nn.RMSNorm(HIDDEN)
        self.qkv = torch.nn.Linear(HIDDEN, wide, bias=False)
        self.out = torch.nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.gate_up = torch.nn.Linear(HIDDEN, 4 * HIDDEN, bias=False)
        self.down = torch.nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor, position: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        """One token each of B requests: x (B, hidden), `position` (B,), cache (2, B, ...)."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (-1, HEAD_DIM))
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        q, k = rotated(q, position), rotated(k, position)
        place = position[:, None, None, None].expand(-1, KV_HEADS, 1, HEAD_DIM)
        for kept, new in zip(cache, (k, v), strict=True):
            kept.scatter_(2, place, new[:, :, None])
        seen = torch.arange(LENGTH, device=x.device) <= position[:, None]
        mixed = F.scaled_dot_product_attention(
            q[:, :, None], cache[0], cache[1], seen[:, None, None], enable_gqa=True
        )
        x = x + self.out(mixed.flatten(1))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def rotated(x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of x (B, heads, D)."""
    steps = torch.arange(0, HEAD_DIM, 2, device=x.device) / HEAD_DIM
    angle = position[:, None, None] / 10_000.0**steps
    cos, sin = angle.cos(), angle.sin()
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class Model(torch.nn.Module):
    """Token in, next token out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, HIDDEN)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = torch.nn.RMSNorm(HIDDEN)
        self.head = torch.nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(
        self, token: torch.Tensor, position: torch.Tensor, cache: torch.Tensor, drawn: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (B, vocabulary), the likeliest tokens, and those that numbers `drawn` (B,) pick.

        The cache is (layers, 2, B, heads, length, head dim), written in place.
        """
        x = self.embedding(token)
        for layer, kept in zip(self.layers, cache, strict=True):
            x = layer(x, position, kept)
        logits = self.head(self.norm(x)).float()
        reached = logits.softmax(-1).cumsum(-1)
        sampled = (reached < drawn[:, None] * reached[:, -1:]).sum(-1).clamp_max(VOCAB - 1)
        return logits, logits.argmax(-1), sampled


def make(device: str, dtype: torch.dtype) -> Model:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    return Model().to(device, dtype).eval()


@torch.no_grad()
def decode(
    step: Callable[..., tuple[torch.Tensor, ...]], model: Model, requests: Sequence[Request]
) -> list[tuple[list[int], torch.Tensor]]:
    """Tokens and logits (steps, vocabulary) of each request of a batch, decoded to full length.

    A request takes one token per step: of its prompt first, then the one it got last.
    """
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    rows = len(requests)
    shape = (LAYERS, 2, rows, KV_HEADS, LENGTH, HEAD_DIM)
    cache = torch.zeros(shape, dtype=dtype, device=device)
    draws = [torch.Generator().manual_seed(r.seed or 0) for r in requests]
    texts = [list(request.prompt) for request in requests]
    kept = []
    for at in range(LENGTH - 1):
        token = torch.tensor([text[at] for text in texts], device=device)
        position = torch.full((rows,), at, device=device)
        drawn = torch.cat([torch.rand(1, generator=draw) for draw in draws]).to(device)
        logits, likeliest, sampled = step(token, position, cache, drawn)
        kept.append(logits)
        for row, (request, text) in enumerate(zip(requests, texts, strict=True)):
            if at + 1 == len(text):
                chosen = likeliest if request.seed is None else sampled
                text.append(int(chosen[row]))
    every = torch.stack(kept, dim=1)
    return list(zip(texts, every, strict=True))


def compare(device: str, dtype: torch.dtype, how: str) -> tuple[int, int]:
    """(requests with other tokens, steps with other bits in their logits): batch against alone."""
    model = make(device, dtype)
    step: Callable[..., tuple[torch.Tensor, ...]] = model
    mode = fxpass.batch_invariant_mode() if how == "eager" else contextlib.nullcontext()
    if how == "compiled":
        step = torch.compile(
            model, backend=fxpass.rmsnorm_backend, options={"batch_invariant": True}
        )
    shuffled = [REQUESTS[index] for index in (4, 1, 5, 0, 3, 2)]
    with mode:
        alone = [decode(step, model, [request])[0] for request in shuffled]
        together = decode(step, model, shuffled)
    tokens = sum(a[0] != b[0] for a, b in zip(alone, together, strict=True))
    steps = sum(int((a[1] != b[1]).any(-1).sum()) for a, b in zip(alone, together, strict=True))
    return tokens, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    total = len(REQUESTS) * (LENGTH - 1)
    for how in HOW:
        tokens, steps = compare(args.device, getattr(torch, args.dtype), how)
        print(
            f"{how}: {tokens} of {len(REQUESTS)} requests get other tokens in a batch;"
            f" logits differ in {steps} of {total} steps"
        )


if __name__ == "__main__":
    main()
