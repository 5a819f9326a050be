"""Which of several exact kernels `auto` takes first: a table of measurements, never a timing.

The order for a norm follows from its platform, variant and hidden, not from its rows: a model keeps
its kernels, hence its bits, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from fxpass.kernels.contract import Kernel
from fxpass.spec import NormSpec

SOURCE = "benchmarks/results/h200_norm.json"
"""What the figures were taken from; a test takes them again."""

Row = tuple[int, tuple[str, ...], float]
"""hidden up to, kernels in order, how many times faster the first is than the second: geometric
mean over both roundings, bf16, 1 to 32,768 rows, hot and cold."""

TABLE: dict[tuple[str, str], tuple[Row, ...]] = {
    ("cuda", "plain"): (
        (128, ("cuda.row", "triton.row"), 1.50),
        (512, ("cuda.row", "triton.row"), 1.48),
        (1024, ("cuda.row", "triton.row"), 1.38),
        (2048, ("cuda.row", "triton.row"), 1.33),
        (4096, ("cuda.row", "triton.row"), 1.31),
        (5120, ("cuda.row", "triton.row"), 1.33),
        (7168, ("cuda.row", "triton.row"), 1.30),
        (8192, ("cuda.row", "triton.row"), 1.30),
        (16384, ("cuda.row", "triton.row"), 1.35),
    ),
    ("cuda", "residual"): (
        (128, ("cuda.row", "triton.row"), 1.49),
        (512, ("cuda.row", "triton.row"), 1.38),
        (1024, ("cuda.row", "triton.row"), 1.33),
        (2048, ("cuda.row", "triton.row"), 1.34),
        (4096, ("cuda.row", "triton.row"), 1.29),
        (5120, ("cuda.row", "triton.row"), 1.34),
        (7168, ("cuda.row", "triton.row"), 1.28),
        (8192, ("cuda.row", "triton.row"), 1.31),
        (16384, ("cuda.row", "triton.row"), 1.48),
    ),
}


def variant(spec: NormSpec) -> str:
    """The measurements' word for a spec."""
    return "plain" if spec.residual is None else "residual"


def ordered(
    kernels: Sequence[Kernel], platform: str, spec: NormSpec, hidden: int | None
) -> list[Kernel]:
    """`kernels` with those that were measured in the order of the table, each in their places.

    A hidden between two measured ones takes the larger one's order, one beyond the last the last's.
    Unmeasured kernels, platforms and a hidden known only at run time stay as they are.
    """
    rows = TABLE.get((platform, variant(spec)), ())
    if not rows or hidden is None:
        return list(kernels)
    order = next((row[1] for row in rows if hidden <= row[0]), rows[-1][1])
    known = sorted(
        (kernel for kernel in kernels if kernel.name in order),
        key=lambda kernel: order.index(kernel.name),
    )
    places = iter(known)
    return [next(places) if kernel.name in order else kernel for kernel in kernels]
