"""The statements of a spec's three programs, in the order a generated kernel runs them.

Eager computes an operator in the promoted dtype of its operands and casts the result to the step's
dtype; both roundings are listed, and a kernel leaves out those to float32, in which it computes.
Every code generator (C++, CUDA, Triton) walks these statements, so they round alike; how an
operation is written in its language is a table of the generator.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch

from fxpass.dtypes import is_exact_cast, short
from fxpass.spec import NormSpec


@dataclass(frozen=True)
class Statement:
    """One operation on the running value, and the roundings after it."""

    op: str
    """A row or element operation of the spec, `square`, `offset`, or `cast`: no operation."""
    computed: torch.dtype
    """What the operation computes in, before the step's own rounding."""
    roundings: tuple[torch.dtype, ...]
    """In order; float32 stands for none."""
    comment: str
    value: float | None = None
    """The constant of `mul_const` and `offset`."""

    @property
    def narrow(self) -> list[torch.dtype]:
        """The roundings that change a float32 value, without immediate repetitions."""
        distinct = [d for i, d in enumerate(self.roundings) if i == 0 or d != self.roundings[i - 1]]
        return [dtype for dtype in distinct if dtype != torch.float32]


def refusal(spec: NormSpec, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why no kernel can be generated for `spec` from float32 statements, or None."""
    for role, dtype in dtypes_of(spec):
        if dtype not in dtypes:
            return f"{role} is {short(dtype)}, needs {' or '.join(map(short, dtypes))}"
    reductions = [step.op in ("mean", "sum") for step in spec.row]
    if not reductions or not reductions[0] or any(reductions[1:]):
        return f"row program {','.join(map(str, spec.row))} must start with its only mean or sum"
    known = ("out", "sum", "row")
    if "out" not in spec.outputs or spec.outputs != tuple(o for o in known if o in spec.outputs):
        return f"outputs {','.join(spec.outputs)}, needs a part of {','.join(known)} with out"
    if "sum" in spec.outputs and spec.residual is None:
        return "outputs sum without a residual"
    return None


def dtypes_of(spec: NormSpec) -> list[tuple[str, torch.dtype]]:
    """Every dtype of a spec with the role it plays."""
    optional = (
        ("x", spec.x),
        ("residual", spec.residual),
        ("sum", spec.sum),
        ("square", spec.square),
        ("weight", spec.weight),
        ("weight offset", spec.weight_offset_dtype),
        ("bias", spec.bias),
    )
    steps = [(f"step {step}", step.dtype) for step in (*spec.row, *spec.element)]
    return [(role, dtype) for role, dtype in optional if dtype is not None] + steps


def square(spec: NormSpec) -> Statement:
    """The square of one element."""
    computed = _square_dtype(spec)
    return Statement("square", computed, (computed,), f"square:{short(computed)}")


def row(spec: NormSpec) -> list[Statement]:
    """From the sum of squares to the row value."""
    statements = []
    dtype = _square_dtype(spec)
    for step in spec.row:
        computed = _widened(dtype, step.dtype)
        # The whole reduction is one operator: added up in float32, rounded at its end.
        computed = torch.float32 if step.op in ("mean", "sum") else computed
        statements.append(
            Statement(step.op, computed, (computed, step.dtype), str(step), step.value)
        )
        dtype = step.dtype
    return statements


def factor(spec: NormSpec) -> list[Statement]:
    """From a weight element to the factor the element program multiplies by."""
    if spec.weight is None or spec.weight_offset_dtype is None:
        return []
    computed = _widened(spec.weight, spec.weight_offset_dtype)
    roundings = (computed, spec.weight_offset_dtype)
    return [Statement("offset", computed, roundings, "offset", spec.weight_offset)]


def element(spec: NormSpec) -> list[Statement]:
    """From an element of x to the result, except that the last rounding is left to the store."""
    operands = {
        "mul_row": spec.row_dtype,
        "div_row": spec.row_dtype,
        "mul_weight": spec.weight if spec.weight_offset_dtype is None else spec.weight_offset_dtype,
        "add_bias": spec.bias,
    }
    statements = []
    dtype = spec.normed
    for step in spec.element:
        other = operands.get(step.op)
        # Without a weight (or bias) there is nothing to apply, as in the reference.
        op = "cast" if other is None else step.op
        computed = dtype
        if step.op != "cast":
            widened = _widened(dtype, step.dtype)
            computed = widened if other is None else torch.promote_types(widened, other)
        roundings: tuple[torch.dtype, ...] = (
            (computed, step.dtype) if op != "cast" else (step.dtype,)
        )
        if step is spec.element[-1]:
            roundings = () if computed == step.dtype else roundings[:-1]
        statements.append(Statement(op, computed, roundings, str(step)))
        dtype = step.dtype
    return statements


def single(value: float) -> float:
    """`value` as the float32 that torch makes of it; infinity beyond float32's range."""
    try:
        found: float = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        found = math.copysign(math.inf, value)
    return found


def _square_dtype(spec: NormSpec) -> torch.dtype:
    return spec.square if is_exact_cast(spec.normed, spec.square) else spec.normed


def _widened(dtype: torch.dtype, target: torch.dtype) -> torch.dtype:
    return target if is_exact_cast(dtype, target) else dtype
