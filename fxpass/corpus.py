"""Replays the corpus of spellings through the installed torch, at every place a pass can run.

What torch makes of one spelling changes from version to version, and a pattern that no longer
matches is silent. The matrix says it, before a model does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpass import pipeline, torch_private
from fxpass.corpus_rows import GROUPS, Group, Spelling
from fxpass.options import Options
from fxpass.report import Report

CORPUS_VERSION = 1
HOOKS = ("dynamo", "joint", "post-grad", "export")
FOUND, DECLINED, UNSEEN, ERROR = "found", "declined", "unseen", "error"

_OPTIONS = Options(providers=("reference",))
"""A kernel that takes every norm on any machine: the corpus is about finding them."""
_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class Cell:
    """What became of one spelling at one hook."""

    state: str
    detail: str
    """The variants found, or the reason of the decline."""


@dataclass(frozen=True)
class Line:
    """One spelling at every hook."""

    name: str
    norms: int
    """How many the spelling holds; a near miss has none."""
    cells: dict[str, Cell]

    @property
    def faults(self) -> list[str]:
        """Cells that are not as they should be."""
        return [
            f"{self.name} at {hook}: {cell.state}{': ' if cell.detail else ''}{cell.detail}"
            for hook, cell in self.cells.items()
            if (cell.state != FOUND if self.norms else cell.state in (FOUND, ERROR))
        ]


def replay(groups: Iterable[Group] = GROUPS) -> list[Line]:
    """The whole matrix. Runs on the CPU and compiles no code."""
    return [
        Line(name, group.norms, _cells(function, tensors(group.inputs), group.norms))
        for group in groups
        for name, function in group.rows.items()
    ]


def tensors(texts: Iterable[str]) -> tuple[torch.Tensor, ...]:
    """Random tensors, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return tuple(_tensor(text, generator) for text in texts)


def _tensor(text: str, generator: torch.Generator) -> torch.Tensor:
    kind, _, sizes = text.rstrip("]").partition("[")
    shape = [int(size) for size in sizes.split(",")]
    return torch.randn(shape, generator=generator).to(_DTYPES[kind])


def _cells(function: Spelling, inputs: tuple[torch.Tensor, ...], norms: int) -> dict[str, Cell]:
    reports: dict[str, Report] = {}
    errors: dict[str, str] = {}

    def look(hook: str, graph: fx.Graph) -> None:
        reports.setdefault(hook, Report()).add(pipeline.run(_copied(graph), _OPTIONS))

    for hook, step in (
        ("post-grad", torch_private.visit_at_each_hook),
        ("export", _visit_export),
    ):
        with torch.no_grad(), _noted(errors, hook):
            step(function, inputs, look)
    return {hook: _cell(reports.get(hook), errors.get(hook, ""), norms) for hook in HOOKS}


@contextlib.contextmanager
def _noted(errors: dict[str, str], hook: str) -> Iterator[None]:
    """One spelling that a torch version cannot compile must not hide the others."""
    try:
        yield
    except Exception as error:
        errors[hook] = f"{type(error).__name__}: {error}".splitlines()[0]


def _visit_export(function: Spelling, inputs: tuple[torch.Tensor, ...], look: Any) -> None:
    class Model(torch.nn.Module):
        def forward(self, *args: torch.Tensor) -> Any:
            return function(*args)

    look("export", torch.export.export(Model(), inputs).graph)


def _copied(graph: fx.Graph) -> fx.Graph:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = made.node_copy(node, copies.__getitem__)
    return made


def _cell(report: Report | None, error: str, norms: int) -> Cell:
    if report is None:
        return Cell(ERROR, error or "no graph reached the hook")
    if report.errors:
        return Cell(ERROR, report.errors[0])
    if report.rewritten and len(report.rewritten) >= norms:
        return Cell(FOUND, ", ".join(site.variant for site in report.rewritten))
    if report.declined:
        return Cell(DECLINED, report.declined[0].reason)
    return Cell(UNSEEN, f"{len(report.rewritten)} of {norms} norms" if report.rewritten else "")


def to_dict(lines: Iterable[Line]) -> dict[str, Any]:
    """Plain data, for a file that is compared from version to version."""
    return {
        "version": CORPUS_VERSION,
        "torch": torch.__version__.partition("+")[0],
        "spellings": [dataclasses.asdict(line) for line in lines],
    }
