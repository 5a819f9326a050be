"""A graph before and after the rewrite, node by node, with the sites that explain each change."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxpass import facts, matching, plan, printing, report, sampling, torch_private
from fxpass.options import Options
from fxpass.plan import Plan
from fxpass.report import Kept, Report, RewrittenSite
from fxpass.rewrite import apply

DIFF_VERSION = 1


@dataclass(frozen=True)
class Row:
    """One node: on both sides if the rewrite kept it, else on one."""

    before: str
    after: str
    site: int | None
    """Index of the site whose nodes it belongs to, in `Diff.sites`."""
    location: str
    source: str

    @property
    def mark(self) -> str:
        """`-` taken out, `+` put in, a blank for what stayed."""
        if self.before and self.after:
            return " "
        return "-" if self.before else "+"


@dataclass(frozen=True)
class Edge:
    """A value read by a node, both by index in a picture's nodes."""

    source: int
    target: int


@dataclass(frozen=True)
class Flow:
    """What one site computes, as a picture shows it: inputs first, in graph order."""

    labels: tuple[str, ...]
    inputs: int
    """How many of the labels are inputs."""
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class SiteDiff:
    """One rewritten norm: its record, its nodes before and after."""

    record: RewrittenSite
    graph: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    flow_before: Flow
    flow_after: Flow


@dataclass(frozen=True)
class Diff:
    """Everything a viewer shows."""

    target: str
    report: Report
    sites: tuple[SiteDiff, ...]
    graphs: tuple[tuple[Row, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `report` follows the report's own schema."""
        return {
            "version": DIFF_VERSION,
            "target": self.target,
            "report": self.report.to_dict(),
            "sites": [_site_dict(index, site) for index, site in enumerate(self.sites)],
            "graphs": [[dataclasses.asdict(row) for row in rows] for rows in self.graphs],
        }


def _site_dict(index: int, site: SiteDiff) -> dict[str, Any]:
    return {"site": index, "graph": site.graph, "before": site.before, "after": site.after}


def of_graphs(target: str, graphs: Iterable[fx.GraphModule], options: Options) -> Diff:
    """Rewrites a copy of each graph and keeps both."""
    return _joined(target, (_Rewritten(each.graph, options) for each in graphs))


def of_kept(target: str, kept: Iterable[Kept]) -> Diff:
    """The diff behind a report, each graph planned where and how it was planned there."""

    def rewritten(one: Kept) -> _Rewritten:
        inside = torch_private.inside_inductor() if one.in_inductor else contextlib.nullcontext()
        with inside:
            return _Rewritten(one.graph, one.options)

    return _joined(target, map(rewritten, kept))


def _joined(target: str, rewritten: Iterable[_Rewritten]) -> Diff:
    """Several graphs in one diff."""
    whole = Report()
    sites: list[SiteDiff] = []
    rows: list[tuple[Row, ...]] = []
    for index, one in enumerate(rewritten):
        rows.append(tuple(one.rows(len(sites))))
        sites += one.sites(index)
        whole.add(one.report)
    return Diff(target, whole, tuple(sites), tuple(rows))


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, node by node, under the same names and with the same facts."""
    return _copied(graph)[0]


def _copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    made = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = made.node_copy(node, copies.__getitem__)
    return made, copies


class _Rewritten:
    """A graph and a rewritten copy of it."""

    def __init__(self, graph: fx.Graph, options: Options) -> None:
        self._old = graph
        self._new, copies = _copied(graph)
        self._origin = {copy: node for node, copy in copies.items()}
        found = matching.find(self._new)
        decisions = plan.decide(found, options, build=options.verify)
        if options.verify:
            decisions = sampling.refuse_what_differs(decisions)
        # Lines are read while the old nodes are still wired as they were.
        self._lines = printing.lines(self._new)
        self._readers = {node: tuple(node.all_input_nodes) for node in self._new.nodes}
        self._places = {node: (facts.location(node), facts.source_line(node)) for node in copies}
        applied = apply(self._new, decisions.plans)
        dropped = {gone: str(error) for gone, error in applied.dropped}
        self._decisions = plan.without(decisions, dropped)
        self._made = applied.made
        self.report = report.of_decisions(self._decisions)

    @property
    def _plans(self) -> Sequence[Plan]:
        return self._decisions.plans

    def sites(self, graph: int) -> list[SiteDiff]:
        """One entry per rewritten norm, in the report's order."""
        after = printing.lines(self._new)
        return [
            SiteDiff(
                record=record,
                graph=graph,
                before=tuple(self._lines[node] for node in made.site.interior),
                after=tuple(after[node] for node in self._nodes_of(made)),
                flow_before=_flow(made.site.interior, self._readers),
                flow_after=_flow(self._nodes_of(made), None),
            )
            for record, made in zip(self.report.rewritten, self._plans, strict=True)
        ]

    def _nodes_of(self, made: Plan) -> list[fx.Node]:
        alive = set(self._new.nodes)
        return sorted(node for node in self._made[made] if node in alive)

    def rows(self, first: int) -> list[Row]:
        """Both graphs side by side: what stayed in one row, what changed between those."""
        old_site = {
            node: first + index
            for index, made in enumerate(self._plans)
            for node in made.site.interior
        }
        new_site = {
            node: first + index
            for index, made in enumerate(self._plans)
            for node in self._made[made]
        }
        after = printing.lines(self._new)
        rows: list[Row] = []
        waiting = iter(self._origin)
        for node in self._new.nodes:
            if node not in self._origin:
                rows.append(Row("", after[node], new_site.get(node), *_place(node)))
                continue
            rows += self._taken_out(waiting, node, old_site)
            rows.append(Row(self._lines[node], after[node], None, *self._place(node)))
        rows += self._taken_out(waiting, None, old_site)
        return rows

    def _taken_out(
        self, waiting: Iterable[fx.Node], until: fx.Node | None, sites: Mapping[fx.Node, int]
    ) -> Iterable[Row]:
        """Old nodes that are gone, up to the next that stayed."""
        for node in waiting:
            if node is until:
                return
            yield Row(self._lines[node], "", sites.get(node), *self._place(node))

    def _place(self, copy: fx.Node) -> tuple[str, str]:
        return self._places[self._origin[copy]]


def _place(node: fx.Node) -> tuple[str, str]:
    return facts.location(node), facts.source_line(node)


def _flow(nodes: Sequence[fx.Node], readers: Mapping[fx.Node, tuple[fx.Node, ...]] | None) -> Flow:
    """The picture of some nodes and of what they read."""
    inside = set(nodes)
    reads = {node: readers[node] if readers else tuple(node.all_input_nodes) for node in nodes}
    outside = dict.fromkeys(n for node in nodes for n in reads[node] if n not in inside)
    order = [*outside, *nodes]
    index = {node: at for at, node in enumerate(order)}
    edges = tuple(
        Edge(index[source], index[node]) for node in nodes for source in dict.fromkeys(reads[node])
    )
    labels = [printing.label(node, is_input=node in outside) for node in order]
    return Flow(tuple(labels), len(outside), edges)
