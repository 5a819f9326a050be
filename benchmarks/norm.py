"""RMSNorm on a GPU, microseconds a call: our kernels, a copy of the same bytes, and the others.

    python benchmarks/norm.py --out build/bench            # the full grid, about 200 s on an H200
    python benchmarks/norm.py --out build/bench --quick    # our kernels and the copy, under 60 s
    python benchmarks/norm.py --show build/bench/norm.json
    python benchmarks/norm.py --device cpu --tiny          # does the script run? not a benchmark

Medians of CUDA-graph replays, all columns of a point in turns. hot: one buffer set. cold: inputs
and outputs rotate over four times the L2. Every column is compared with the eager code before it
is timed (`eq_eager`, share of equal elements); one of ours that differs is not timed, and the exit
code is 1. `of_copy` is the time of the fastest copy over the column's. Liger, FlashInfer, quack and
SGLang are columns where their packages are installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import gpu_fill
import torch
from gpu_cases import EAGER, Buffers, Case, Norm, cases
from gpu_named import IN_PLACE
from gpu_peers import compile_for_cache, copies, inductor_columns, ours, peers
from gpu_summary import summary
from gpu_timing import Budget, Recorder, add_arguments, header, medians, warm_up

DIFFER = 1e-4
"""Most elements of ours that may differ from eager, as a share: the sums are added in another
order. A few are allowed in any case, or one would fail a row of 128."""
DIFFER_ANY = 3
DIFFER_TOGETHER = 1 / 32
"""And of the elements of one row, which has few mantissas (128 in bf16): all with the same one move
together when the row's factor moves by one unit in the last place. 21 of 32,768 were seen so."""
FILL_SHARE = 0.4
"""Most of the budget that goes to filling compile caches."""
RESERVE_S = 4.0
"""Kept for the last results and the summary."""


class Bench:
    """One run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.wrong: dict[str, str] = {}
        """What of ours was not timed, and why; also peers that failed."""
        self.bad = False
        cuda = args.device == "cuda"
        self.cache = torch.cuda.get_device_properties(0).L2_cache_size if cuda else 1 << 14
        self.points: tuple[int, ...] = () if args.quick else tuple(args.inductor_points)

    def columns(self, case: Case) -> tuple[dict[str, Norm], set[str]]:
        """Everything the case is measured with but the copy, and the names that are ours."""
        others = {} if self.args.quick else peers(case, self.points)
        found, refused = ours(case, self.args.device)
        for name, why in refused.items():
            self.wrong[f"{name} refused {case.variant} {case.rounding} {case.hidden}"] = why
        return {**others, **found}, set(found)

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """The rows of one point."""
        columns, own = self.columns(case)
        rows: list[dict[str, Any]] = []
        equal: dict[str, float] = {}
        for mode in case.modes:
            sets = case.sets(mode, self.cache)
            buffers = Buffers(case, sets, self.args.device)
            if not equal:
                equal = self.check(case, columns, own, buffers)
            calls = {name: buffers.bind(columns[name]) for name in equal}
            estimate = max(1.0, case.moved / 4.2e6)
            calls = {**calls, **copies(case, sets, self.args.device)}
            failed: dict[str, str] = {}
            times = medians(calls, estimate, sets, self.args.device, failed)
            for name, why in failed.items():
                self.wrong[f"{name} not captured {case} {mode}"] = why
                self.bad |= name in own
            ceiling = min(us for name, us in times.items() if name not in equal)
            kept = {"copy": ceiling, **{n: us for n, us in times.items() if n in equal}}
            rows += [_row(case, mode, name, us, ceiling, equal) for name, us in kept.items()]
        return rows

    def check(
        self, case: Case, columns: dict[str, Norm], own: set[str], given: Buffers
    ) -> dict[str, float]:
        """Share of elements equal to eager's, by column; without columns that fail."""
        expected = _outputs(given.bind(EAGER[case.rounding])(0))
        equal = {}
        for name, column in columns.items():
            # Outputs are likely to get this memory, so an element not written shows.
            poison = [torch.full_like(tensor, torch.nan) for tensor in expected]
            del poison
            try:
                found = _outputs(given.bind(_sparing(column) if name in IN_PLACE else column)(0))
            except Exception as error:
                first = (str(error).splitlines() or [""])[0][:200]
                self.wrong[f"{name} failed {case}"] = f"{type(error).__name__}: {first}"
                self.bad |= name in own
                continue
            differ = [int((a != b).sum()) for a, b in zip(found, expected, strict=True)]
            share = 1 - differ[0] / expected[0].numel()
            allowed = DIFFER_ANY + DIFFER_TOGETHER * case.hidden + DIFFER * expected[0].numel()
            if name in own and (differ[0] > allowed or any(differ[1:])):
                self.wrong[f"{name} differs {case}"] = f"elements of out, sum: {differ}"
                self.bad = True
                continue
            equal[name] = share
        return equal


