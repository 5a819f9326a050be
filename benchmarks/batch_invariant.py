"""Batch-invariant matrix products on a GPU, microseconds a call, beside cuBLAS in the same run.

    python benchmarks/batch_invariant.py --out build/bench    # about 60 s on an H200
    python benchmarks/batch_invariant.py --device cpu --tiny  # only lists the points

Medians of CUDA-graph replays, all columns of a point in turns; weights rotate over more than the L2
holds, so that decode reads them from memory. Before anything is timed, the rows of every count are
compared with those of one row, bit by bit: a difference ends the run with exit code 1. `persistent`
is the plain persistent Triton kernel of the public batch-invariant libraries: tiles of 128 x 128,
64 of K at a time, whatever the number of rows. `of_cublas` is cuBLAS's time over the column's.
Whole models in the mode are a column of `model.py`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import gpu_fill
import torch
from gpu_timing import Budget, Recorder, add_arguments, header, medians, warm_up

SHAPES = ((4096, 4096), (4096, 14_336), (14_336, 4096), (4096, 6144), (4096, 151_936))
"""(K, N) of a model of Llama-3-8B's shape and a vocabulary of 151,936."""
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
COLD = 4
"""Times the L2 that the weights of one point fill together, at least."""
RESERVE_S = 3.0
MEAN, LEAST = 0.95, 0.85
"""What `of_cublas` should be: geometric mean, and every point."""


def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from fxpass.kernels.invariant import mm_gpu

    return mm_gpu.matmul(x, weight)


@functools.cache
def _persistent() -> Any:
    import batch_invariant_peer

    return batch_invariant_peer.matmul


def persistent(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _persistent()(x, weight)
    return out


COLUMNS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cublas": torch.mm,
    "ours": ours,
    "persistent": persistent,
}


def weights(k: int, n: int, count: int) -> list[torch.Tensor]:
    """(K, N), each column contiguous, as a linear layer's."""
    return [
        torch.randn(n, k, device="cuda", dtype=torch.bfloat16).mul_(k**-0.5).t()
        for _ in range(count)
    ]


def differing(x: torch.Tensor, weight: torch.Tensor, rows: tuple[int, ...]) -> dict[int, int]:
    """Rows of ours that are not those of one row alone, by number of rows."""
    alone = torch.cat([ours(x[i : i + 1], weight) for i in range(min(8, len(x)))])
    most = ours(x, weight)
    found = {len(x): int((most[: len(alone)] != alone).any(1).sum())}
    for m in rows:
        found[m] = int((ours(x[:m], weight) != most[:m]).any(1).sum())
    return found


def measure(k: int, n: int, m: int, x: torch.Tensor, sets: list[torch.Tensor]) -> dict[str, Any]:
    """One point."""
    estimate = max(2.0, 2 * k * n / 4.2e6, 2 * m * n * k / 7e8)
    calls = {
        name: functools.partial(lambda column, i: column(x[:m], sets[i]), column)
        for name, column in COLUMNS.items()
    }
    failed: dict[str, str] = {}
    for call in calls.values():
        call(0)  # compiles
    times = medians(calls, estimate, len(sets), "cuda", failed)
    row: dict[str, Any] = {"K": k, "N": n, "M": m}
    row |= {f"{name}_us": round(us, 3) for name, us in times.items()}
    for name in COLUMNS:
        if name != "cublas":
            row[f"{name}_of_cublas"] = round(times["cublas"] / times[name], 4)
    return row


def run(args: argparse.Namespace, budget: Budget) -> tuple[Recorder, bool]:
    """Measure as many points as the budget allows; and whether any bit differed."""
    filled = gpu_fill.fill(gpu_fill.workers(args, 12), 0.4 * args.budget, args.out / "mm_fill.log")
    print(f"caches: {filled}", file=sys.stderr, flush=True)
    warm_up("cuda")
    recorder = Recorder(args.out, "mm", header(args))
    recorder.about["rows_that_differ"] = wrong = {}
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    for k, n in SHAPES:
        x = torch.randn(max(ROWS), k, device="cuda", dtype=torch.bfloat16)
        sets = weights(k, n, max(1, min(16, -(-COLD * cache // (2 * k * n)))))
        found = differing(x, sets[0], ROWS)
        wrong[f"{k}x{n}"] = sum(found.values())
        if any(found.values()):
            return recorder, True
        for m in ROWS:
            if budget.left < RESERVE_S:
                recorder.about["cut"] = f"before {k} x {n}, {m} rows"
                break
            recorder.add([measure(k, n, m, x, sets)])
        del x, sets
        torch.cuda.empty_cache()
    recorder.save()
    return recorder, False


def fill(part: str) -> None:
    """Compile what every point needs, as one of several processes."""
    for (k, n), m in gpu_fill.share(list(itertools.product(SHAPES, ROWS)), part):
        x = torch.zeros(m, k, device="cuda", dtype=torch.bfloat16)
        weight = torch.zeros(n, k, device="cuda", dtype=torch.bfloat16).t()
        for column in (ours, persistent):
            column(x, weight)
        del x, weight
        torch.cuda.empty_cache()


def summary(rows: list[dict[str, Any]]) -> str:
    """A table, and how the targets are met."""
    lines = ["K      N       M     " + "".join(f"{name:>12}" for name in COLUMNS) + "   of cuBLAS"]
    for row in rows:
        times = "".join(f"{row[f'{name}_us']:12.2f}" for name in COLUMNS)
        place = f"{row['K']:<7}{row['N']:<8}{row['M']:<6}"
        lines.append(f"{place}{times}   {row['ours_of_cublas']:.3f}")
    for name in COLUMNS:
        if name != "cublas" and rows:
            found = [row[f"{name}_of_cublas"] for row in rows]
            mean = math.exp(sum(map(math.log, found)) / len(found))
            lines.append(f"{name}: geometric mean {mean:.4f}, least {min(found):.4f}")
    lines.append(f"wanted of ours: {MEAN} and {LEAST}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, budget=100)
    args = parser.parse_args()
    gpu_fill.set_caches()
    if args.device == "cpu":
        print(json.dumps({"shapes": SHAPES, "rows": ROWS, "columns": list(COLUMNS)}))
        return 0
    with torch.no_grad():
        if args.fill:
            fill(args.fill)
            return 0
        recorder, differs = run(args, Budget(args.budget))
    print(summary(recorder.rows))
    if differs:
        print(f"rows differ: {recorder.about['rows_that_differ']}", file=sys.stderr)
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
