"""How many norms does fxpass rewrite, over every model type of transformers and diffusers?

    python benchmarks/coverage.py                      all transformers types, resumable
    python benchmarks/coverage.py --diffusers          diffusers transformer classes
    python benchmarks/coverage.py --only llama,t5 --again --compile

Every type is built tiny with random weights (nothing is downloaded), run in eager to count its
norms, captured by Dynamo to see how many of them are in graphs, and planned by `fxpass.explain`
(or compiled, with --compile). Each type runs in a process of its own with a time and memory limit.
Results go to benchmarks/results/coverage_<library>.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import multiprocessing
import os
import re
import resource
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from tabulate import tabulate
from zoo import dif, dif_special, hf
from zoo.watch import count_graph_norms, count_norms

import fxpass

RESULTS = Path(__file__).resolve().parent / "results"
NORM_SOURCE = re.compile(r"rms_?norm|l2_?norm|T5LayerNorm|\.normalize\(|rsqrt", re.IGNORECASE)
"""A modeling file without any of these has no norm to find."""


def main() -> int:
    args = _arguments()
    library = "diffusers" if args.diffusers else "transformers"
    path = args.out or RESULTS / f"coverage_{library}.json"
    results = json.loads(path.read_text())["types"] if path.exists() else {}
    names = args.only.split(",") if args.only else _names(library)
    names = names[args.shard[0] :: args.shard[1]]
    todo = [name for name in names if args.again or name not in results]
    for name, result in _run_all(todo, library, args):
        results[name] = result
        print(f"{name}: {_line(result)}", flush=True)
        _save(path, library, results)
    shown = {name: results[name] for name in names if name in results}
    print(_table(shown))
    return 1 if any(result.get("missed") for result in shown.values()) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--diffusers", action="store_true", help="diffusers, not transformers")
    parser.add_argument("--only", help="these types, separated by commas")
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--compile", action="store_true", help="compile and run, not just plan")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds per type")
    parser.add_argument("--memory", type=int, default=24, help="GiB of address space per type")
    parser.add_argument("--shard", type=_shard, default=(0, 1), help="0/4: the first of four")
    parser.add_argument("--out", type=Path, help="another results file")
    return parser.parse_args()


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    return int(index), int(count)


def _names(library: str) -> list[str]:
    """Everything that might contain a norm."""
    if library == "diffusers":
        return sorted(dif_special.CLASSES)
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    root = Path(transformers.__file__).parent / "models"

    def mentions_norms(model_type: str) -> bool:
        folder = root / configuration_auto.model_type_to_module_name(model_type)
        sources = (file.read_text() for file in folder.glob("modeling_*.py"))
        return any(NORM_SOURCE.search(source) for source in sources)

    return [name for name in modeling_auto.MODEL_MAPPING_NAMES if mentions_norms(name)]


def _run_all(
    todo: list[str], library: str, args: argparse.Namespace
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One forked process per type, `args.jobs` at a time."""
    if todo:
        _warm_up(library)
    context = multiprocessing.get_context("fork")
    waiting, live = list(todo), {}
    while waiting or live:
        while waiting and len(live) < args.jobs:
            name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, name, library, args))
            process.start()
            theirs.close()
            live[name] = (process, ours, time.monotonic())
        for name, (process, pipe, start) in list(live.items()):
            result = _poll(process, pipe, time.monotonic() - start, args.timeout)
            if result is not None:
                process.join()
                del live[name]
                yield name, result


