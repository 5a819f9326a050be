"""What would happen to a model that does not fit in memory: plan on fake tensors, from Python.

    python examples/inspect_model.py            an 8-billion-parameter Llama
    python examples/inspect_model.py qwen3      another type of transformers' models

The command line does the same: `fxpass explain hf:llama`, `fxpass diff hf:llama`.
"""

from __future__ import annotations

import sys

from fxpass import diff_text
from fxpass.cli_explain import text
from fxpass.diff import of_graphs
from fxpass.options import Options
from fxpass.target import load


def main(kind: str = "llama") -> None:
    found = of_graphs(kind, load(f"hf:{kind}").graphs(), Options())
    print(text(found.report))  # alike norms in one row, refusals, near misses

    by_kernel = found.report.kernels
    copied = sum(site.bytes_copied or 0 for site in found.report.rewritten)
    print(f"\nkernels: {by_kernel}; bytes copied by layout nodes: {copied}")

    first = found.sites[0]
    print(f"\n{first.record.module}, before and after:")
    print(*(f"- {line}" for line in first.before), *(f"+ {line}" for line in first.after), sep="\n")
    print(
        f"\nlike it: {sum(diff_text.kind(s) == diff_text.kind(first) for s in found.sites)} norms"
    )


if __name__ == "__main__":
    main(*sys.argv[1:2])
