"""Row kernels in Triton, one per spec and hidden, for NVIDIA and AMD GPUs.

Batch-invariant: the reduction tree is `gpu_rows`'s, a function of hidden alone; the schedule may
follow the number of rows because it changes no bit. Triton compiles at the first launch; Inductor
inlines the same kernel (`inline`) and launches it without Python.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch

from fxpass.kernels import gpu_rows, steps, triton_source, triton_tiles, triton_words
from fxpass.kernels.build_cache import BuildError
from fxpass.kernels.contract import Inline, Kernel, Outputs
from fxpass.kernels.gpu_contract import contract
from fxpass.kernels.triton_call import Compiled, RowCall
from fxpass.spec import NormSpec

CONTRACT = contract("cuda", "rocm")

_SCHEDULES = {
    # lanes: (rows per program, warps) for many rows, and for few
    8: ((64, 2), (32, 1)),
    16: ((32, 2), (16, 1)),
    32: ((16, 2), (8, 1)),
    64: ((8, 2), (4, 1)),
    128: ((4, 2), (2, 1)),
    256: ((2, 2), (1, 1)),
    512: ((1, 1), (1, 2)),
    1024: ((1, 2), (1, 4)),
    2048: ((1, 4), (1, 8)),
    4096: ((1, 8), (1, 16)),
    8192: ((1, 8), (1, 16)),
}
"""Threads hold 8 to 32 elements of a row, so that they read 16 bytes of a 16-bit dtype at once.

Several rows only where one row is no more than a warp reads: Triton lays warps along a row first.
"""
_FEW_ROWS = 264
"""Twice the multiprocessors of an H200: below that a row is spread over more threads."""
_LAST_FROM = 256_000_000
"""Bytes that are moved, five times an H200's L2, from which on it is to evict last what is read."""


class Schedule(NamedTuple):
    """How rows are spread over threads. Changes no bit."""

    rows_per_program: int
    warps: int
    cut: bool = False
    """Whether a row is read in `triton_tiles.pieces`."""
    last: bool = False
    """Whether caches are to evict what is read last."""


def schedule(spec: NormSpec, hidden: int, rows: int | None) -> Schedule:
    """The schedule for `rows` rows (None: unknown)."""
    many, few = _SCHEDULES[gpu_rows.lanes(hidden)]
    if rows is not None and rows <= _FEW_ROWS:
        return Schedule(*few)  # each piece is one more exchange to wait for
    last = rows is not None and rows * gpu_rows.moved(spec, hidden) >= _LAST_FROM
    widths = triton_tiles.pieces(hidden)
    if len(widths) == 1 or hidden > gpu_rows.MOST_LANES:
        return Schedule(*many, len(widths) > 1, last)
    # 16 bytes of the last piece, up to 64 of the first: 1756 instructions of all warps at hidden
    # 5120, 2088 if spread over twice the warps, 2848 without pieces (PTX).
    return Schedule(1, max(widths[0] // 1024, widths[-1] // 256), True, last)


def inline(spec: NormSpec, hidden: int, rows: int | None) -> Inline:
    """The kernel for a compiler to launch, as ceil(rows / rows_per_program) programs."""
    found = schedule(spec, hidden, rows)
    return Inline(
        kernel=_kernel(spec, hidden, found.rows_per_program, found.cut, found.last),
        num_warps=found.warps,
        rows_per_program=found.rows_per_program,
        parameters=triton_source.parameters(spec),
    )


def refusal(spec: NormSpec) -> str | None:
    """Why no kernel can be generated for `spec`, or None."""
    return steps.refusal(spec, tuple(triton_words.TYPES))


def prepare(spec: NormSpec, hidden: int | None) -> str | None:
    """None, or why there is no kernel for `hidden`. Triton compiles at the first launch."""
    return refusal(spec) or CONTRACT.hidden.refusal(hidden) or _no_triton()


def unavailable() -> str | None:
    """None, or why no kernel can run here."""
    return _no_triton() or (None if torch.cuda.is_available() else "torch finds no GPU")


def bound(spec: NormSpec) -> Callable[..., Any]:
    """(x, residual, weight, bias, eps) -> a tensor, or a tuple if the spec has more outputs.

    Raises BuildError without Triton.
    """
    why_not = _no_triton()
    if why_not is not None:
        raise BuildError(why_not)

    def choose(hidden: int, rows: int) -> Compiled:
        made = inline(spec, hidden, rows)
        return Compiled(made.kernel, made.rows_per_program, made.num_warps)

    return RowCall(spec, choose)


def launch(
    spec: NormSpec,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Outputs:
    """Run the kernel of `spec` on x's device. Shapes as in `contract.Launch`."""
    made = _bound(spec)(x, residual, weight, bias, eps)
    return made if isinstance(made, tuple) else (made,)


_bound = cache(bound)


@cache
def _kernel(spec: NormSpec, hidden: int, rows_per_program: int, cut: bool, last: bool) -> Any:
    return triton_source.kernel(triton_source.source(spec, hidden, rows_per_program, cut, last))


def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


KERNEL = Kernel(
    "triton.row",
    CONTRACT,
    launch,
    prepare,
    unavailable,
    refuses=refusal,
    bound=bound,
    inline=inline,
)
