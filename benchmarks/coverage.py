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
import re
import sys
from collections import Counter
from typing import Any

import each_type
import torch
from each_type import RESULTS
from tabulate import tabulate
from zoo import hf
from zoo.watch import count_graph_norms, count_norms

import fxpass

NORM_SOURCE = re.compile(r"rms_?norm|l2_?norm|T5LayerNorm|\.normalize\(|rsqrt", re.IGNORECASE)
"""A modeling file without any of these has no norm to find."""


def main() -> int:
    parser = each_type.arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="compile and run, not just plan")
    args = parser.parse_args()
    path = args.out or RESULTS / f"coverage_{each_type.library(args)}.json"
    shown = each_type.run(
        each_type.names(args, _has_norms), path, args, probe, _line, _total, _warm_up
    )
    print(_table(shown))
    return 1 if any(result.get("missed") for result in shown.values()) else 0


def _has_norms(texts: list[str]) -> bool:
    return any(map(NORM_SOURCE.search, texts))


def _warm_up() -> None:
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    count_graph_norms(torch.nn.RMSNorm(8), torch.ones(2, 8))
    with torch.no_grad():
        fxpass.explain(torch.nn.RMSNorm(8), torch.ones(2, 8))
    torch._dynamo.reset()


def probe(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build, count in eager, capture, plan: the record of one model type."""
    result: dict[str, Any] = {}
    stage = "build-failed"
    try:
        built = each_type.build(name, args)
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
        report = _report(built, args.compile)
        result.update(_expected(built, count.executed, len(report.rewritten)))
        result.update(_outcome(report, result["expected"]))
    except Exception as error:
        return {"status": stage, **result, "error": each_type.error(error)}
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
    declined = Counter(
        f"{each_type.file_of(miss.location)}: {miss.reason}" for miss in report.declined
    )
    return {
        "rewritten": len(report.rewritten),
        "missed": max(0, expected - len(report.rewritten)),
        "variants": dict(Counter(site.variant for site in report.rewritten)),
        "kernels": dict(report.kernels),
        "declined": dict(declined),
        "errors": [error.strip().splitlines()[-1] for error in report.errors],
    }


def _line(result: dict[str, Any]) -> str:
    return f"{result['rewritten']} of {result['expected']} ({result['seconds']} s)"


def _total(results: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("executed", "expected", "rewritten", "missed")
    return {key: sum(result[key] for result in results) for key in keys}


def _table(results: dict[str, Any]) -> str:
    head = ("type", "executed", "in graphs", "rewritten", "missed", "why")
    keys = ("executed", "expected", "rewritten", "missed")
    rows = []
    for name, result in sorted(results.items()):
        if result["status"] == "ok":
            why = "; ".join(result["errors"] + list(result["declined"])) if result["missed"] else ""
            rows.append((name, *[result[key] for key in keys], why[:80]))
    total = _total([result for result in results.values() if result["status"] == "ok"])
    counts = each_type.statuses(results)
    said = ", ".join(f"{status} {count}" for status, count in counts.items())
    rows.append(("total", *[total[key] for key in keys], said))
    return tabulate(rows, head)


if __name__ == "__main__":
    sys.exit(main())
