"""CUDA C++ source of the row kernel of one spec, hidden and schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxpass.kernels import c_struct, gpu_rows, steps
from fxpass.kernels.cpu_source import header
from fxpass.spec import NormSpec, is_narrow

_WORDS = {
    **c_struct.EXPRESSIONS,
    # Eager's operators on an NVIDIA GPU: mean multiplies by a float32 factor, rsqrt is MUFU.RSQ.
    "mean": "v * inverse_n",
    "rsqrt": "rsqrtf(v)",
    "sqrt": "__fsqrt_rn(v)",
    "reciprocal": "__fdiv_rn(1.0f, v)",
    "div_n": "__fdiv_rn(v, n)",
    "div_row": "__fdiv_rn(v, row)",
}
_QUALIFIERS = "static __device__ __forceinline__"
_KEPT_BYTES = 256
"""Of a row in one thread's registers: 64 of its 255."""


@dataclass(frozen=True)
class Schedule:
    """How rows are spread over threads. Changes no bit."""

    threads: int
    """Of a row: a power of two, at most lanes / 8."""
    rows: int
    """Of a block."""


def refusal(spec: NormSpec) -> str | None:
    """Why no kernel can be generated for `spec`, or None."""
    return steps.refusal(spec, tuple(c_struct.C_TYPES))


def source(spec: NormSpec, hidden: int, schedule: Schedule) -> str:
    """The translation unit. It exports the kernel `fxpass_run(FxArgs)`."""
    exact = is_narrow(spec.normed) and steps.square(spec).computed == torch.float32
    return "\n".join(
        [
            f"// {spec}",
            f"#define FX_HIDDEN {hidden}",
            f"#define FX_LANES {gpu_rows.lanes(hidden)}",
            f"#define FX_THREADS {schedule.threads}",
            f"#define FX_ROWS {schedule.rows}",
            f"#define FX_KEPT_BYTES {_KEPT_BYTES}",
            header("cuda_row.h"),
            *c_struct.struct(spec, _QUALIFIERS, _WORDS, {"exact_square": exact}),
            f'extern "C" __global__ void __launch_bounds__({schedule.threads * schedule.rows})',
            "fxpass_run(const __grid_constant__ FxArgs a) {",
            "  run_rows<Spec>(a);",
            "}",
            "",
        ]
    )