def _warm_up(library: str) -> None:
    """Import, before the fork, what every child needs: several seconds less per type."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    count_graph_norms(torch.nn.RMSNorm(8), torch.ones(2, 8))
    with torch.no_grad():
        fxpass.explain(torch.nn.RMSNorm(8), torch.ones(2, 8))
    torch._dynamo.reset()
    __import__(f"{library}.models")


def _poll(process: Any, pipe: Any, seconds: float, limit: float) -> dict[str, Any] | None:
    if pipe.poll(0.05):
        try:
            received: dict[str, Any] = pipe.recv()
            return received
        except EOFError:
            return {"status": "died", "error": "the process ended without an answer"}
    if seconds > limit:
        process.kill()
        return {"status": "timeout", "error": f"more than {limit:g} s"}
    return None


def _child(pipe: Any, name: str, library: str, args: argparse.Namespace) -> None:
    limit = args.memory << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    start = time.perf_counter()
    result = probe(name, library, args.compile)
    pipe.send({**result, "seconds": round(time.perf_counter() - start, 1)})


def probe(name: str, library: str, compile_it: bool = False) -> dict[str, Any]:
    """Build, count in eager, capture, plan: the record of one model type."""
    result: dict[str, Any] = {}
    build: Callable[[str], hf.Built] = dif.build if library == "diffusers" else hf.build
    stage = "build-failed"
    try:
        built = build(name)
        stage = "eager-failed"
        count = count_norms(built.model, **built.inputs)
        result = {
            "executed": count.executed,
            "functional": count.functional,
            "owners": count.owners(),
        }
        if not count.executed:
            return {"status": "no-norm", **result, "unseen": dict(count.silent)}
        stage = "compile-failed"
        report = _report(built, compile_it)
        result.update(_expected(built, count.executed, len(report.rewritten)))
        result.update(_outcome(report, result["expected"]))
    except Exception as error:
        return {"status": stage, **result, "error": _error(error)}
    return {"status": "ok", **result}


def _expected(built: hf.Built, executed: int, rewritten: int) -> dict[str, int]:
    """Norms that a graph pass can see: all executed ones, unless the model has graph breaks.

    Then layers may share a graph (`in_graphs` counts its norms as often as it ran) and some norms
    run outside any graph. Graphs are only captured and counted when that can make a difference.
    """
    if rewritten == executed:
        return {"expected": executed}
    found = count_graph_norms(built.model, **built.inputs)
    return {"expected": found.sites, "in_graphs": found.executed, "graphs": found.graphs}


def _report(built: hf.Built, compile_it: bool) -> fxpass.Report:
    with torch.no_grad():
        if not compile_it:
            return fxpass.explain(built.model, **built.inputs)
        fxpass.reset_report()
        torch.compile(built.model, backend=fxpass.rmsnorm_backend)(**built.inputs)
        return fxpass.last_report()


def _outcome(report: fxpass.Report, expected: int) -> dict[str, Any]:
    declined = Counter(f"{_place(miss.location)}: {miss.reason}" for miss in report.declined)
    return {
        "rewritten": len(report.rewritten),
        "missed": max(0, expected - len(report.rewritten)),
        "variants": dict(Counter(site.variant for site in report.rewritten)),
        "kernels": dict(report.kernels),
        "declined": dict(declined),
        "errors": [error.strip().splitlines()[-1] for error in report.errors],
    }


def _place(location: str) -> str:
    return location.rsplit("/", 1)[-1]


def _error(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    message = (str(error).strip().splitlines() or [""])[0]
    message = re.sub(r"/\S*/", "", message)[:200]  # results name no folders of this machine
    return f"{type(error).__name__}: {message} ({_place(last.filename)}:{last.lineno})"


def _line(result: dict[str, Any]) -> str:
    if result["status"] != "ok":
        return f"{result['status']} {result.get('error', '')}"
    return f"{result['rewritten']} of {result['expected']} ({result['seconds']} s)"


def _save(path: Path, library: str, results: dict[str, Any]) -> None:
    head = {
        "date": datetime.date.today().isoformat(),
        "versions": {
            "fxpass": fxpass.__version__,
            "torch": torch.__version__,
            library: __import__(library).__version__,
        },
        "total": _total(results),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps({**head, "types": results}, indent=1, sort_keys=True) + "\n")
    fresh.replace(path)


def _total(results: dict[str, Any]) -> dict[str, Any]:
    ok = [result for result in results.values() if result["status"] == "ok"]
    keys = ("executed", "expected", "rewritten", "missed")
    return {
        "statuses": dict(Counter(result["status"] for result in results.values())),
        **{key: sum(result[key] for result in ok) for key in keys},
    }


def _table(results: dict[str, Any]) -> str:
    head = ("type", "executed", "in graphs", "rewritten", "missed", "why")
    rows = []
    for name, result in sorted(results.items()):
        if result["status"] == "ok":
            why = "; ".join(result["errors"] + list(result["declined"])) if result["missed"] else ""
            counts = [result[key] for key in ("executed", "expected", "rewritten", "missed")]
            rows.append((name, *counts, why[:80]))
    total = _total(results)
    counts = [total[key] for key in ("executed", "expected", "rewritten", "missed")]
    rows.append(("total", *counts, ", ".join(f"{k} {v}" for k, v in total["statuses"].items())))
    return tabulate(rows, head)


if __name__ == "__main__":
    sys.exit(main())
