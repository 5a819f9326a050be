"""The dtypes fxpass knows, their short names, and which casts are exact."""

from __future__ import annotations

import torch

SHORT_NAMES: dict[torch.dtype, str] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
    torch.float64: "f64",
}
BY_SHORT_NAME = {name: dtype for dtype, name in SHORT_NAMES.items()}

_EXACT_CASTS = {
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float16, torch.float32),
    (torch.float16, torch.float64),
    (torch.float32, torch.float64),
}


def short(dtype: torch.dtype) -> str:
    """`bf16` for `torch.bfloat16`; dtypes outside the table keep their torch name."""
    return SHORT_NAMES.get(dtype, str(dtype).removeprefix("torch."))


def is_exact_cast(source: torch.dtype, target: torch.dtype) -> bool:
    """True if every value of `source` is a value of `target` (a cast that cannot round)."""
    return source == target or (source, target) in _EXACT_CASTS


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which elements of `dtype` are multiplied and added: float32 up to float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
