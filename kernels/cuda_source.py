"""CUDA C++ source of the row kernel of one spec, hidden and schedule."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache

import torch

from fxpass.kernels import c_struct, gpu_rows, steps
from fxpass.kernels.cpu_source import header
from fxpass.kernels.steps import Statement
from fxpass.spec import NormSpec, is_narrow

_WORDS = {
    **c_struct.EXPRESSIONS,
    # Eager's operators on an NVIDIA GPU, 0 of 2,048 rows differ at six sizes: mean, and a division
    # by a Python number, multiply by the float32 inverse; rsqrt is MUFU.RSQ.
    "mean": "v * (1.0f / n)",
    "div_n": "v * (1.0f / n)",
    "rsqrt": "rsqrtf(v)",
    "sqrt": "__fsqrt_rn(v)",
    "reciprocal": "__fdiv_rn(1.0f, v)",
    "div_row": "divide(v, row)",
}
_QUALIFIERS = "static __device__ __forceinline__"
_KEPT_BYTES = 128
"""Of a row in one thread's registers: 32 of its 255."""
_REGISTERS = {
    "light": {1: 32, 2: 40, 3: 56, 4: 64, 8: 128},
    "float": {1: 32, 2: 32, 3: 56, 4: 56, 8: 96},
    "heavy": {1: 32, 2: 40, 3: 64, 4: 64, 5: 56, 7: 128, 8: 128},
}
"""Of a thread, about, by the kind of spec and its units: what it does well with on sm_90 if
everything is bf16. Left to itself the compiler takes up to half as many more, and rows wait for a
place."""
LANE_REGISTERS = 16_384 // 32
"""What the threads at one place of their warps share: a quarter of a multiprocessor has 16,384
registers, and a warp takes them by eights for each of its 32 threads."""
_MOST_BLOCKS = 32
"""Of a multiprocessor."""

AT_ONCE, LOADED, SUMMED, STORED = range(4)
"""Points of a row's work at which the next kernel may be launched. The first two are for grids
whose blocks spread evenly (`cuda_schedule`). LOADED: x is on its way, and so is a weight that is
loaded with it; what comes first that does not wait for other threads may be done as well."""


@dataclass(frozen=True)
class Schedule:
    """How rows are spread over threads. Changes no bit."""

    threads: int
    """Of a row in one block: a multiple of 32, or a power of two below."""
    rows: int
    """Of a block."""
    release: int = SUMMED
    """When the next kernel may be launched."""
    blocks: int = 1
    """Of a row: a cluster, each block with a segment (compute capability 9.0; one row a block)."""
    segment: int = 0
    """Units of 8 elements of a chunk in each of several blocks: a power of two, at least 32."""
    weight: int = 0
    """When a thread loads the weight: 0 with x, 1 before the threads of a row add up, 2 after.
    Of a row too long for the registers always after."""
    registers: int = 0
    """Of a thread at most, a multiple of 8: blocks that a multiprocessor has room for follow from
    it. 0: `_REGISTERS` has them."""
    again: bool = True
    """Widen the elements again after the sum: an instruction and a half more for each, and half the
    registers while the threads add up. Of 16-bit elements, and threads with several units."""
    last: bool = False
    """Have the L2 evict x and the residual last: for what is far larger than it."""


def refusal(spec: NormSpec) -> str | None:
    """Why no kernel can be generated for `spec`, or None."""
    return steps.refusal(spec, tuple(c_struct.C_TYPES))


@cache
def kind(spec: NormSpec) -> str:
    """How much a thread does with a unit.

    heavy: it reads more than one 16-bit unit at a place (a residual, or float32). float: the weight
    is multiplied in float32. light: it is a 16-bit product, two elements at a time.
    """
    if spec.residual is not None or spec.normed == torch.float32:
        return "heavy"
    return "float" if before_product(spec) is None else "light"


def source(spec: NormSpec, hidden: int, schedule: Schedule) -> str:
    """The translation unit. It exports the kernel `fxpass_run(FxArgs)`."""
    unscaled = before_product(spec)
    flags = {
        "exact_square": is_narrow(spec.normed) and steps.square(spec).computed == torch.float32,
        "ends_in_product": unscaled is not None,
    }
    more = None if unscaled is None else {"unscaled(V v, float row)": unscaled}
    block = schedule.threads * schedule.rows
    return "\n".join(
        [
            f"// {spec}",
            f"#define FX_HIDDEN {hidden}",
            f"#define FX_LANES {gpu_rows.lanes(hidden)}",
            f"#define FX_THREADS {schedule.threads}",
            f"#define FX_ROWS {schedule.rows}",
            f"#define FX_BLOCKS {schedule.blocks}",
            f"#define FX_SEGMENT {schedule.segment}",
            f"#define FX_RELEASE {schedule.release}",
            f"#define FX_WEIGHT {schedule.weight}",
            f"#define FX_KEPT_BYTES {_KEPT_BYTES}",
            f"#define FX_LAST {int(schedule.last)}",
            f"#define FX_AGAIN {int(schedule.again)}",
            header("cuda_pairs.h"),
            header("cuda_lanes.h"),
            header("cuda_units.h"),
            header("cuda_row.h"),
            *c_struct.struct(spec, _QUALIFIERS, _WORDS, flags, more),
            "#if __CUDA_ARCH__ == 900  // registers were counted there",
            f"#define FX_BOUNDS __launch_bounds__({block}, {room(spec, hidden, schedule)})",
            "#else",
            f"#define FX_BOUNDS __launch_bounds__({block})",
            "#endif",
            'extern "C" __global__ void FX_BOUNDS',
            *[f"__cluster_dims__({schedule.blocks}, 1, 1)"] * (schedule.blocks > 1),
            "fxpass_run(const __grid_constant__ FxArgs a) {",
            "  run_rows<Spec>(a);",
            "}",
            "",
        ]
    )


def room(spec: NormSpec, hidden: int, schedule: Schedule) -> int:
    """Blocks a multiprocessor has room for at least, which limits the registers. 1: unknown."""
    units = units_of_thread(hidden, schedule)
    registers = schedule.registers or _REGISTERS[kind(spec)].get(units)
    held = (spec.x, spec.residual, spec.weight, spec.bias, spec.normed, spec.out)
    if registers is None or not all(dtype is None or is_narrow(dtype) for dtype in held):
        return 1
    warps = 4 * (LANE_REGISTERS // registers)
    return min(_MOST_BLOCKS, max(1, warps // -(-schedule.threads * schedule.rows // 32)))


def units_of_thread(hidden: int, schedule: Schedule) -> int:
    """Units of 8 elements that a thread takes of a row, at most."""
    lanes = gpu_rows.lanes(hidden)
    segment = schedule.segment if schedule.blocks > 1 else -(-min(hidden, lanes) // gpu_rows.VECTOR)
    return -(-segment // schedule.threads) * -(-hidden // lanes)


def before_product(spec: NormSpec) -> list[Statement] | None:
    """The element program up to a last 16-bit product with the weight; None if it has none.

    Such a product is one instruction for two elements, with the same rounding.
    """
    if len(spec.element) < 2 or spec.weight_offset_dtype is not None:
        return None
    *before, last = steps.element(spec)
    dtypes = {spec.weight, spec.out, spec.element[-2].dtype, last.computed}
    if last.op != "mul_weight" or dtypes != {spec.out} or not is_narrow(spec.out):
        return None
    # Its input is rounded on the way into the register.
    kept = tuple(dtype for dtype in before[-1].roundings if dtype != spec.out)
    return [*before[:-1], dataclasses.replace(before[-1], roundings=kept)]
