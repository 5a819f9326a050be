"""What the pass adds to torch.compile: seconds per graph, by number of layers.

    python benchmarks/pass_time.py [--layers 10,20,40,80] [--json FILE]

A shrunk Llama (hidden 64) keeps the graph of the full one: the pass sees nodes, not sizes. The
share is the pass's time over all of torch.compile's (Dynamo, AOTAutograd, Inductor, C++ compiler)
with the same backend and no cache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaModel

import fxpass
from fxpass import pipeline


def measure(layers: int) -> dict[str, Any]:
    """One row: nodes, seconds in the pass (median of 3 compiles' sums), seconds of the compile."""
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=layers,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).to(torch.bfloat16).eval()
    tokens = torch.randint(1, 100, (2, 16))
    spent, nodes, run = [], 0, pipeline.run

    def timed(graph: Any, options: Any) -> Any:
        nonlocal nodes
        nodes = len(graph.nodes)
        start = time.perf_counter()
        report = run(graph, options)
        spent.append(time.perf_counter() - start)
        return report

    pipeline.run = timed
    fxpass.reset_report()
    torch._dynamo.reset()
    start = time.perf_counter()
    try:
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            torch.compile(model, backend=fxpass.rmsnorm_backend)(tokens, use_cache=False)
    finally:
        pipeline.run = run
    total = time.perf_counter() - start
    return {
        "layers": layers,
        "nodes": nodes,
        "rewritten": len(fxpass.last_report().rewritten),
        "pass_s": round(sum(spent), 3),
        "compile_s": round(total, 1),
        "share_percent": round(100 * sum(spent) / total, 2),
        "us_per_node": round(1e6 * statistics.fmean(spent) / nodes, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", default="10,20,40,80")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    measure(1)  # builds the kernels and imports Inductor
    rows = [measure(int(layers)) for layers in args.layers.split(",")]
    print(tabulate(rows, headers="keys"))
    if args.json:
        record = {
            "date": datetime.date.today().isoformat(),
            "torch": torch.__version__,
            "fxpass": fxpass.__version__,
            "rows": rows,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
