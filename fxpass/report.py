"""What happened and why not: one object, shown as a table or as JSON.

JSON schema, version 1: {"version", "graphs", "rewritten": [...], "declined": [...]}; the records'
keys are the field names of `RewrittenSite` and `Decline`. A field is never renamed or removed
within a version; new ones may be added.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxpass import facts
from fxpass.errors import FxpassError
from fxpass.html_table import paragraph, table
from fxpass.options import Options
from fxpass.plan import Decisions, Plan
from fxpass.sites import Decline

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RewrittenSite:
    """One norm that was (or, in a dry run, would be) rewritten."""

    location: str
    """file:line of the user's code."""
    source: str
    """The text of that line."""
    module: str
    """Path of the nn.Module, empty if the graph does not say."""
    node: str
    variant: str
    spec: str
    rounding: str
    inverse: str
    eps: float | None
    """None when eps is a tensor of the graph."""
    hidden: int | None
    """None when the normalised length is symbolic."""
    kernel: str
    refusals: tuple[str, ...]
    layout_nodes: tuple[str, ...]
    bytes_copied: int | None
    """By layout nodes, per call; None when it depends on a symbolic size."""
    nodes_before: int
    nodes_after: int
    numerics: str
    launches_before: int | None = None
    """Launches and bytes if each node ran by itself, as in eager; see `fxpass/traffic.py`."""
    launches_after: int | None = None
    """None where the kernel is not one launch; bytes also where sizes are symbolic."""
    bytes_before: int | None = None
    bytes_after: int | None = None


@dataclass(frozen=True)
class Kept:
    """A graph as it was before the rewrite, with what shows the difference."""

    graph: fx.Graph
    options: Options
    in_inductor: bool
    show: Callable[[Sequence[Kept]], Any]


