"""The corpus: ways in which models write a norm, and near misses that must stay as they are.

Every row was met in a model or in what a compiler made of one. Rows of one group get the same
inputs; a text such as `bf16[2,8,64]` stands for a random tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Spelling = Callable[..., Any]


@dataclass(frozen=True)
class Group:
    """Spellings with the same inputs; `norms` is how many each holds, 0 for near misses."""

    inputs: tuple[str, ...]
    norms: int
    rows: Mapping[str, Spelling]


def _mean(x: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    return x.pow(2).mean(dim, keepdim=True) + 1e-6


def _unit(x: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return h * torch.rsqrt(_mean(h))


def _llama(inverse: Spelling) -> Spelling:
    """Llama's norm around a spelling of the inverse."""

    def norm(x: torch.Tensor, w: torch.Tensor) -> Any:
        h = x.float()
        return w * (h * inverse(h)).to(x.dtype)

    return norm


def _swapped(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (torch.rsqrt(_mean(h)) * h).to(x.dtype) * w


def _residual(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    total = x + r
    return w * _unit(total).to(x.dtype), total


def _heads(qkv: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor) -> tuple[torch.Tensor, ...]:
    q, k, _ = qkv.view(2, 8, 3, 4, 16).unbind(2)
    return wq * _unit(q).to(qkv.dtype), (wk * _unit(k).to(qkv.dtype)).transpose(1, 2)


INVERSES: dict[str, Spelling] = {
    "pow(2)": lambda h: torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6),
    "square()": lambda h: torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6),
    "x ** 2": lambda h: torch.rsqrt((h**2).mean(-1, keepdim=True) + 1e-6),
    "x * x": lambda h: torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-6),
    "abs().pow(2)": lambda h: torch.rsqrt(h.abs().pow(2).mean(-1, keepdim=True) + 1e-6),
    "mean((-1,))": lambda h: torch.rsqrt(h.pow(2).mean((-1,), keepdim=True) + 1e-6),
    "mean(2)": lambda h: torch.rsqrt(h.pow(2).mean(2, keepdim=True) + 1e-6),
    "mean.unsqueeze": lambda h: torch.rsqrt(h.pow(2).mean(-1).unsqueeze(-1) + 1e-6),
    "mean[..., None]": lambda h: torch.rsqrt(h.pow(2).mean(-1)[..., None] + 1e-6),
    "sum / 64": lambda h: torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / 64 + 1e-6),
    "sum / shape": lambda h: torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / h.shape[-1] + 1e-6),
    "eps + mean": lambda h: torch.rsqrt(1e-6 + h.pow(2).mean(-1, keepdim=True)),
    "no eps": lambda h: torch.rsqrt(h.pow(2).mean(-1, keepdim=True)),
    "clamp": lambda h: torch.rsqrt(h.pow(2).mean(-1, keepdim=True).clamp(min=1e-6)),
    "pow(-0.5)": lambda h: _mean(h).pow(-0.5),
    "1 / sqrt": lambda h: 1 / torch.sqrt(_mean(h)),
    "sqrt().reciprocal()": lambda h: _mean(h).sqrt().reciprocal(),
}
FINISHES: dict[str, Spelling] = {
    "operands swapped": _swapped,
    "float() three times": lambda x, w: (
        w * (x.float() * torch.rsqrt((x.float() * x.float()).mean(-1, True) + 1e-6)).to(x.dtype)
    ),
    "scale then cast": lambda x, w: (_unit(x) * w.float()).to(x.dtype),
    "no weight": lambda x, w: _unit(x).to(x.dtype),
    "Gemma": lambda x, w: (_unit(x) * (1.0 + w.float())).type_as(x),
    "Gemma, 16-bit 1 + w": lambda x, w: (_unit(x) * (1 + w)).type_as(x),
    "F.rms_norm": lambda x, w: F.rms_norm(x, (64,), w, 1e-6),
    "F.rms_norm, eps=None": lambda x, w: F.rms_norm(x, (64,), w),
    "torch.rms_norm": lambda x, w: torch.rms_norm(x, [64], w, 1e-5),
    "x / sqrt": lambda x, w: w * (x.float() / torch.sqrt(_mean(x.float()))).to(x.dtype),
    "gated": lambda x, w: w * _unit(x).to(x.dtype) * F.silu(x),
    "bias": lambda x, w: w * _unit(x).to(x.dtype) + w,
}
FLOAT32: dict[str, Spelling] = {
    "float32": lambda x: x * torch.rsqrt(_mean(x)),
    "float32, (...) ** 0.5": lambda x: x / _mean(x) ** 0.5,
    "sum * (1 / 64)": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) * (1 / 64) + 1e-6),
    "x / x.norm()": lambda x: x / x.norm(dim=-1, keepdim=True),
    "norm * n ** -0.5": lambda x: x / (torch.linalg.norm(x, dim=-1, keepdim=True) * 64**-0.5),
    "F.normalize": lambda x: F.normalize(x, dim=-1),
}
MISSES: dict[str, Spelling] = {
    "mean over dim 1": lambda x: x * torch.rsqrt(_mean(x, 1)),
    "mean over dims 0, 2": lambda x: x * torch.rsqrt(_mean(x, (0, 2))),
    "x ** 3": lambda x: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6),
    "pow(-0.49)": lambda x: x * _mean(x).pow(-0.49),
    "eps outside sqrt": lambda x: x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-6),
    "eps outside norm": lambda x: x / (x.norm(dim=-1, keepdim=True) * 64**-0.5 + 1e-6),
    "mean of a part": lambda x: x * torch.rsqrt(_mean(x[..., :16])),
    "mean of another": lambda x: (x - 1) * torch.rsqrt(_mean(x)),
    "sum / 63": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 63 + 1e-6),
    "sum / sqrt(n)": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + 1e-6),
    "eps per row": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[..., :1].abs()),
    "mean read again": lambda x: (x * torch.rsqrt(v := _mean(x)), v.log()),
    "LayerNorm by hand": lambda x: (
        (x - x.mean(-1, True)) * torch.rsqrt(_mean(x - x.mean(-1, True)))
    ),
    "F.layer_norm": lambda x: F.layer_norm(x, (64,)),
    "float64": lambda x: (x.double() * torch.rsqrt(_mean(x.double()))).float(),
}

_X, _W = "bf16[2,8,64]", "bf16[64]"
GROUPS = (
    Group((_X, _W), 1, {name: _llama(inverse) for name, inverse in INVERSES.items()}),
    Group((_X, _W), 1, FINISHES),
    Group(("f32[2,8,64]",), 1, FLOAT32),
    Group((_X, _X, _W), 1, {"residual, sum returned": _residual}),
    Group(("bf16[2,8,192]", "bf16[16]", "bf16[16]"), 2, {"q and k of a packed tensor": _heads}),
    Group(("f32[2,8,64]",), 0, MISSES),
)
