"""CUDA graphs of the GPU benchmarks: captured into one pool, timed by replays."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch


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


def captured(call: Callable[[int], object], count: int, sets: int) -> torch.cuda.CUDAGraph:
    """A graph of `count` calls, each given the number of its buffer set.

    As many outputs as there are buffer sets stay alive at a time, so outputs rotate as well. The
    graph has to be instantiated before its replay, and may be again.
    """
    pool, _, stream = _pool()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
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
    return graph


@functools.cache
def _anything() -> torch.Tensor:
    return torch.zeros(1, device="cuda")


def graph_times(replay: Callable[[], object], timed: int) -> list[float]:
    """Microseconds of each of `timed` replays. All are queued at once, behind one not timed.

    With the device busy the launch of a graph on the host does not count. First comes an ordinary
    launch, as in most programs: after one with programmatic dependence (FlashInfer's, SGLang's and
    cuda.row's are) all kernels of the graphs that follow, also others', start 0.1 to 0.3 us earlier
    until the next ordinary launch. A copy of 0.5 MB took 1.66 or 1.98 us.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(timed + 1)]
    _anything().add_(1)
    replay()
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events)
    return [before.elapsed_time(after) * 1e3 for before, after in pairs]


def balanced(names: list[str], turn: int) -> list[str]:
    """An order in which, over as many turns as there are names, each one follows every other.

    What follows the column that draws the least power may find a higher clock. (Williams,
    Experimental designs balanced for the estimation of residual effects of treatments, 1949. For
    an even number of names.)
    """
    count = len(names)
    zigzag = [at // 2 if at % 2 == 0 else count - 1 - at // 2 for at in range(count)]
    return [names[(at + turn) % count] for at in zigzag]


def placed(
    graphs: dict[str, torch.cuda.CUDAGraph],
    rounds: int,
    turns: int,
    chosen: Callable[[list[float]], float],
) -> dict[str, float]:
    """Milliseconds of each graph: of `rounds` instantiations, the columns in turns, the `chosen`.

    One and the same model took 2,007 and 2,055 us, by how far apart the kernels of a graph were, so
    each column is placed several times, after others. That was before `graph_times` began with an
    ordinary launch, which may be all there is to it (DESIGN 31).
    Of many short kernels the best is that of the kernels (`min`). Of products that fill the GPU the
    clock decides, which is higher after a column that draws less power: the middle one then.
    """
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(rounds):
        for name in balanced(list(graphs), turn):
            graphs[name].instantiate()
            found[name].append(statistics.median(graph_times(graphs[name].replay, turns)) / 1e3)
    return {name: chosen(times) for name, times in found.items()}
