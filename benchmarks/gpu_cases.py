"""The points of the norm benchmark: sizes, variants, roundings, buffers, and the eager code."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
Norm = Callable[[Tensor, "Tensor | None", Tensor], object]
"""(x, residual, weight) -> out, or (out, sum)."""

EPS = 1e-6
HEADS = 32
PACKED = 6144
"""Row stride of the packed q/k/v projection of a Llama-3-8B: (32 + 8 + 8) * 128."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = (1, 8, 64, 512, 2048, 8192, 32_768)
HIDDEN = (128, 512, 1024, 2048, 4096, 5120, 7168, 8192, 16_384)
CAST_FIRST, SCALE_FIRST = "cast_then_scale", "scale_then_cast"
COLD_FROM = 1 << 20
"""Bytes from which a point is measured cold; a smaller one lives in the L2 in any model."""
HOT_TO = 32_000_000
"""Bytes up to which a point is measured hot: half of the L2."""


@dataclass(frozen=True)
class Case:
    """One point."""

    variant: str
    """plain, residual (the sum is returned), qk (32 heads of a packed projection; rows: tokens)."""
    rounding: str
    dtype: str
    rows: int
    hidden: int

    @property
    def normed_rows(self) -> int:
        """Rows that are normalised."""
        return self.rows * (HEADS if self.variant == "qk" else 1)

    @property
    def moved(self) -> int:
        """Bytes that must be moved: x and out, with a residual also that and the sum."""
        return self.normed_rows * self.hidden * 2 * (4 if self.variant == "residual" else 2)

    @property
    def modes(self) -> list[str]:
        """hot: one buffer set. cold: so many that none of it is in the L2."""
        return ["hot"] * (self.moved <= HOT_TO) + ["cold"] * (self.moved >= COLD_FROM)

    @property
    def spec(self) -> str:
        """The meaning, as fxpass writes it."""
        d = "bf16" if self.dtype == "bf16" else "f16"
        steps = {
            CAST_FIRST: f"mul_row:f32,cast:{d},mul_weight:{d}",
            SCALE_FIRST: f"mul_row:f32,mul_weight:f32,cast:{d}",
        }[self.rounding]
        added = self.variant == "residual"
        return (
            f"x={d}{f' residual={d} sum={d}' * added} row=mean:f32,add_eps:f32,rsqrt:f32"
            f" element={steps} weight={d}{' outputs=out,sum' * added}"
        )

    def sets(self, mode: str, cache: int) -> int:
        """Buffer sets to rotate over: four times the L2 in all."""
        return 1 if mode == "hot" else max(2, math.ceil(4 * cache / self.moved))


class Buffers:
    """Inputs of `sets` calls, and one weight away from 1."""

    def __init__(self, case: Case, sets: int, device: str) -> None:
        dtype = DTYPES[case.dtype]
        shape = (sets, case.rows, PACKED if case.variant == "qk" else case.hidden)
        data = torch.empty(shape, dtype=dtype, device=device).normal_()
        self.x = list(data.unbind())
        if case.variant == "qk":
            self.x = [
                x[:, : HEADS * case.hidden].unflatten(1, (HEADS, case.hidden)) for x in self.x
            ]
        self.residual: Sequence[Tensor | None] = [None] * sets
        if case.variant == "residual":
            self.residual = torch.empty_like(data).normal_().unbind()
        self.weight = torch.empty(case.hidden, dtype=dtype, device=device).uniform_(0.5, 1.5)

    def bind(self, norm: Norm) -> Callable[[int], object]:
        """The norm as a function of the number of the buffer set."""
        return lambda i: norm(self.x[i], self.residual[i], self.weight)


def cast_then_scale(x: Tensor, residual: Tensor | None, weight: Tensor) -> object:
    """As LlamaRMSNorm has it, after the residual add of a decoder layer if there is one."""
    if residual is not None:
        x = x + residual
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    out = weight * h.to(x.dtype)
    return out if residual is None else (out, x)


def scale_then_cast(x: Tensor, residual: Tensor | None, weight: Tensor) -> object:
    """As nn.RMSNorm means it: all in float32, rounded once."""
    if residual is not None:
        x = x + residual
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    out = (h * weight.to(torch.float32)).to(x.dtype)
    return out if residual is None else (out, x)


EAGER: dict[str, Norm] = {CAST_FIRST: cast_then_scale, SCALE_FIRST: scale_then_cast}
_fresh = 0


def fresh(function: Norm) -> Norm:
    """The same function with code of its own: Dynamo looks compiled code up by code object."""
    global _fresh
    _fresh += 1
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{_fresh}")
    return types.FunctionType(code, function.__globals__, code.co_name)


def cases(first_rows: Sequence[int], tiny: bool, quick: bool) -> list[Case]:
    """All points, the ones that a cut of the budget should spare first."""
    if tiny:
        return [*_grid((1, 8), (128, 512), CAST_FIRST), *_grid((8,), (128,), SCALE_FIRST)]
    if quick:
        rows, hidden = (1, 8, 512, 2048, 8192, 32_768), (128, 1024, 4096, 5120, 7168, 8192, 16_384)
        return [c for c in _grid(rows, hidden, CAST_FIRST) if c.variant != "qk"]
    other = [count for count in ROWS if count not in first_rows]
    half = [
        Case(variant, CAST_FIRST, "fp16", rows, 4096)
        for variant in ("plain", "residual")
        for rows in (512, 8192)
    ]
    return [
        *_grid(first_rows, HIDDEN, CAST_FIRST),
        Case("plain", CAST_FIRST, "bf16", 1 << 20, 128),
        *_grid(other, HIDDEN, CAST_FIRST),
        *_grid(first_rows, HIDDEN, SCALE_FIRST),
        *half,
        *_grid(other, HIDDEN, SCALE_FIRST),
    ]


def _grid(rows: Sequence[int], hidden: Sequence[int], rounding: str) -> Iterator[Case]:
    for length in hidden:
        for variant in ("plain", "residual", "qk") if length == 128 else ("plain", "residual"):
            for count in rows:
                yield Case(variant, rounding, "bf16", count, length)
