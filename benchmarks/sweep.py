"""Which schedule of `cuda.row` is the fastest at a point: all legal ones, timed as norm.py does.

    python benchmarks/sweep.py --out build/bench plain:cast:bf16:512x4096,5120 qk:scale:fp16:8x128

What it finds goes into kernels/cuda_*tables.py. First every way to spread rows over threads is
timed, then the fastest of them with every time to load the weight and to let the next kernel in, in
turns with the schedule in use, a copy and other projects' kernels. No schedule changes a bit
(tests/test_gpu_schedules.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from gpu_cases import CAST_FIRST, SCALE_FIRST, Buffers, Case, Norm
from gpu_fill import set_caches
from gpu_named import named
from gpu_peers import bound, copies, peers
from gpu_timing import Budget, Recorder, add_arguments, header, medians, warm_up
from tabulate import tabulate

from fxpass.kernels import cuda_schedule, cuda_source, gpu_rows
from fxpass.kernels.build_cache import BuildError
from fxpass.kernels.cuda_call import RowKernel
from fxpass.kernels.cuda_source import AT_ONCE, LOADED, STORED, SUMMED, Schedule
from fxpass.spec import NormSpec

SHORTLIST = 3
"""Spreads that are timed with all moments."""
EACH = (1, 2, 3, 4, 5, 6, 7, 8)
"""Units of a thread."""
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)
"""Of a block."""
WIDE = 64
"""Threads of a row above which a block takes two at most."""
SEGMENTS = (32, 64, 128, 256, 512)
PER_BLOCK = (1, 2, 4)
"""Units of a thread of a cluster."""
MOST_CLUSTERED = 4096
"""Rows of one chunk from which on clusters are not tried."""
LEAST, MOST = 32, 160
"""Registers of a thread."""
LARGE = 128_000_000
"""Bytes moved from which on the next kernel has no room to come in before the sum."""
Moment = tuple[int, int, bool]
"""When the weight is loaded, when the next kernel is let in, whether elements are widened again."""
FIRST: tuple[Moment, ...] = ((1, SUMMED, True), (0, LOADED, True))
FIRST_OF_LARGE: tuple[Moment, ...] = ((0, SUMMED, True),)
MOMENTS: tuple[Moment, ...] = tuple(
    (weight, release, again)
    for release, weights in ((AT_ONCE, (0, 1, 2)), (LOADED, (0, 2)), (SUMMED, (0, 1, 2)))
    for weight in weights
    for again in (True, False)
)
MORE_OF_LARGE: tuple[Moment, ...] = tuple((weight, STORED, True) for weight in range(3))


def candidates(case: Case, clusters: bool, several: bool) -> Iterator[Schedule]:
    """Ways to spread a row. Some are not legal: NVRTC refuses those.

    clusters: also over several blocks. several: also blocks of several rows.
    """
    lanes = gpu_rows.lanes(case.hidden)
    units = -(-min(case.hidden, lanes) // gpu_rows.VECTOR)
    found = set()
    for each in EACH:
        threads = cuda_schedule.threads_of(units, each)
        fill = max(1, 32 // threads)  # rows of a warp
        most = min(max(fill, case.normed_rows), 1024 // threads, 2 if threads > WIDE else 1024)
        most = most if several else fill
        found |= {Schedule(threads, n * fill) for n in ROWS if n * fill <= most}
    if clusters and (case.hidden > lanes or case.rows <= MOST_CLUSTERED):
        for segment, each in itertools.product(SEGMENTS, PER_BLOCK):
            blocks = -(-units // segment)
            if segment // each >= 32 and 2 <= blocks <= 8:
                found.add(Schedule(segment // each, 1, blocks=blocks, segment=segment))
    for one in sorted(found, key=dataclasses.astuple):
        yield from moments(case, one, FIRST_OF_LARGE if case.moved >= LARGE else FIRST)


def moments(
    case: Case, spread: Schedule, every: Iterable[Moment], rooms: Iterable[int] | None = None
) -> Iterator[Schedule]:
    """Of `every` those that may gain with a spread.

    rooms: registers of a thread; else those for the room that the kernel has by itself, and for one
    wave of blocks, or of a large case for one and two blocks more.
    """
    spec = NormSpec.parse(case.spec)
    each, large = cuda_schedule.blocks_each(spread, case.normed_rows), case.moved >= LARGE

    def room(registers: int) -> int:
        with_them = dataclasses.replace(spread, registers=registers)
        return cuda_source.room(spec, case.hidden, with_them)

    own = room(0)
    if rooms is None:
        rooms = _rooms(spread, (own + 1, own + 2) if large else (each, 2 * each), room)
    for (weight, release, again), registers in itertools.product(every, rooms):
        wave = room(registers) if large else each
        if release in (AT_ONCE, LOADED):
            gains = not large and cuda_schedule.spreads_evenly(each, room(registers))
        else:
            gains = not registers or own < wave <= room(registers)
        # A thread with one unit keeps it widened in any case.
        if gains and (again or cuda_source.units_of_thread(case.hidden, spread) > 1):
            moment = {"weight": weight, "release": release, "again": again}
            yield dataclasses.replace(spread, registers=registers, **moment)


def _rooms(spread: Schedule, wanted: Iterable[int], room: Callable[[int], int]) -> list[int]:
    """Registers for the room that a kernel has by itself, and for so many blocks."""
    found = {0: room(0)}
    for blocks in wanted:
        registers = cuda_schedule.registers_for(spread, blocks)
        if LEAST <= registers <= MOST and blocks not in found.values():
            found[registers] = room(registers)
    return [*found]


def refined(case: Case, best: list[Schedule]) -> Iterator[Schedule]:
    """The spreads of the best candidates, with all moments."""
    plain = {"weight": 0, "release": SUMMED, "again": True}
    spreads = {dataclasses.replace(one, **plain): None for one in best}
    every = MOMENTS + MORE_OF_LARGE * (case.moved >= LARGE)
    for spread in [*spreads][:SHORTLIST]:
        yield from moments(case, spread, every, [spread.registers])


def built(spec: NormSpec, hidden: int, every: list[Schedule]) -> dict[Schedule, Norm]:
    """The kernels of the legal ones."""
    kernels = {one: RowKernel(spec, hidden, 0, lambda *_, one=one: one) for one in every}

    def legal(one: Schedule) -> bool:
        try:
            kernels[one].prepare([1])
        except BuildError:
            return False
        return True

    with ThreadPoolExecutor() as pool:
        kept = list(pool.map(legal, kernels))
    return {one: bound(k) for (one, k), ok in zip(kernels.items(), kept, strict=True) if ok}


def sweep(case: Case, mode: str, spreads: str, inductor: bool) -> list[dict[str, Any]]:
    """Rows of one point: stage 1 are all schedules, 2 the best and what they compete with.

    spreads: of SPREADS. inductor: compete with all that norm.py has.
    """
    spec = NormSpec.parse(case.spec)
    capability = torch.cuda.get_device_capability()
    now = cuda_schedule.schedule(spec, case.hidden, case.normed_rows, capability)
    sets = case.sets(mode, torch.cuda.get_device_properties(0).L2_cache_size)
    buffers, estimate = Buffers(case, sets, "cuda"), max(1.0, case.moved / 4.2e6)

    def timed(columns: dict[Any, Norm], more: dict[str, Any]) -> dict[Any, float]:
        calls = {name: buffers.bind(norm) for name, norm in columns.items()}
        for name in [*calls]:
            try:
                calls[name](0)
            except (RuntimeError, ValueError):  # another project's, which does not take the size
                if isinstance(name, Schedule):
                    raise
                del calls[name]
        return medians({**calls, **more}, estimate, sets, "cuda", {})

    first: dict[Any, float] = {}
    best: list[Schedule] = []
    if spreads == "used":
        best = [now]
    elif spreads != "none":
        every = spreads == "all"
        spread = [
            dataclasses.replace(one, last=now.last)
            for one in candidates(case, every and capability >= (9, 0), every)
        ]
        first = timed(built(spec, case.hidden, [now, *spread]), {})
        best = sorted(first, key=first.__getitem__)
    columns: dict[Any, Norm] = built(spec, case.hidden, [now, *refined(case, best)])
    columns |= peers(case, (case.rows,)) if inductor else named(case)
    second = timed(columns, copies(case, sets, "cuda"))
    copy = min(us for name, us in second.items() if name not in columns)
    point = {**dataclasses.asdict(case), "mode": mode}
    return [
        {
            **point,
            "stage": stage,
            "schedule": _word(name) if isinstance(name, Schedule) else name,
            "us": round(us, 3),
            "of_copy": round(copy / us, 4),
            "in_use": name == now,
        }
        for stage, times in ((1, first), (2, second))
        for name, us in sorted(times.items(), key=lambda item: item[1])
    ]


_RELEASES = {AT_ONCE: "at once", LOADED: "loaded", SUMMED: "summed", STORED: "stored"}


def _word(one: Schedule) -> str:
    """Threads of a row x rows of a block, or threads / segment x blocks of a row."""
    spread = f"{one.threads}x{one.rows}"
    if one.blocks > 1:
        spread = f"{one.threads}/{one.segment}x{one.blocks}"
    more = f" r{one.registers}" * (one.registers > 0) + " kept" * (not one.again)
    more += " last" * one.last
    return f"{spread} w{one.weight} {_RELEASES[one.release]}{more}"


SPREADS = ("all", "whole", "used", "none")
SPREADS_HELP = "all; of one block for a row; the one in use, with other moments; or none but it"
ROUNDINGS = {"cast": CAST_FIRST, "scale": SCALE_FIRST}


def _point(text: str) -> list[tuple[Case, str]]:
    """`variant:rounding:dtype:ROWS,...xHIDDEN,...[:mode]`."""
    variant, rounding, dtype, size, *mode = text.split(":")
    rows, hidden = (map(int, part.split(",")) for part in size.split("x"))
    cases = [
        Case(variant, ROUNDINGS[rounding], dtype, *counts)
        for counts in itertools.product(rows, hidden)
    ]
    return [(case, one) for case in cases for one in mode or case.modes]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, budget=120)
    parser.add_argument("--spreads", choices=SPREADS, default="all", help=SPREADS_HELP)
    parser.add_argument(
        "--inductor",
        action="store_true",
        help="also time Inductor, eager and Liger",
    )
    parser.add_argument("points", nargs="+", type=_point, help=_point.__doc__)
    args = parser.parse_args()
    budget = Budget(args.budget)
    set_caches()
    recorder = Recorder(args.out, "sweep", header(args))
    warm_up(args.device)
    with torch.no_grad():
        for case, mode in itertools.chain(*args.points):
            if budget.left < 0:
                recorder.about["cut"] = f"before {case} {mode}: {args.budget:.0f} s were over"
                break
            recorder.add(sweep(case, mode, args.spreads, args.inductor))
    recorder.save()
    shown = [row for row in recorder.rows if row["stage"] == 2]
    print(tabulate(shown, headers="keys"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
