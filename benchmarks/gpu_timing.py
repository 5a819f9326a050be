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
from gpu_graphs import captured, graph_times

REPLAY_US = 250.0
"""Least length of one replay: the gap between two queued graphs, 1-2 us, is lost in it."""
SLOW_US = 3000.0
"""Replays longer than this are repeated less often."""
SHORT_US = 20.0
"""Calls shorter than this are measured in several instantiations of their graph."""
LONG_S = 0.01
"""Calls longer than this are repeated less often."""
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


def calls_per_replay(estimate_us: float, sets: int) -> int:
    """Enough calls for one replay, and a whole number of turns through the buffer sets."""
    turns = max(1, -(-REPLAY_US // (estimate_us * sets)))
    return int(turns) * sets


def host_times(call: Callable[[], object], timed: int) -> list[float]:
    """Microseconds on a host clock, for smoke runs on the CPU."""
    found = []
    for _ in range(timed):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e6)
    return found


def call_times(call: Callable[[], object], device: str) -> dict[str, float | None]:
    """call_ms and host_us of a call that was warmed up.

    Of short calls the best: the host's time decides, and other processes only add to it.
    """
    if device == "cpu":
        ms = statistics.median(host_times(call, 5)) / 1e3
        return {"call_ms": round(ms, 4), "host_us": None}
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    many = time.perf_counter() - start < LONG_S
    host, whole = [], []
    for _ in range(40 if many else 5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    turns = 8 if many else 2
    for _ in range(10 if many else 3):
        start = time.perf_counter()
        for _ in range(turns):
            call()
        torch.cuda.synchronize()
        whole.append((time.perf_counter() - start) / turns * 1e3)
    chosen = min if many else statistics.median
    return {"call_ms": round(chosen(whole), 4), "host_us": round(chosen(host), 1)}


def medians(
    calls: dict[str, Callable[[int], object]],
    estimate_us: float,
    sets: int,
    device: str,
    failed: dict[str, str],
) -> dict[str, float]:
    """Microseconds of one call of each column: medians of replays, measured in turns.

    Of short calls the best of ROUNDS such medians, each of a graph instantiated anew: gaps between
    kernels are then a good part of the time, and differ (`placed`). A column that no graph can
    hold is left out, and `failed` says why.
    """
    if device == "cpu":
        return {
            name: statistics.median(host_times(functools.partial(call, 0), 3))
            for name, call in calls.items()
        }
    count, short = calls_per_replay(estimate_us, sets), estimate_us < SHORT_US
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = captured(call, count, sets)
        except RuntimeError as error:
            failed[name] = str(error).partition("\n")[0][:200]
            continue
        graphs[name].instantiate()
    times = {name: [graph_times(graph.replay, 1)] for name, graph in graphs.items()}
    slow = {name for name, found in times.items() if found[0][0] > SLOW_US}
    for turn in range(ROUNDS):
        for name, graph in graphs.items():
            if turn and name in slow:
                continue
            if turn and short:
                graph.instantiate()
            times[name].append(graph_times(graph.replay, 2 if name in slow else REPLAYS))
    if short:
        best = {name: min(map(statistics.median, found[1:])) for name, found in times.items()}
    else:
        best = {name: statistics.median(itertools.chain(*t)) for name, t in times.items()}
    return {name: us / count for name, us in best.items()}


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
        "flashinfer": _version("flashinfer-python"),
        "quack": _version("quack-kernels"),
        "sglang": _version("sglang"),
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
