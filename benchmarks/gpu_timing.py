"""How the GPU benchmarks measure: CUDA-graph replays, a time budget, results that survive a kill.

On the CPU (smoke runs) the same calls are timed with a host clock; those numbers mean nothing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import functools
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

REPLAY_US = 250.0
"""Least length of one replay: the gap between two queued graphs, 1-2 us, is lost in it."""
SLOW_US = 3000.0
"""Replays longer than this are repeated less often."""
ROUNDS = 3
REPLAYS = 3
"""Timed replays per round, after one that is not timed."""


class Budget:
    """Wall-clock seconds of a whole run."""

    def __init__(self, seconds: float) -> None:
        self.start = time.monotonic()
        self.seconds = seconds

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds left, negative when overdrawn."""
        return self.seconds - self.spent


@functools.cache
def _pool() -> tuple[Any, Any, torch.cuda.Stream]:
    """A memory pool that all graphs share, a graph that keeps it alive, and a side stream.

    Graphs are never replayed while another one's outputs matter, so they may share memory, and no
    capture pays for allocating it anew.
    """
    stream, pool, graph = (
        torch.cuda.Stream(),
        torch.cuda.graph_pool_handle(),
        torch.cuda.CUDAGraph(),
    )
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool)
        torch.zeros(1, device="cuda")
        graph.capture_end()
    return pool, graph, stream


def capture(call: Callable[[int], object], count: int, sets: int) -> Callable[[], object]:
    """A graph of `count` calls, each given the number of its buffer set; returns its replay.

    As many outputs as there are buffer sets stay alive at a time, so outputs rotate as well.
    """
    pool, _, stream = _pool()
    graph = torch.cuda.CUDAGraph()
    kept: list[object] = [None] * sets
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            for i in range(count):
                kept[i % sets] = call(i % sets)
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


def calls_per_replay(estimate_us: float, sets: int) -> int:
    """Enough calls for one replay, and a whole number of turns through the buffer sets."""
    turns = max(1, -(-REPLAY_US // (estimate_us * sets)))
    return int(turns) * sets


def graph_times(replay: Callable[[], object], timed: int) -> list[float]:
    """Microseconds of each of `timed` replays. All are queued at once, behind one not timed.

    With the device busy the launch of a graph on the host does not count.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(timed + 1)]
    replay()
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events)
    return [before.elapsed_time(after) * 1e3 for before, after in pairs]


def host_times(call: Callable[[], object], timed: int) -> list[float]:
    """Microseconds on a host clock, for smoke runs on the CPU."""
    found = []
    for _ in range(timed):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
    return found


def medians(
    calls: dict[str, Callable[[int], object]],
    estimate_us: float,
    sets: int,
    device: str,
    failed: dict[str, str],
) -> dict[str, float]:
    """Median microseconds of one call of each column, measured in turns.

    A column that no graph can hold is left out, and `failed` says why.
    """
    if device == "cpu":
        return {
            name: statistics.median(host_times(functools.partial(call, 0), 3))
            for name, call in calls.items()
        }
    count = calls_per_replay(estimate_us, sets)
    replays = {}
    for name, call in calls.items():
        try:
            replays[name] = capture(call, count, sets)
        except RuntimeError as error:
            failed[name] = str(error).partition("\n")[0][:200]
    times = {name: graph_times(replay, 1) for name, replay in replays.items()}
    slow = {name for name, found in times.items() if found[0] > SLOW_US}
    for turn in range(ROUNDS):
        for name, replay in replays.items():
            if name not in slow:
                times[name] += graph_times(replay, REPLAYS)
            elif turn == 0:
                times[name] += graph_times(replay, 2)
    return {name: statistics.median(found) / count for name, found in times.items()}


def warm_up(device: str) -> None:
    """Brings the clocks up."""
    if device == "cuda":
        a = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
        for _ in range(200):
            torch.mm(a, a)
        torch.cuda.synchronize()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def header(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers depend on."""
    import fxpass

    cuda = args.device == "cuda"
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    about: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if cuda else "none: a smoke run, not a benchmark",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _output(*driver).partition("\n")[0] if cuda else "none",
        "liger": _version("liger_kernel"),
        "fxpass": fxpass.__version__,
        "commit": args.commit or _output("git", "rev-parse", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }
    return about


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


class Recorder:
    """Rows on disk as JSON (with the header) and CSV, written again every few seconds."""

    EVERY_S = 5.0

    def __init__(self, folder: Path, name: str, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.base = folder / name
        self.about = about
        self.rows: list[dict[str, Any]] = []
        self._saved = time.monotonic()

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take in rows; all have the same keys."""
        self.rows += rows
        if time.monotonic() - self._saved > self.EVERY_S:
            self.save()

    def record(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {**self.about, "results": self.rows}

    def save(self) -> None:
        """Write both files, each complete or not at all."""
        lines = ",\n".join("  " + json.dumps(row) for row in self.rows)
        about = json.dumps(self.about, indent=1)[:-2]
        self._replace(".json", f'{about},\n "results": [\n{lines}\n ]\n}}\n')
        text = [f"# {key}: {value}\n" for key, value in self.about.items()]
        if self.rows:
            from io import StringIO

            table = StringIO()
            writer = csv.DictWriter(table, self.rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
            text.append(table.getvalue())
        self._replace(".csv", "".join(text))
        self._saved = time.monotonic()

    def _replace(self, suffix: str, text: str) -> None:
        new = self.base.with_suffix(suffix + ".new")
        new.write_text(text)
        os.replace(new, self.base.with_suffix(suffix))


def add_arguments(parser: argparse.ArgumentParser, budget: float) -> None:
    """The options that both benchmarks have."""
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder for results")
    parser.add_argument(
        "--budget", type=float, default=budget, help="seconds for the whole run (%(default)s)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smoke run: a few small shapes")
    parser.add_argument("--commit", help="commit to record where there is no git")
    parser.add_argument(
        "--workers", type=int, help="processes that fill the compile caches first; 0: none"
    )
    parser.add_argument("--fill", help=argparse.SUPPRESS)
