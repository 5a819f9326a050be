"""C++ source of the row kernel of one spec: `cpu_row.h` plus a small generated struct.

Each statement (see `steps`) becomes one line that names its step in a comment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from fxpass.kernels import steps
from fxpass.kernels.steps import Statement
from fxpass.spec import NormSpec, is_narrow

C_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
OUTPUTS = ("out", "sum", "row")

_EXPRESSIONS = {
    "mean": "v / n",
    "sum": "v",
    "div_n": "v / n",
    "mul_n": "v * inverse_n",
    "add_eps": "v + eps",
    "sqrt": "__builtin_sqrtf(v)",
    "square": "v * v",
    # torch.rsqrt of float32 on a CPU is 1/sqrt with both operations correctly rounded: 0 of
    # 100,000 differ, against 23% for 1/sqrt in double rounded once.
    "rsqrt": "1.0f / __builtin_sqrtf(v)",
    "reciprocal": "1.0f / v",
    "cast": "v",
    "mul_row": "v * row",
    "div_row": "v / row",
    "mul_weight": "v * factor",
    "add_bias": "v + shift",
}


def refusal(spec: NormSpec) -> str | None:
    """Why no kernel can be generated for `spec`, or None."""
    if any(step.op == "rsqrt" and is_narrow(step.dtype) for step in spec.row):
        # Eager's 16-bit rsqrt rounds the root too in the last elements of a tensor, so its bits
        # depend on the number of rows: 30 % of bf16 values differ between the two places.
        return "a 16-bit rsqrt, whose bits in eager depend on the row's place"
    return steps.refusal(spec, tuple(C_TYPES))


def source(spec: NormSpec) -> str:
    """The translation unit of `spec`. It exports `void fxpass_run(const FxArgs*)`."""
    quiet = all(dtype == torch.bfloat16 for dtype in _inputs(spec))
    return "\n".join(
        [
            f"// {spec}",
            header("cpu_args.h"),
            "#define QUIET" if quiet else "",
            *row_header(_has_f16(spec)),
            "struct Spec {",
            *_indented(_types(spec)),
            *_function("square(V v)", [_line(steps.square(spec))], "V"),
            *_function(
                "row(float v, float n, float inverse_n, float eps)", map(_line, steps.row(spec))
            ),
            *_function("factor(V v)", map(_line, steps.factor(spec)), "V"),
            *_function(
                "element(V v, float row, V factor, V shift)", map(_line, steps.element(spec)), "V"
            ),
            "};",
            'extern "C" __attribute__((visibility("default"))) void fxpass_run(const FxArgs* a) {',
            "  run_rows<Spec>(*a);",
            "}",
            "",
        ]
    )


def row_header(wide: bool) -> list[str]:
    """The row kernel's text; `wide` puts the sixteen-element loops before those that use them."""
    before, mark, after = header("cpu_row.h").partition("// ---- One row")
    return [before, header("cpu_wide.h") if wide else "", mark + after]


@cache
def header(name: str) -> str:
    """Text of a C++ file of this folder, without what only makes sense in a file of its own."""
    lines = (Path(__file__).parent / name).read_text().splitlines()
    return "\n".join(line for line in lines if line != "#pragma once")


def _inputs(spec: NormSpec) -> list[torch.dtype]:
    found = (spec.x, spec.residual, spec.weight, spec.bias)
    return [dtype for dtype in found if dtype is not None]


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
    flags = {
        "has_residual": spec.residual is not None,
        "writes_sum": "sum" in spec.outputs,
        "writes_row": "row" in spec.outputs,
        "has_weight": spec.weight is not None,
        "has_bias": spec.bias is not None,
        "pairs": _second_pass_is_bf16(spec) and not _has_f16(spec),
    }
    return [
        f"typedef {'none' if dtype is None else C_TYPES[dtype]} {name};"
        for name, dtype in types.items()
    ] + [f"static constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]


def _has_f16(spec: NormSpec) -> bool:
    return any(dtype == torch.float16 for _, dtype in steps.dtypes_of(spec))


def _second_pass_is_bf16(spec: NormSpec) -> bool:
    """True if everything the second pass reads and writes is bf16 (20% faster, same bits)."""
    reads_sum = spec.residual is None or "sum" in spec.outputs
    dtypes = (spec.normed, spec.weight, spec.bias, spec.out)
    return reads_sum and all(dtype in (torch.bfloat16, None) for dtype in dtypes)


def _line(statement: Statement) -> str:
    expression = _expression(statement)
    assign = "" if expression == "v" else f"v = {expression};"
    roundings = "".join(f" v = rounded<{C_TYPES[dtype]}>(v);" for dtype in statement.narrow)
    return f"{assign}{roundings}  // {statement.comment}".lstrip()


def _expression(statement: Statement) -> str:
    if statement.op == "mul_const":
        return f"v * {_literal(1.0 if statement.value is None else statement.value)}"
    if statement.op == "offset":
        return f"v + {_literal(statement.value or 0.0)}"
    if statement.op == "clamp_eps":
        narrow = statement.computed != torch.float32
        bound = f"rounded<{C_TYPES[statement.computed]}>(eps)" if narrow else "eps"
        return f"v < {bound} ? {bound} : v"  # a NaN stays
    return _EXPRESSIONS[statement.op]


def _literal(value: float) -> str:
    """A float32 constant, exact. Beyond float32's range it is the infinity torch makes of it."""
    if math.isnan(value):
        return '__builtin_nanf("")'
    single = steps.single(value)
    if math.isinf(single):
        return "(-__builtin_inff())" if single < 0 else "__builtin_inff()"
    return f"({single.hex()}f)"


def _function(signature: str, body: Iterable[str], value: str = "float") -> list[str]:
    """A static function of the struct; for `V` a template over float and sixteen floats."""
    template = "template <class V> " if value == "V" else ""
    head = f"{template}static inline {value} {signature} {{"
    return _indented([head, *_indented(body), "  return v;", "}"])


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" for line in lines]
