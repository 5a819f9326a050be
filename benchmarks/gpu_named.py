"""Norms of FlashInfer, quack and SGLang as columns, where their packages are installed.

All of them round once, whatever the case asks for. With a residual, FlashInfer's and SGLang's write
over their inputs: as many bytes are moved, in half as much memory.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from gpu_cases import EPS, Case, Norm, Tensor

IN_PLACE = {"flashinfer", "sgl"}
"""Columns that write a residual add over x and residual."""
_MODULES = {
    "flashinfer": "flashinfer.norm",
    "quack": "quack.rmsnorm",
    "sgl": "sglang.kernels.ops.layernorm.norm",
}


def named(case: Case) -> dict[str, Norm]:
    """The columns whose package is there and takes the case."""
    found = {name: make(case) for name, make in _MAKERS.items() if _module(name) is not None}
    return {name: norm for name, norm in found.items() if norm is not None}


@functools.cache
def _module(name: str) -> Any:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError:
        return None


def _flashinfer(case: Case) -> Norm | None:
    made = _module("flashinfer")
    if case.variant == "residual":
        return _written_over(made.fused_add_rmsnorm)
    return lambda x, residual, weight: made.rmsnorm(x, weight, EPS, enable_pdl=True)


def _quack(case: Case) -> Norm | None:
    forward = _module("quack").rmsnorm_fwd
    if case.variant == "qk":  # its rows have one stride
        return None
    if case.variant == "residual":
        return lambda x, residual, weight: forward(x, weight, residual=residual, eps=EPS)[:2]
    return lambda x, residual, weight: forward(x, weight, eps=EPS)[0]


def _sgl(case: Case) -> Norm | None:
    made = _module("sgl")
    if case.variant == "qk":  # norms q and k in one call
        return None
    if case.variant == "residual":
        fits = made.is_supported_jit_fused_add_rmsnorm_hidden_size(case.hidden)
        return _written_over(made.fused_add_rmsnorm) if fits else None

    def norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> object:
        out = x.new_empty(x.shape)
        made.rmsnorm(x, weight, out, EPS)
        return out

    return norm


def _written_over(fused: Callable[..., object]) -> Norm:
    def norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> object:
        fused(x, residual, weight, EPS)
        return x, residual

    return norm


_MAKERS: dict[str, Callable[[Case], Norm | None]] = {
    "flashinfer": _flashinfer,
    "quack": _quack,
    "sgl": _sgl,
}
