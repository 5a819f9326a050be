"""The statements of a spec in Triton: how each operation is written, one line a statement.

A product that meets an addition is contracted into a fused multiply-add where the compiler sees
both in one thread. `tl.fma(a, b, minus_zero)` is the rounded product, with its sign, and cannot be
contracted; whoever uses these lines defines `minus_zero`, with a value the compiler does not know.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

import torch

from fxpass.kernels.steps import Statement, single
from fxpass.spec import is_narrow

TYPES = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}
EXPRESSIONS = {
    "mean": "{v} * {inverse_n}",
    "sum": "{v}",
    "div_n": "{v} * {inverse_n}",
    "mul_n": "{v} * {inverse_n}",
    "mul_const": "{v} * {constant}",
    "add_eps": "{v} + eps",
    "clamp_eps": "tl.where({v} < {bound}, {bound}, {v})",  # a NaN stays
    "sqrt": "tl.sqrt_rn({v})",
    "square": "{v} * {v}",
    "rsqrt": "tl.rsqrt({v} * {up}) * {down}",
    "reciprocal": "tl.div_rn(1.0, {v})",
    "cast": "{v}",
    "offset": "{v} + {constant}",
    "mul_row": "{v} * row_value",
    "div_row": "tl.div_rn({v}, row_value)",
    "mul_weight": "{v} * factor",
    "add_bias": "{v} + shift",
}
"""How each operation is written, on float32 values, as eager computes it on a GPU.

Eager divides by the row's length as it multiplies: by a float32 inverse, the same for every hidden
up to 2**17 whether the division is in float32 or float64. 0 of 2,048 rows differ at six sizes.
tl.rsqrt flushes subnormals on NVIDIA; eager's scales them, and so the powers of two.
"""
_PRODUCTS = ("mean", "div_n", "mul_n", "mul_const", "square", "mul_row", "mul_weight")
_ADDITIONS = ("add_eps", "add_bias")


def lines(statements: list[Statement], name: str, hidden: int) -> Iterator[str]:
    """Assignments to the float32 variable `name`, one for each statement."""
    for statement, guarded in zip(statements, _meets_addition(statements), strict=True):
        expression = _expression(statement, name, hidden)
        if guarded:
            left, _, right = expression.partition(" * ")
            expression = f"tl.fma({left}, {right}, minus_zero)"
        elif statement.narrow and " " in expression:
            expression = f"({expression})"
        value = f"{expression}{rounded(statement)}"
        yield f"{'' if value == name else f'{name} = {value}  '}# {statement.comment}"


def rounded(statement: Statement) -> str:
    """What a value goes through after the operation."""
    return "".join(f".to({TYPES[dtype]}).to(tl.float32)" for dtype in statement.narrow)


def _expression(statement: Statement, name: str, hidden: int) -> str:
    bound = "eps"
    if is_narrow(statement.computed):
        bound = f"eps.to({TYPES[statement.computed]}).to(tl.float32)"
    small = f"{name} < {torch.finfo(torch.float32).tiny}"
    return EXPRESSIONS[statement.op].format(
        v=name,
        inverse_n=_literal(1.0 / hidden),
        constant=_literal(_constant(statement)),
        bound=bound,
        up=f"tl.where({small}, 16777216.0, 1.0)",
        down=f"tl.where({small}, 4096.0, 1.0)",
    )


def _constant(statement: Statement) -> float:
    if statement.value is not None:
        return statement.value
    return 1.0 if statement.op == "mul_const" else 0.0


def _meets_addition(statements: list[Statement]) -> list[bool]:
    """For each statement whether it is a product and an addition is the next operation.

    A 16-bit rounding between the two is no protection: the compiler may do both in 16 bits.
    """
    found = []
    following = ""
    for statement in reversed(statements):
        found.append(statement.op in _PRODUCTS and following in _ADDITIONS)
        following = following if statement.op == "cast" else statement.op
    return found[::-1]


def _literal(value: float) -> str:
    """A float32 constant. Triton would lose the sign of -0.0 and widen a subnormal to float64."""
    value = single(value)
    if math.isfinite(value) and abs(value) >= torch.finfo(torch.float32).tiny:
        return repr(value)
    (bits,) = struct.unpack("i", struct.pack("f", value))
    return f"tl.full([], {bits}, tl.int32).to(tl.float32, bitcast=True)"
