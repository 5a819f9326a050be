"""Fills the compile caches of Inductor and Triton from several processes, before anything is timed.

Compiling is most of what these benchmarks would do, and torch.compile holds one lock per process.
The processes only compile: Inductor times its candidates in the first call of the benchmark itself,
alone on the GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")


def set_caches() -> None:
    """Caches that this process and the filling ones share. Call before torch.compile is used."""
    base = Path(tempfile.gettempdir()) / "fxpass_bench"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(base / "triton"))


def share(items: Sequence[Item], part: str) -> Sequence[Item]:
    """The items of one filling process; `part` is "i/n"."""
    i, n = map(int, part.split("/"))
    return items[i::n]


def workers(args: argparse.Namespace, most: int) -> int:
    """How many processes to use: two cores are left to the rest."""
    if args.workers is not None:
        return int(args.workers)
    return 0 if args.tiny else max(0, min(most, (os.cpu_count() or 1) - 2))


def fill(count: int, seconds: float, log: Path) -> str:
    """Run this script `count` times with --fill and wait, at most `seconds`. Returns what came."""
    if count < 1:
        return "not filled"
    # One compiler per process: each would start a pool of its own otherwise.
    env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as sink:
        running = [
            subprocess.Popen(
                [sys.executable, *sys.argv, "--fill", f"{i}/{count}"],
                env=env,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
            for i in range(count)
        ]
        ended = [_wait(process, start + seconds) for process in running]
    bad = sum(code != 0 for code in ended)
    return f"{count} processes, {time.monotonic() - start:.0f} s, {bad} stopped or failed"


def _wait(process: subprocess.Popen[bytes], until: float) -> int:
    try:
        return process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -1


def compiling_only(compile_graph: Callable[[Any, Any], object]) -> Callable[[Any, Any], Any]:
    """A torch.compile backend that compiles a graph for the cache, and runs the graph as it was."""

    def backend(graph_module: Any, inputs: Any) -> Any:
        compile_graph(graph_module, inputs)
        return graph_module.forward

    return backend


def inductor_only(patches: dict[str, Any] | None) -> Callable[[Any, Any], Any]:
    """`compiling_only` for torch.compile(options=patches)."""
    from torch._inductor.compile_fx import compile_fx

    return compiling_only(lambda graph, inputs: compile_fx(graph, inputs, config_patches=patches))
