"""Whole models on a GPU: milliseconds of a decode step and of a prefill, and whether tokens agree.

    python benchmarks/model.py --out build/bench           # about 400 s on an H200
    python benchmarks/model.py --device cpu --tiny         # does the script run? not a benchmark

Llama-3-8B and Qwen3-8B shapes with fewer layers and random bf16 weights (`gpu_model.py`). graph_ms
is the replay of a CUDA graph of one call, of several instantiations the best for decode and the
middle one for prefill (`placed`), call_ms one of many calls in a row without a graph, host_us the
Python side of one call while the GPU is idle (of decode the best, `call_times`).
Agreement is over 64 greedy steps from an empty cache: `agree` and `bits`, equal argmax and
bit-equal logits when fed eager's tokens; `first`, the earliest step at which a sequence that runs
freely leaves eager's. `alone`: share of a row's logits whose bits are those of the row run by
itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gpu_fill
import torch
from gpu_agreement import Agreement
from gpu_graphs import captured, placed
from gpu_model import Model, Shape, build, shapes
from gpu_timing import Budget, Recorder, add_arguments, call_times, header, warm_up
from tabulate import tabulate
from torch._inductor.compile_fx import compile_fx

import fxpass

Tensor = torch.Tensor
COLUMNS: dict[str, tuple[str, dict[str, Any]]] = {
    "eager": ("eager", {}),
    "inductor": ("inductor", {}),
    "inductor_epc": ("inductor", {"emulate_precision_casts": True}),
    "fxpass": ("fxpass", {}),
    "fxpass_eager": ("fxpass", {"numerics": "eager"}),
    "fxpass_invariant": ("fxpass", {"batch_invariant": True}),
    "fxpass_cuda": ("fxpass", {"providers": ("cuda",)}),
    "fxpass_cuda_eager": ("fxpass", {"providers": ("cuda",), "numerics": "eager"}),
    "fxpass_fused": ("fxpass", {"providers": ("inductor",)}),
}
"""Backend and options. The last three are measured only if asked for."""
DEFAULT = ("eager", "inductor", "inductor_epc", "fxpass", "fxpass_eager", "fxpass_invariant")
ALONE = ("eager", "fxpass_invariant")
"""Columns whose rows are also run alone; each compiles once more for it."""
WORKS = (("decode", 1), ("prefill", 1), ("decode", 64), ("decode", 8), ("prefill", 8))
TOKENS = {("prefill", 1): 4096, ("prefill", 8): 1024}
PLACED: dict[str, tuple[int, int, Callable[[list[float]], float]]] = {
    "decode": (12, 8, min),
    "prefill": (24, 4, statistics.median),
}
"""How often a graph is instantiated (a multiple of the columns, see `balanced`), how often replayed
each time, and which of the times counts. With 12 instantiations of two prefills each, the two
columns of Inductor alone, whose products are the same, were up to 2.4 % apart."""
FILL_SHARE = 0.45
RESERVE_S = 6.0


@dataclass(frozen=True)
class Work:
    """What is timed: a model, a phase, a batch."""

    shape: Shape
    phase: str
    batch: int
    tokens: int

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.shape.name} {self.phase} {self.batch}x{self.tokens}"

    def inputs(self, model: Model, device: str) -> tuple[Any, ...]:
        """Arguments of the model."""
        torch.manual_seed(1)
        tokens = torch.randint(self.shape.vocab, (self.batch, self.tokens), device=device)
        if self.phase == "prefill":
            return (tokens,)
        caches = model.caches(self.batch)
        for pair in caches:
            for cache in pair:
                cache.normal_()
        return tokens, torch.tensor([self.shape.cache - 1], device=device), caches

    def alone(self, inputs: tuple[Any, ...], row: int) -> tuple[Any, ...]:
        """One row of the inputs, in memory of its own."""
        tokens, *rest = inputs
        if not rest:
            return (tokens[row : row + 1].clone(),)
        at, caches = rest
        mine = [tuple(cache[row : row + 1].clone() for cache in pair) for pair in caches]
        return tokens[row : row + 1].clone(), at, mine


def works(args: argparse.Namespace) -> list[Work]:
    """What to measure, the more telling first."""
    found = shapes(2 if args.tiny else args.layers)
    if args.tiny:
        small = [shape.tiny() for shape in found.values()]
        return [Work(s, *w) for s in small for w in (("decode", 2, 1), ("prefill", 1, 16))]
    return [Work(found[name], *work, TOKENS.get(work, 1)) for work in WORKS for name in args.models]


def compiled(
    model: Model, column: str, only: bool = False, alive: list[Any] | None = None
) -> Callable[..., Tensor]:
    """The model as a column runs it; with `only`, compiled for the caches and run as it is.

    alive: takes what a CUDA graph of the model needs once another column has been compiled.
    """
    backend, options = COLUMNS[column]
    torch.compiler.reset()  # Dynamo would go on with the code of the backend before
    fxpass.reset_report()
    if backend == "eager":
        return model

    def backed(graph: Any, inputs: Any) -> Any:
        if backend == "inductor":
            made = compile_fx(graph, inputs, config_patches=options)
        else:
            made = fxpass.rmsnorm_backend(graph, inputs, options=options)
        if alive is not None:
            alive.append(made)
        return made

    chosen = gpu_fill.compiling_only(backed) if only else backed
    return torch.compile(model, dynamic=False, backend=chosen)


def rows_alone(call: Callable[..., Tensor], work: Work, inputs: tuple[Any, ...]) -> float:
    """Share of elements of a few rows' logits whose bits are those of the row run alone."""
    together = call(*inputs)
    rows = sorted({0, work.batch // 2, work.batch - 1})
    equal = [(call(*work.alone(inputs, row))[0] == together[row]).float().mean() for row in rows]
    return round(float(torch.stack(equal).mean()), 6)


@dataclass
class Graphs:
    """Of the columns of one work."""

    by_column: dict[str, torch.cuda.CUDAGraph] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    """Compiled code and inputs, whose memory they use."""


def measure(
    work: Work,
    model: Model,
    column: str,
    agreement: Agreement | None,
    device: str,
    graphs: Graphs,
) -> dict[str, Any]:
    """One row; graph_ms follows from the graph that is left in `graphs`, once all are there."""
    start = time.monotonic()
    call = compiled(model, column, alive=graphs.alive)
    inputs = work.inputs(model, device)
    for _ in range(3):
        call(*inputs)
    spent = time.monotonic() - start
    report = fxpass.last_report()
    times = call_times(lambda: call(*inputs), device)
    if device == "cuda":
        graphs.by_column[column] = captured(lambda _: call(*inputs), 1, 1)
        graphs.alive.append(inputs)
    same = agreement.of(call) if agreement else {"agree": None, "bits": None, "first": None}
    alone = column in ALONE and work.batch > 1
    same["alone"] = rows_alone(call, work, inputs) if alone else None
    return {
        "model": work.shape.name,
        "layers": work.shape.layers,
        "phase": work.phase,
        "batch": work.batch,
        "tokens": work.tokens,
        "column": column,
        "graph_ms": None,
        **times,
        **same,
        "norms": work.shape.norms,
        "rewritten": len(report.rewritten) if column.startswith("fxpass") else None,
        "first_call_s": round(spent, 1),
    }


def measured(
    work: Work, model: Model, args: argparse.Namespace, about: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of all columns, their graphs timed in turns. What fails is noted in `about`."""
    agreement = Agreement(model, work.batch) if work.phase == "decode" else None
    rows: list[dict[str, Any]] = []
    graphs = Graphs()
    for column in args.columns:
        try:
            rows.append(measure(work, model, column, agreement, args.device, graphs))
        except Exception as error:
            traceback.print_exc()
            failed = about.setdefault("failed", {})
            failed[f"{work.label} {column}"] = f"{type(error).__name__}: {str(error)[:300]}"
    try:
        found = placed(graphs.by_column, *PLACED[work.phase])
    except RuntimeError as error:
        about.setdefault("failed", {})[f"{work.label} graphs"] = str(error)[:300]
        return rows
    for row in rows:
        row["graph_ms"] = round(found[row["column"]], 4) if row["column"] in found else None
    return rows


def run(args: argparse.Namespace, budget: Budget) -> Recorder:
    """Measure as much as the budget allows."""
    count = gpu_fill.workers(args, 12)
    filled = gpu_fill.fill(count, FILL_SHARE * args.budget, args.out / "model_fill.log")
    print(f"caches: {filled}", file=sys.stderr, flush=True)
    warm_up(args.device)
    recorder = Recorder(args.out, "model", {**header(args), "weights": "random"})
    models: dict[Shape, Model] = {}
    longest = 0.0
    for work in works(args):
        if budget.left < RESERVE_S + longest:
            recorder.about["cut"] = f"before {work.label}: {args.budget:.0f} s were over"
            break
        before = budget.spent
        model = models.get(work.shape) or models.setdefault(
            work.shape, build(work.shape, args.device)
        )
        recorder.add(measured(work, model, args, recorder.about))
        longest = max(longest, budget.spent - before)
        print(f"{budget.spent:.0f} s: {work.label}", file=sys.stderr, flush=True)
    return recorder


def fill(args: argparse.Namespace) -> None:
    """What one of the filling processes does: compile its share."""
    todo = [(w, c) for w in works(args) for c in args.columns if c != "eager"]
    for work, column in gpu_fill.share(todo, args.fill):
        try:
            model = build(work.shape, args.device)
            compiled(model, column, only=True)(*work.inputs(model, args.device))
        except Exception:
            traceback.print_exc()
        if args.device == "cuda":
            torch.cuda.empty_cache()


def summary(record: dict[str, Any]) -> str:
    """Times of each work side by side, agreement, and the host's share per norm."""
    lines: list[dict[str, Any]] = []
    hosts: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in record["results"]:
        key = (row["model"], row["phase"], f"{row['batch']}x{row['tokens']}")
        hosts.setdefault(key, {"norms": row["norms"]})[row["column"]] = row["host_us"]
        shown = "column graph_ms call_ms host_us agree bits first alone rewritten".split()
        lines.append(
            {"model": key[0], "work": f"{key[1]} {key[2]}", **{name: row[name] for name in shown}}
        )
        base, mine = hosts[key].get("inductor"), row["host_us"]
        per_norm = (mine - base) / row["norms"] if base and mine else None
        lines[-1]["host_us/norm"] = per_norm if row["column"].startswith("fxpass") else None
    keys = ("gpu", "torch", "triton", "commit", "date")
    about = ", ".join(f"{key} {record[key]}" for key in keys)
    layers = f"{record['results'][0]['layers']} layers each" if record["results"] else "no results"
    problems = [f"! failed {what}: {why}" for what, why in record.get("failed", {}).items()]
    cut = [f"! cut {record['cut']}"] if "cut" in record else []
    table = tabulate(lines, headers="keys", missingval="-", floatfmt=("g",) * 3 + (".3f",) * 10)
    note = "host_us/norm: what the host spends on a norm beyond Inductor's own. first -: never."
    return "\n".join([f"{about}; {layers}, random weights", note, table, *problems, *cut])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, budget=460)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=("llama", "qwen3"), default=None)
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(DEFAULT))
    args = parser.parse_args()
    args.models = args.models or ["llama", "qwen3"]
    budget = Budget(args.budget)
    gpu_fill.set_caches()
    if args.columns[0] != "eager":
        args.columns.insert(0, "eager")  # what the others are compared with
    with torch.no_grad():
        if args.fill:
            fill(args)
            return 0
        recorder = run(args, budget)
    recorder.about["seconds"] = round(budget.spent)
    recorder.save()
    print(summary(recorder.record()))
    return int("failed" in recorder.about)


if __name__ == "__main__":
    sys.exit(main())
