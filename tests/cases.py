"""The semantic table: what each way of writing a norm means, or why it is none.

A row is a function under `@matches(variant, spec, *inputs)`, `@declines(reason, *inputs)` or
`@ignored(*inputs)`; inputs are texts such as `bf16[2,8,64]`. The rows stand in `cases_*.py`, by
subject. A bug fix starts with a row that fails without it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

BOTH = ("dynamo", "aten")

RSQRT = "mean:f32,add_eps:f32,rsqrt:f32"
LLAMA = f"x=bf16 row={RSQRT} element=mul_row:f32,cast:bf16,mul_weight:bf16 weight=bf16"
SCALE_CAST = f"x=bf16 row={RSQRT} element=mul_row:f32,mul_weight:f32,cast:bf16 weight=bf16"
CAST = f"x=bf16 row={RSQRT} element=mul_row:f32,cast:bf16"
PLAIN = f"x=f32 row={RSQRT} element=mul_row:f32"
SCALED = f"x=f32 row={RSQRT} element=mul_row:f32,mul_weight:f32 weight=f32"
GEMMA = (
    f"x=bf16 row={RSQRT} element=mul_row:f32,mul_weight:f32,cast:bf16 weight=bf16 offset=1.0:f32"
)

X, W = "bf16[2,8,64]", "bf16[64]"


@dataclass(frozen=True)
class Declined:
    """No rewrite, and the report says why: a regular expression."""

    reason: str


@dataclass(frozen=True)
class Ignored:
    """No rewrite and nothing in the report: it does not even look like a norm."""


@dataclass(frozen=True)
class Match:
    """The sites of a graph in order: variant and spec."""

    sites: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    id: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    expect: Match | Declined | Ignored
    levels: tuple[str, ...] = BOTH
    dynamic: bool | None = None
    aten: tuple[str, str] | None = None
    """Variant and spec at ATen level, where AOTAutograd's decomposition rounds elsewhere."""
    exact: bool = True
    """Rewritten graphs give the same bits; False where only the order of the sum differs."""


CASES: list[Case] = []


def _row(expect: Match | Declined | Ignored, inputs: tuple[Any, ...], options: dict[str, Any]):
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        name = options.pop("id", function.__name__)
        CASES.append(Case(name, function, inputs, expect, **options))
        return function

    return add


def matches(
    variant: str, spec: str, *inputs: Any, more: tuple[tuple[str, str], ...] = (), **options
):
    """The function below is this variant of a norm, with this spec (`more`: further sites)."""
    return _row(Match(((variant, spec), *more)), inputs, options)


def declines(reason: str, *inputs: Any, **options):
    """The function below is not rewritten, for this reason."""
    return _row(Declined(reason), inputs, options)


def untouched(*inputs: Any, **options):
    """The function below is not rewritten; whether the report speaks of it does not matter."""
    return _row(Declined(""), inputs, options)


def ignored(*inputs: Any, **options):
    """The function below has nothing to do with norms."""
    return _row(Ignored(), inputs, options)


MODULES = (
    "cases_spellings", "cases_rounding", "cases_residual", "cases_context", "cases_near_misses",
    "cases_other", "cases_writes",
)  # fmt: skip


@functools.cache
def table() -> tuple[Case, ...]:
    """All rows. Ids are unique."""
    for module in MODULES:
        importlib.import_module(module)
    ids = [case.id for case in CASES]
    assert len(ids) == len(set(ids)), sorted(i for i in ids if ids.count(i) > 1)
    return tuple(CASES)
