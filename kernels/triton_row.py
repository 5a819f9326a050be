"""Row kernels in Triton, one per spec and hidden, for NVIDIA and AMD GPUs.

Batch-invariant: the reduction tree is `gpu_rows`'s, a function of hidden alone; the schedule may
follow the number of rows because it changes no bit. Triton compiles at the first launch; Inductor
inlines the same kernel (`inline`) and launches it without Python.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import Any

import torch

from fxpass.kernels import gpu_rows, steps, triton_source
from fxpass.kernels.contract import Contract, Hidden, Inline, Kernel, Layout, Outputs
from fxpass.spec import Inverse, NormSpec, Rounding

CONTRACT = Contract(
    platforms=("cuda", "rocm"),
    x=(torch.bfloat16, torch.float16, torch.float32),
    weight=("same", "other", "none"),
    hidden=Hidden(1, 65536),
    layout=Layout(rows="any", leading=gpu_rows.LEADING),
    rounding=tuple(Rounding),
    inverse=tuple(Inverse),
    programs="any",
    accumulate=torch.float32,
    residual=True,
    residual_rounded=True,
    weight_offset=True,
    weight_rows=True,
    bias=True,
    outputs=("out", "sum", "row"),
    mutates=(),
    deterministic=True,
    batch_invariant=True,
    reduction=gpu_rows.REDUCTION,
)

_SCHEDULES = (
    # lanes up to, rows per program, warps
    (8, 64, 2),
    (16, 32, 2),
    (32, 16, 2),
    (64, 8, 2),
    (128, 4, 2),
    (256, 2, 2),
    (512, 1, 1),
    (1024, 1, 2),
    (2048, 1, 4),
)
"""Each thread holds at least 8 elements of a row: 16 bytes of a 16-bit dtype."""
_LONG = 4096
_LONG_WARPS = 8
_FEW_ROWS = 264
"""Twice the multiprocessors of an H200: below that a row is spread over more threads."""
_VECTOR_WARP = gpu_rows.VECTOR * 32


def schedule(hidden: int, dtype: torch.dtype, rows: int | None) -> tuple[int, int]:
    """(rows per program, warps) for `rows` rows (None: unknown) of `hidden` elements."""
    del dtype
    lanes = gpu_rows.lanes(hidden)
    if hidden > _LONG:
        return 1, _LONG_WARPS
    if rows is not None and rows <= _FEW_ROWS:
        return max(1, _VECTOR_WARP // lanes), max(1, lanes // _VECTOR_WARP)
    return next((r, warps) for most, r, warps in _SCHEDULES if lanes <= most)


def inline(spec: NormSpec, hidden: int, rows: int | None) -> Inline:
    """The kernel for a compiler to launch, as ceil(rows / rows_per_program) programs."""
    rows_per_program, warps = schedule(hidden, spec.normed, rows)
    return Inline(
        kernel=_kernel(spec, hidden, rows_per_program),
        num_warps=warps,
        rows_per_program=rows_per_program,
        parameters=triton_source.parameters(spec),
    )


def refusal(spec: NormSpec) -> str | None:
    """Why no kernel can be generated for `spec`, or None."""
    return steps.refusal(spec, tuple(triton_source.TYPES))


def prepare(spec: NormSpec, hidden: int | None) -> str | None:
    """None, or why there is no kernel for `hidden`. Triton compiles at the first launch."""
    return refusal(spec) or CONTRACT.hidden.refusal(hidden) or _no_triton()


def unavailable() -> str | None:
    """None, or why no kernel can run here."""
    return _no_triton() or (None if torch.cuda.is_available() else "torch finds no GPU")


def launch(
    spec: NormSpec,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Outputs:
    """Run the kernel of `spec` on x's device. Shapes as in `contract.Launch`."""
    hidden = x.shape[-1]
    made = {
        "out": torch.empty(x.shape, dtype=spec.out, device=x.device),
        "sum": torch.empty(x.shape, dtype=spec.normed, device=x.device),
        "row": torch.empty((*x.shape[:-1], 1), dtype=spec.row_dtype, device=x.device),
    }
    outputs = tuple(made[name] for name in spec.outputs)
    if not x.numel():
        return outputs
    values = {**made, **_arguments(x, residual, weight, bias), "eps": eps}
    found = inline(spec, hidden, values["rows"])
    grid = (-(-values["rows"] // found.rows_per_program),)
    with torch.cuda.device(x.device):
        found.kernel[grid](*(values[n] for n in found.parameters), num_warps=found.num_warps)
    return outputs
