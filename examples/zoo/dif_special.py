"""One row per diffusers transformer class: constructor arguments and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]


@dataclass
class Maker:
    """Makes input tensors of one batch size and dtype."""

    batch: int
    dtype: torch.dtype
    generator: torch.Generator
    model: torch.nn.Module

    def randn(self, *shape: int) -> torch.Tensor:
        """Random values, with the batch in front."""
        return torch.randn(self.batch, *shape, generator=self.generator).to(self.dtype)

    def time(self, value: float = 500.0) -> torch.Tensor:
        """A diffusion time for each batch element."""
        return torch.full((self.batch,), value)

    def ids(self, tokens: int, axes: int = 3) -> torch.Tensor:
        """Positions for rotary embeddings, the same for the whole batch."""
        return torch.arange(tokens * axes).reshape(tokens, axes).float() % 7

    def mask(self, tokens: int) -> torch.Tensor:
        """An attention mask that hides nothing."""
        return torch.ones(self.batch, tokens, dtype=torch.bool)


@dataclass
class Recipe:
    """How to build one class."""

    inputs: Callable[[Maker], Inputs]
    arguments: dict[str, Any] = field(default_factory=dict)


def flux(make: Maker) -> Inputs:
    return {
        "hidden_states": make.randn(16, 16),
        "encoder_hidden_states": make.randn(8, 64),
        "pooled_projections": make.randn(48),
        "timestep": make.time(0.5).to(make.dtype),
        "img_ids": make.ids(16),
        "txt_ids": make.ids(8),
    }


def video(make: Maker) -> Inputs:
    return {
        "hidden_states": make.randn(16, 2, 8, 8),
        "timestep": make.time().long(),
        "encoder_hidden_states": make.randn(8, 64),
    }


CLASSES: dict[str, Recipe] = {
    "FluxTransformer2DModel": Recipe(flux, {"in_channels": 16}),
    "WanTransformer3DModel": Recipe(video),
}
