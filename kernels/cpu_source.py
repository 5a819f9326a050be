"""C++ source of the row kernel of one spec: `cpu_row.h` plus a small generated struct.

Each step becomes one statement, named in a comment, followed by the rounding that eager applies.
Eager computes an operator in the promoted dtype of its operands and casts the result to the step's
dtype; both roundings are emitted, and none where the first dtype is float32.
"""

from __future__ import annotations

import math
import struct
from functools import cache
from pathlib import Path

import torch

from fxpass.dtypes import is_exact_cast, short
from fxpass.spec import NormSpec, Step, is_narrow

C_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
OUTPUTS = ("out", "sum", "row")

_ROW_STATEMENTS = {
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
}


def refusal(spec: NormSpec) -> str | None:
    """Why no kernel can be generated for `spec`, or None."""
    for role, dtype in _dtypes(spec):
        if dtype not in C_TYPES:
            return f"{role} is {short(dtype)}, needs {' or '.join(C_TYPES.values())}"
    reductions = [step.op in ("mean", "sum") for step in spec.row]
    if not reductions or not reductions[0] or any(reductions[1:]):
        return f"row program {','.join(map(str, spec.row))} must start with its only mean or sum"
    if any(step.op == "rsqrt" and is_narrow(step.dtype) for step in spec.row):
        # Eager's 16-bit rsqrt rounds the root too in the last elements of a tensor, so its bits
        # depend on the number of rows: 30 % of bf16 values differ between the two places.
        return "a 16-bit rsqrt, whose bits in eager depend on the row's place"
    if "out" not in spec.outputs or spec.outputs != tuple(o for o in OUTPUTS if o in spec.outputs):
        return f"outputs {','.join(spec.outputs)}, needs a part of {','.join(OUTPUTS)} with out"
    if "sum" in spec.outputs and spec.residual is None:
        return "outputs sum without a residual"
    return None


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
            *_function("square(V v)", _square(spec), "V"),
            *_function("row(float v, float n, float inverse_n, float eps)", _row(spec)),
            *_function("factor(V v)", _factor(spec), "V"),
            *_function("element(V v, float row, V factor, V shift)", _element(spec), "V"),
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


def _dtypes(spec: NormSpec) -> list[tuple[str, torch.dtype]]:
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
    return any(dtype == torch.float16 for _, dtype in _dtypes(spec))


def _second_pass_is_bf16(spec: NormSpec) -> bool:
    """True if everything the second pass reads and writes is bf16 (20% faster, same bits)."""
    reads_sum = spec.residual is None or "sum" in spec.outputs
    dtypes = (spec.normed, spec.weight, spec.bias, spec.out)
    return reads_sum and all(dtype in (torch.bfloat16, None) for dtype in dtypes)


def _square(spec: NormSpec) -> list[str]:
    computed = spec.square if is_exact_cast(spec.normed, spec.square) else spec.normed
    return [f"v = v * v;{_round(computed)}  // square:{short(computed)}"]


def _row(spec: NormSpec) -> list[str]:
    lines = []
    dtype = spec.square if is_exact_cast(spec.normed, spec.square) else spec.normed
    for step in spec.row:
        computed = step.dtype if is_exact_cast(dtype, step.dtype) else dtype
        # The whole reduction is one operator: added up in float32, rounded at its end.
        computed = torch.float32 if step.op in ("mean", "sum") else computed
        lines.append(_statement(_row_expression(step, computed), [computed, step.dtype], step))
        dtype = step.dtype
    return lines


def _row_expression(step: Step, computed: torch.dtype) -> str:
    if step.op == "mul_const":
        return f"v * {_literal(1.0 if step.value is None else step.value)}"
    if step.op == "clamp_eps":
        bound = "eps" if computed == torch.float32 else f"rounded<{C_TYPES[computed]}>(eps)"
        return f"v < {bound} ? {bound} : v"  # a NaN stays
    return _ROW_STATEMENTS[step.op]


def _factor(spec: NormSpec) -> list[str]:
    if spec.weight is None or spec.weight_offset_dtype is None:
        return []
    computed = _widened(spec.weight, spec.weight_offset_dtype)
    rounding = _rounds([computed, spec.weight_offset_dtype])
    return [f"v = v + {_literal(spec.weight_offset)};{rounding}  // offset"]


def _element(spec: NormSpec) -> list[str]:
    """Every step, except that the last rounding is left to the store."""
    operand = {
        "mul_row": ("v * row", spec.row_dtype),
        "div_row": ("v / row", spec.row_dtype),
        "mul_weight": ("v * factor", _factor_dtype(spec)),
        "add_bias": ("v + shift", spec.bias),
    }
    lines = []
    dtype = spec.normed
    for step in spec.element:
        expression, other = operand.get(step.op, ("v", None))
        if step.op != "cast" and other is None:
            expression = "v"  # no weight (or bias): nothing to apply, as in the reference
        computed = dtype
        if step.op != "cast":
            widened = _widened(dtype, step.dtype)
            computed = widened if other is None else torch.promote_types(widened, other)
        roundings = [computed, step.dtype] if expression != "v" else [step.dtype]
        if step is spec.element[-1]:
            roundings = [] if computed == step.dtype else roundings[:-1]
        lines.append(_statement(expression, roundings, step))
        dtype = step.dtype
    return lines


def _factor_dtype(spec: NormSpec) -> torch.dtype | None:
    return spec.weight if spec.weight_offset_dtype is None else spec.weight_offset_dtype


def _widened(dtype: torch.dtype, target: torch.dtype) -> torch.dtype:
    return target if is_exact_cast(dtype, target) else dtype


def _statement(expression: str, roundings: list[torch.dtype], step: Step) -> str:
    assign = "" if expression == "v" else f"v = {expression};"
    return f"{assign}{_rounds(roundings)}  // {step}".lstrip()


def _rounds(dtypes: list[torch.dtype]) -> str:
    distinct = [dtype for i, dtype in enumerate(dtypes) if i == 0 or dtype != dtypes[i - 1]]
    return "".join(map(_round, distinct))


def _round(dtype: torch.dtype) -> str:
    return "" if dtype == torch.float32 else f" v = rounded<{C_TYPES[dtype]}>(v);"


def _literal(value: float) -> str:
    """A float32 constant, exact. Beyond float32's range it is the infinity torch makes of it."""
    if math.isnan(value):
        return '__builtin_nanf("")'
    try:
        single = struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        single = math.copysign(math.inf, value)
    if math.isinf(single):
        return "(-__builtin_inff())" if single < 0 else "__builtin_inff()"
    return f"({single.hex()}f)"


def _function(signature: str, body: list[str], value: str = "float") -> list[str]:
    """A static function of the struct; for `V` a template over float and sixteen floats."""
    template = "template <class V> " if value == "V" else ""
    head = f"{template}static inline {value} {signature} {{"
    return _indented([head, *_indented(body), "  return v;", "}"])


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