def _outputs(made: object) -> tuple[torch.Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def _sparing(norm: Norm) -> Norm:
    """Leaves the inputs as they are, for the other columns."""
    return lambda x, residual, weight: norm(
        x if residual is None else x.clone(), None if residual is None else residual.clone(), weight
    )


def _row(
    case: Case, mode: str, name: str, us: float, ceiling: float, equal: dict[str, float]
) -> dict[str, Any]:
    return {
        "variant": case.variant,
        "rounding": case.rounding,
        "dtype": case.dtype,
        "rows": case.rows,
        "hidden": case.hidden,
        "mode": mode,
        "kernel": name,
        "us": round(us, 3),
        "GB/s": round(case.moved / us / 1e3, 1),
        "of_copy": round(ceiling / us, 4),
        "eq_eager": round(equal[name], 6) if name in equal else None,
    }


def fill(bench: Bench, todo: list[Case]) -> None:
    """What one of the filling processes does: compile all that its share of the points needs."""
    groups: dict[tuple[str, ...], list[Case]] = {}
    for case in todo:
        key = (case.variant, case.rounding, case.dtype, str(case.hidden))
        groups.setdefault(key, []).append(case)
    for group in gpu_fill.share(list(groups.values()), bench.args.fill):
        for case in group:
            try:
                _fill_one(bench, case)
            except Exception:
                traceback.print_exc()
        if bench.args.device == "cuda":
            torch.cuda.empty_cache()


def _fill_one(bench: Bench, case: Case) -> None:
    given = Buffers(case, 1, bench.args.device)
    inputs = (given.x[0], given.residual[0], given.weight)
    for name in inductor_columns(case, bench.points):
        compile_for_cache(case, name, inputs)
    columns, own = bench.columns(case)
    for name, column in columns.items():
        if name in ("liger", "quack", "sgl") or name in own:  # they keep what they compile on disk
            column(*inputs)


def run(bench: Bench, todo: list[Case], budget: Budget) -> Recorder:
    """Measure as many points as the budget allows."""
    args = bench.args
    count = gpu_fill.workers(args, 12)
    filled = gpu_fill.fill(count, FILL_SHARE * args.budget, args.out / "norm_fill.log")
    print(f"caches: {filled}", file=sys.stderr, flush=True)
    warm_up(args.device)
    recorder = Recorder(args.out, "norm_quick" if args.quick else "norm", header(args))
    started, told = budget.spent, 0.0
    for done, case in enumerate(todo):
        if budget.left < RESERVE_S:
            recorder.about["cut"] = f"{done} of {len(todo)} points: {args.budget:.0f} s were over"
            break
        try:
            recorder.add(bench.measure(case))
        except RuntimeError as error:  # out of memory, say: the other points are still wanted
            bench.wrong[f"not measured: {case}"] = str(error).partition("\n")[0][:200]
            bench.bad = True
        if budget.spent - told > 10:
            told = budget.spent
            print(f"{told:.0f} s: {done + 1} of {len(todo)} points", file=sys.stderr, flush=True)
    recorder.about["seconds"] = {"before": round(started), "all": round(budget.spent)}
    recorder.about["not_measured"] = bench.wrong
    recorder.save()
    return recorder


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, budget=200)
    parser.add_argument("--quick", action="store_true", help="our kernels and the copy only")
    parser.add_argument(
        "--inductor-points",
        type=lambda text: [int(part) for part in text.split(",") if part],
        default=[1, 512, 8192, 32_768],
        metavar="ROWS,...",
        help="row counts at which Inductor's columns are measured; each costs a compile",
    )
    parser.add_argument("--plot", type=Path, help="also draw the picture (.svg or .png)")
    parser.add_argument("--show", type=Path, help="print the summary of a JSON file and stop")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.show:
        print(summary(json.loads(args.show.read_text())))
        return 0
    if args.quick:
        args.budget = min(args.budget, 60.0)
    budget = Budget(args.budget)
    gpu_fill.set_caches()
    if args.tiny:
        args.inductor_points = [8]
    bench = Bench(args)
    todo = cases(args.inductor_points, args.tiny, args.quick)
    with torch.no_grad():
        if args.fill:
            fill(bench, todo)
            return 0
        recorder = run(bench, todo, budget)
    if args.plot:
        from plot_norm import draw

        draw(recorder.record(), args.plot)
    print(summary(recorder.record()))
    return int(bench.bad)


if __name__ == "__main__":
    sys.exit(main())
