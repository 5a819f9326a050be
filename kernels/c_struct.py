"""`struct Spec`: the statements of one spec in C++, for the row templates of the CPU and of CUDA.

The templates read its types, its flags and four functions: `square`, `row`, `factor`, `element`.
They are over `V`, which is a float, or on the CPU also sixteen of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from fxpass.kernels import steps
from fxpass.kernels.steps import Statement
from fxpass.spec import NormSpec

C_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
OUTPUTS = ("out", "sum", "row")

EXPRESSIONS = {
    "mean": "v / n",
    "sum": "v",
    "div_n": "v / n",
    "mul_n": "v * inverse_n",
    "add_eps": "v + eps",
    "sqrt": "__builtin_sqrtf(v)",
    "square": "v * v",
    "rsqrt": "1.0f / __builtin_sqrtf(v)",
    "reciprocal": "1.0f / v",
    "cast": "v",
    "mul_row": "v * row",
    "div_row": "v / row",
    "mul_weight": "v * factor",
    "add_bias": "v + shift",
}
"""How each operation is written; a generator may have its own words for some."""


def struct(
    spec: NormSpec,
    qualifiers: str = "static inline",
    words: Mapping[str, str] = EXPRESSIONS,
    flags: Mapping[str, bool] | None = None,
    more: Mapping[str, list[Statement]] | None = None,
) -> list[str]:
    """The lines of `struct Spec`, with constants and functions that only some templates need."""

    def lines(statements: Iterable[Statement]) -> list[str]:
        return [_line(statement, words) for statement in statements]

    row = "row(float v, float n, float inverse_n, float eps)"
    element = "element(V v, float row, V factor, V shift)"
    more_lines = [
        line
        for signature, statements in (more or {}).items()
        for line in _function(qualifiers, signature, lines(statements), "V")
    ]
    return [
        "struct Spec {",
        *_indented(_types(spec)),
        *_indented(_constants({**_flags(spec), **(flags or {})})),
        *_function(qualifiers, "square(V v)", lines([steps.square(spec)]), "V"),
        *_function(qualifiers, row, lines(steps.row(spec))),
        *_function(qualifiers, "factor(V v)", lines(steps.factor(spec)), "V"),
        *_function(qualifiers, element, lines(steps.element(spec)), "V"),
        *more_lines,
        "};",
    ]


def _types(spec: NormSpec) -> list[str]:
    types = {
        "X": spec.x,
        "Residual": spec.residual,
        "Sum": spec.normed if spec.residual is not None else None,
        "Weight": spec.weight,
        "Bias": spec.bias,
        "Out": spec.out,
        "RowValue": spec.row_dtype,
    }
    return [
        f"typedef {'none' if dtype is None else C_TYPES[dtype]} {name};"
        for name, dtype in types.items()
    ]


def _flags(spec: NormSpec) -> dict[str, bool]:
    return {
        "has_residual": spec.residual is not None,
        "writes_sum": "sum" in spec.outputs,
        "writes_row": "row" in spec.outputs,
        "has_weight": spec.weight is not None,
        "has_bias": spec.bias is not None,
    }


def _constants(flags: Mapping[str, bool]) -> list[str]:
    return [f"static constexpr bool {name} = {str(v).lower()};" for name, v in flags.items()]


def _line(statement: Statement, words: Mapping[str, str]) -> str:
    expression = _expression(statement, words)
    assign = "" if expression == "v" else f"v = {expression};"
    roundings = "".join(f" v = rounded<{C_TYPES[dtype]}>(v);" for dtype in statement.narrow)
    return f"{assign}{roundings}  // {statement.comment}".lstrip()


def _expression(statement: Statement, words: Mapping[str, str]) -> str:
    if statement.op == "mul_const":
        return f"v * {_literal(1.0 if statement.value is None else statement.value)}"
    if statement.op == "offset":
        return f"v + {_literal(statement.value or 0.0)}"
    if statement.op == "clamp_eps":
        narrow = statement.computed != torch.float32
        bound = f"rounded<{C_TYPES[statement.computed]}>(eps)" if narrow else "eps"
        return f"v < {bound} ? {bound} : v"  # a NaN stays
    return words[statement.op]


def _literal(value: float) -> str:
    """A float32 constant, exact. Beyond float32's range it is the infinity torch makes of it."""
    if math.isnan(value):
        return '__builtin_nanf("")'
    single = steps.single(value)
    if math.isinf(single):
        return "(-__builtin_inff())" if single < 0 else "__builtin_inff()"
    return f"({single.hex()}f)"


def _function(
    qualifiers: str, signature: str, body: Iterable[str], value: str = "float"
) -> list[str]:
    """A static function of the struct; for `V` a template over what it computes with."""
    template = "template <class V> " if value == "V" else ""
    head = f"{template}{qualifiers} {value} {signature} {{"
    return _indented([head, *_indented(body), "  return v;", "}"])


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
