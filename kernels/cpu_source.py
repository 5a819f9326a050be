"""C++ source of the CPU row kernel of one spec: `cpu_row.h` plus the generated struct."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from fxpass.kernels import c_struct, steps
from fxpass.kernels.c_struct import C_TYPES, OUTPUTS
from fxpass.spec import NormSpec, is_narrow

__all__ = ["OUTPUTS", "header", "refusal", "source"]

# torch.rsqrt of float32 on a CPU is 1/sqrt with both operations correctly rounded: 0 of 100,000
# differ, against 23% for 1/sqrt in double rounded once. c_struct.EXPRESSIONS writes it so.


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
    pairs = _second_pass_is_bf16(spec) and not _has_f16(spec)
    return "\n".join(
        [
            f"// {spec}",
            header("cpu_args.h"),
            "#define QUIET" if quiet else "",
            *row_header(_has_f16(spec)),
            *c_struct.struct(spec, flags={"pairs": pairs}),
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


def _has_f16(spec: NormSpec) -> bool:
    return any(dtype == torch.float16 for _, dtype in steps.dtypes_of(spec))


def _second_pass_is_bf16(spec: NormSpec) -> bool:
    """True if everything the second pass reads and writes is bf16 (20% faster, same bits)."""
    reads_sum = spec.residual is None or "sum" in spec.outputs
    dtypes = (spec.normed, spec.weight, spec.bias, spec.out)
    return reads_sum and all(dtype in (torch.bfloat16, None) for dtype in dtypes)
