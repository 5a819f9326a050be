"""Rewrite the norms of small random models and show what changed.

    python examples/demo.py              four models
    python examples/demo.py --all        twelve
    python examples/demo.py --only Llama,T5

For each model: how many norms it executes in eager, how many fxpass rewrote and with which kernels,
and how many elements differ from eager when the model is compiled by Inductor alone, by fxpass, and
by fxpass with numerics="eager". "Norm site" is one norm of the model compiled on its own, on 2048
rows or more. Exits with 1 if a norm was missed or a row depends on its batch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from models import CORE, MORE, Demo, Site
from tabulate import tabulate
from zoo.compare import NormSite, batch_invariant, different, first_tensor, site_input
from zoo.hf import Built
from zoo.watch import GraphCount, count_graph_norms, count_norms

import fxpass

BATCHES = (2, 7, 64)
MODES: dict[str, dict[str, Any]] = {
    "Inductor": {"backend": "inductor"},
    "fxpass": {"backend": fxpass.rmsnorm_backend},
    "fxpass eager": {"backend": fxpass.rmsnorm_backend, "options": {"numerics": "eager"}},
}


@dataclass
class Row:
    """What the demo found out about one model."""

    model: str
    executed: int
    graphs: GraphCount
    rewritten: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    differs: dict[str, float] = field(default_factory=dict)
    site_differs: dict[str, list[float]] = field(default_factory=dict)
    invariant: bool = True
    declined: list[str] = field(default_factory=list)

    @property
    def missed(self) -> int:
        """Norms in the captured graphs that were not rewritten."""
        return max(0, self.graphs.sites - self.rewritten)


def main() -> int:
    args = _arguments()
    models = {**CORE, **MORE} if args.all or args.only else CORE
    if args.only:
        wanted = [name.strip() for name in args.only.split(",")]
        unknown = [name for name in wanted if name not in models]
        if unknown:
            print(f"demo: no model {unknown[0]!r}; known: {', '.join(models)}", file=sys.stderr)
            return 2
        models = {name: models[name] for name in wanted}
    _quiet()
    rows = [_show(name, demo) for name, demo in models.items()]
    print()
    print(_table(rows))
    return _verdict(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every model")
    parser.add_argument("--only", help="these models, separated by commas")
    return parser.parse_args()


def _quiet() -> None:
    """Fresh compiles (so that every report is complete), no library chatter."""
    torch._inductor.config.force_disable_caches = True
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _show(name: str, demo: Demo) -> Row:
    start = time.perf_counter()
    built = demo.make(batch=2)
    executed = count_norms(built.model, **built.inputs).executed
    row = Row(name, executed, count_graph_norms(built.model, **built.inputs))
    _whole_model(row, built)
    for site in demo.sites:
        _one_norm(row, built, site)
    seconds = time.perf_counter() - start
    print(f"{name}: {row.rewritten} of {row.graphs.sites} norms rewritten, {seconds:.0f} s")
    return row


def _compiled(module: torch.nn.Module, mode: dict[str, Any]) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, dynamic=False, **mode)


def _whole_model(row: Row, built: Built) -> None:
    """Compile the model in every mode, compare with eager, read the report of the last one."""
    with torch.no_grad():
        eager = first_tensor(built.model(**built.inputs))
        for name, mode in MODES.items():
            fxpass.reset_report()
            out = first_tensor(_compiled(built.model, mode)(**built.inputs))
            row.differs[name] = different(eager, out)
    report = fxpass.last_report()
    row.rewritten = len(report.rewritten)
    row.kernels = Counter(site.kernel for site in report.rewritten)
    row.declined = [f"{node.location}: {node.reason}" for node in report.declined] + report.errors


def _one_norm(row: Row, built: Built, site: Site) -> None:
    """Compile one norm alone in every mode; row 0 must not depend on the batch it comes in."""
    shape, dtype = site_input(built.model, site.name, built.inputs)
    module = NormSite(built.model.get_submodule(site.name), site.residual)
    generator = torch.Generator().manual_seed(0)
    shape = (max(BATCHES), max(32, shape[1]), *shape[2:])
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    with torch.no_grad():
        eager = module(x, residual)
        for name, mode in MODES.items():
            run = _compiled(module, mode)
            share = different(eager, run(x, residual))
            row.site_differs.setdefault(name, []).append(share)
            if name == "fxpass":
                row.invariant &= batch_invariant(run, (x, residual), BATCHES)


def _table(rows: list[Row]) -> str:
    head = ["model", "norms in eager", "rewritten", "kernels"]
    head += [f"differs: {name}" for name in MODES]
    head += [f"norm site: {name}" for name in MODES]
    head += [f"row alone = in {', '.join(map(str, BATCHES))}"]
    return tabulate([_cells(row) for row in rows], head, maxheadercolwidths=12)


def _cells(row: Row) -> list[Any]:
    rewritten = f"{row.rewritten}"
    if row.graphs.sites != row.executed:
        rewritten += f" of {row.graphs.sites} in graphs"
    kernels = ", ".join(f"{kernel} {n}" for kernel, n in row.kernels.most_common())
    sites = [sum(shares) / len(shares) for shares in row.site_differs.values()]
    shares = [f"{100 * share:.3g} %" for share in [*row.differs.values(), *sites]]
    return [row.model, row.executed, rewritten, kernels, *shares, "yes" if row.invariant else "NO"]


def _verdict(rows: list[Row]) -> int:
    """Name what was missed; 1 if anything was."""
    bad = 0
    for row in rows:
        if row.missed:
            bad = 1
            print(f"missed: {row.missed} of {row.graphs.sites} norms in {row.model}")
            for line in row.declined:
                print(f"  declined {line}")
        if not row.invariant:
            bad = 1
            print(f"batch: a row of {row.model} depends on the rows it comes with")
    if not bad:
        print(f"all {sum(row.graphs.sites for row in rows)} norms rewritten")
    return bad


if __name__ == "__main__":
    sys.exit(main())
