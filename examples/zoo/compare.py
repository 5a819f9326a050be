"""Eager against compiled: which elements differ, and does a row depend on its batch?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class NormSite(torch.nn.Module):
    """One norm of a model, with the residual add before it where the model has one."""

    def __init__(self, norm: torch.nn.Module, residual: bool) -> None:
        super().__init__()
        self.norm = norm
        self.residual = residual

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The normalised value."""
        return self.norm(residual + x if self.residual else x)


def site_input(
    model: torch.nn.Module, name: str, inputs: dict[str, Any]
) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of what the module called `name` normalises."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
    return seen[0].shape, seen[0].dtype


def first_tensor(out: Any) -> torch.Tensor:
    """The main output of a model: the first tensor in whatever it returns."""
    while not isinstance(out, torch.Tensor):
        out = next(iter(out.values())) if isinstance(out, dict) else out[0]
    return out


def different(left: torch.Tensor, right: torch.Tensor) -> float:
    """Share of the elements whose bits differ (two NaNs count as equal)."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return 1.0
    same = (left == right) | (left.isnan() & right.isnan())
    return 1.0 - same.float().mean().item()


def batch_invariant(
    run: Callable[..., torch.Tensor], args: tuple[torch.Tensor, ...], batches: tuple[int, ...]
) -> bool:
    """True if row 0 comes out bit-identical alone and in every batch size tried."""
    with torch.no_grad():
        alone = run(*(arg[:1].contiguous() for arg in args))
        for batch in batches:
            together = run(*(arg[:batch].contiguous() for arg in args))
            if not torch.equal(alone, together[:1]):
                return False
    return True