@dataclass
class Report:
    """What the pass did to one or more graphs."""

    rewritten: list[RewrittenSite] = field(default_factory=list)
    declined: list[Decline] = field(default_factory=list)
    graphs: int = 0
    errors: list[str] = field(default_factory=list)
    """Bugs inside the pass: each left its graph as it was."""
    invariant: dict[str, int] = field(default_factory=dict)
    """With `batch_invariant`: how many calls of each `fxpass::bi_*` operator the graphs have."""
    kept: list[Kept] = field(default_factory=list, repr=False, compare=False)
    """The graphs of `explain` and `rewrite`; no part of the schema."""

    @property
    def kernels(self) -> dict[str, int]:
        """How many sites each kernel took."""
        counts: dict[str, int] = {}
        for site in self.rewritten:
            counts[site.kernel] = counts.get(site.kernel, 0) + 1
        return counts

    @property
    def sites(self) -> list[RewrittenSite | Decline]:
        """Every norm seen: the rewritten ones, then the declined."""
        return [*self.rewritten, *self.declined]

    def rows(self) -> list[dict[str, Any]]:
        """One flat record per norm, all with the same keys: `pandas.DataFrame(report.rows())`."""
        return [_flat(site) for site in self.sites]

    def diff(self) -> Any:
        """The graphs before and after (a `fxpass.diff_view.DiffView`): print it, or show it.

        For reports of `explain` and `rewrite`. Raises FxpassError for the others: a compile does
        not keep its graphs.
        """
        if not self.kept:
            raise FxpassError(
                "report.diff: this report has no graphs, a compile keeps none;"
                " use fxpass.explain(model, *inputs).diff(), or TORCH_COMPILE_DEBUG=1"
            )
        return self.kept[0].show(self.kept)

    def add(self, other: Report) -> None:
        """Take in another report."""
        self.rewritten += other.rewritten
        self.declined += other.declined
        self.errors += other.errors
        self.graphs += other.graphs
        self.kept += other.kept
        for name, count in other.invariant.items():
            self.invariant[name] = self.invariant.get(name, 0) + count

    def summary(self) -> str:
        """One line."""
        took = ", ".join(f"{name} x{count}" for name, count in self.kernels.items())
        total = len(self.rewritten) + len(self.declined)
        line = f"rewrote {len(self.rewritten)} of {total} norms in {self.graphs} graph(s)"
        line += f" ({took})" if took else ""
        if self.invariant:
            calls = ", ".join(f"{name} x{count}" for name, count in self.invariant.items())
            line += f"; batch-invariant: {calls}"
        return line + (f"; {len(self.errors)} error(s) in the pass" if self.errors else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in the schema above."""
        return {
            "version": SCHEMA_VERSION,
            "graphs": self.graphs,
            "rewritten": [dataclasses.asdict(site) for site in self.rewritten],
            "declined": [dataclasses.asdict(miss) for miss in self.declined],
            "errors": list(self.errors),
            "invariant": dict(self.invariant),
        }

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """Inverse of `to_dict`. Raises KeyError or TypeError if the data is not a report."""
        if data["version"] != SCHEMA_VERSION:
            raise KeyError(f"report version {data['version']}, needs {SCHEMA_VERSION}")
        sites = [RewrittenSite(**_tuples(site)) for site in data["rewritten"]]
        misses = [Decline(**miss) for miss in data["declined"]]
        found = cls(sites, misses, data["graphs"], list(data["errors"]))
        found.invariant = dict(data.get("invariant", {}))
        return found

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        rows = [
            (s.module or s.node, s.location, s.variant, s.kernel, s.numerics)
            for s in self.rewritten
        ]
        misses = [(m.module or m.node, m.location, m.source, m.reason) for m in self.declined]
        parts = [paragraph(self.summary())]
        if rows:
            parts.append(table(("norm", "source", "variant", "kernel", "numerics"), rows))
        if misses:
            parts.append(table(("declined", "source", "line", "reason"), misses))
        return "\n".join(parts + [paragraph(error) for error in self.errors])

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            (s.module or s.node, _short(s.location), s.variant, s.kernel, _layout(s), s.numerics)
            for s in self.rewritten
        ]
        head = ("norm", "source", "variant", "kernel", "layout", "numerics")
        parts = [self.summary()]
        if rows:
            parts.append(tabulate(rows, headers=head))
        if self.declined:
            misses = [(m.node, _short(m.location), m.reason) for m in self.declined]
            parts.append(tabulate(misses, headers=("declined", "source", "reason")))
        return "\n\n".join(parts + self.errors)


def _flat(site: RewrittenSite | Decline) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(RewrittenSite)]
    row: dict[str, Any] = dict.fromkeys(["status", *names, "reason"])
    row["status"] = "rewritten" if isinstance(site, RewrittenSite) else "declined"
    for name, value in dataclasses.asdict(site).items():
        row[name] = "; ".join(value) if isinstance(value, tuple) else value
    return row


def _tuples(site: dict[str, Any]) -> dict[str, Any]:
    """JSON knows lists only; the records hold tuples."""
    return {name: tuple(v) if isinstance(v, list) else v for name, v in site.items()}


def of_decisions(decisions: Decisions) -> Report:
    """The report of one graph."""
    return Report(
        [_rewritten(plan) for plan in decisions.plans], list(decisions.declined), graphs=1
    )


def _rewritten(plan: Plan) -> RewrittenSite:
    site, choice = plan.site, plan.choice
    assert choice.kernel is not None
    copied = [node.bytes for node in plan.layout_nodes]
    outputs = len(choice.spec.outputs)
    return RewrittenSite(
        location=site.location,
        source=site.source,
        module=site.module,
        node=site.anchor.name,
        variant=site.variant,
        spec=str(choice.spec),
        rounding=choice.spec.rounding.value,
        inverse=choice.spec.inverse.value,
        eps=None if site.eps_node is not None else site.eps,
        hidden=facts.static(site.hidden),
        kernel=choice.kernel.name,
        refusals=choice.refusals,
        layout_nodes=tuple(map(str, plan.layout_nodes)),
        bytes_copied=facts.static(sum(copied)),
        nodes_before=len(site.interior),
        nodes_after=1 + (outputs if outputs > 1 else 0) + len(plan.layout_nodes),
        numerics=choice.label,
        launches_before=plan.before.launches,
        launches_after=plan.after.launches,
        bytes_before=plan.before.bytes,
        bytes_after=plan.after.bytes,
    )


def _short(location: str) -> str:
    path, _, line = location.rpartition(":")
    return f"{os.path.basename(path)}:{line}" if path else location


def _layout(site: RewrittenSite) -> str:
    return ", ".join(site.layout_nodes) or "-"
