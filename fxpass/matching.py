"""Finds the norms of a graph: families first, then the longest finish whose inside is free.

Decides on the untouched graph and changes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxpass import facts, mutation
from fxpass.diagnose import near_misses
from fxpass.elements import Factor, read_bias, read_element, read_weight
from fxpass.errors import Declined
from fxpass.formula import Binds, Formula
from fxpass.lifting import lift
from fxpass.meaning import Core, read_core
from fxpass.patterns import FAMILIES, FINISHES
from fxpass.residual import Residual, residuals
from fxpass.sites import Decline, Found, Site
from fxpass.spec import NormSpec
from fxpass.terms import Term, TermTable, exact
from fxpass.uses import Uses, computing, region

_MAX_FINISH = 8
"""Longest walk from the normalised value to the end of a finish, in terms."""


@dataclass(frozen=True, eq=False)
class _Candidate:
    formula: Formula
    anchor: Term
    binds: Binds
    size: int


def find(graph: fx.Graph) -> Found:
    """Every norm of a graph, and every near miss with its reason."""
    effects = mutation.effects(graph)
    table = lift(graph, {writer for writer, _ in effects.writes}, effects.overwritten())
    search = _Search(graph, table, effects)
    for term in table.terms():
        if term.op in ("mul", "div"):
            search.visit(term)
    sites = sorted(search.sites, key=lambda site: search.order[site.anchor])
    declined = [*search.declined, *near_misses(table, sites, search.spoken_for)]
    declined.sort(key=lambda miss: search.position(miss.node))
    return Found(tuple(sites), tuple(declined))


class _Search:
    """The state of one search over one graph."""

    def __init__(self, graph: fx.Graph, table: TermTable, effects: mutation.Effects) -> None:
        self.table = table
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self._by_name = {node.name: index for node, index in self.order.items()}
        self.effects = effects
        self.parents = table.parents()
        self.sites: list[Site] = []
        self.declined: list[Decline] = []
        self.spoken_for: set[str] = set()
        """Nodes of declined norms, which need no second decline."""
        self._taken_sums: set[Term] = set()

    def position(self, name: str) -> int:
        """Where a node stands in the graph."""
        return self._by_name.get(name, 0)

    def visit(self, core: Term) -> None:
        """Add the site whose normalised value is `core`, or the reason why it is none."""
        for family in FAMILIES:
            binds = next(family.pattern().match(core, {}), None)
            if binds is None:
                continue
            try:
                self.sites.extend(self._sites(family, core, binds))
            except Declined as declined:
                self.declined.append(self._decline(declined, core))
                self.spoken_for.update((declined.node, *(node.name for node in core.nodes)))
            return

    def _decline(self, declined: Declined, core: Term) -> Decline:
        node = core.node or self._first_node_above(core)
        named = next((n for n in self.order if n.name == declined.node), node)
        where = named or node
        if where is None:
            return Decline(declined.node, declined.reason)
        return Decline(
            where.name,
            declined.reason,
            facts.location(where),
            facts.source_line(where),
            facts.module_path(where),
        )

    def _first_node_above(self, core: Term) -> fx.Node | None:
        for term in self._above(core):
            if term.node is not None:
                return term.node
        return None

    def _above(self, core: Term) -> Iterator[Term]:
        """The normalised value and what is computed from it by casts, scales, adds and copies."""
        level, seen = [core], {core}
        for _ in range(_MAX_FINISH):
            yield from level
            following = [parent for term in level for parent in self.parents.get(term, ())]
            level = []
            for parent in following:
                if parent not in seen and parent.op in ("cast", "mul", "add", "reorder"):
                    seen.add(parent)
                    level.append(parent)

    def _sites(self, family: Formula, core_term: Term, binds: Binds) -> list[Site]:
        """One site; or several, where the source computes one normalised value several times."""
        core = read_core(binds)
        sites: list[Site] = []
        taken: set[fx.Node] = set()
        reasons: list[Declined] = []
        for candidate in self._finishes(core_term, binds):
            # Equal values computed by several nodes are several tensors: each gets its own kernel.
            for node in computing(candidate.anchor.nodes):
                if node in taken:
                    continue
                site = self._first_reading(family, core, candidate, node, reasons)
                if site is not None:
                    sites.append(site)
                    taken.update(site.interior)
        if not sites:
            raise _most_telling(reasons)
        return sites

    def _first_reading(
        self,
        family: Formula,
        core: Core,
        candidate: _Candidate,
        node: fx.Node,
        reasons: list[Declined],
    ) -> Site | None:
        """The site with a residual add if there is one to take, else the plain one, else None."""
        for residual in residuals(core.x, core.dims, self._taken_sums):
            try:
                return self._build(family, core, candidate, residual, node)
            except Declined as declined:
                reasons.append(declined)
        return None

    def _finishes(self, core_term: Term, binds: Binds) -> list[_Candidate]:
        """All ways this normalised value may end, longest first."""
        found = []
        for anchor in self._above(core_term):
            if not anchor.nodes or exact(anchor) is not anchor:
                continue
            for formula in FINISHES:
                matches = formula.pattern(u=core_term).match(anchor, binds)
                for match in itertools.islice(matches, 4):
                    found.append(_Candidate(formula, anchor, match, _depth(anchor, core_term)))
        return sorted(found, key=lambda candidate: -candidate.size)

    def _build(
        self,
        family: Formula,
        core: Core,
        candidate: _Candidate,
        residual: Residual | None,
        node: fx.Node,
    ) -> Site:
        weight = read_weight(candidate.binds, core)
        bias = read_bias(candidate.binds, core)
        element = read_element(candidate.anchor, core, candidate.binds)
        leaves = {t for t in (core.x, core.eps_term, *_operands(weight, bias)) if t is not None}
        inside = region(candidate.anchor, leaves)
        if residual is not None:
            inside |= residual.inside
        uses = Uses(candidate.anchor, node, inside, core, residual)
        outputs = (
            "out",
            *(["sum"] if uses.sum_nodes else []),
            *(["row"] if uses.row_nodes else []),
        )
        spec = _spec(core, element, weight, bias, residual, outputs)
        site = _assemble(
            family, candidate, core, spec, weight, bias, residual, uses, self.order, node
        )
        if any(map(facts.in_transform, (*site.inputs, *site.interior))):
            reason = "it is inside a torch.func transform; torch.compile the whole"
            raise Declined(reason, node.name)
        self._check_order(site)
        mutation.check(site, self.effects, self.order)
        if residual is not None:
            self._taken_sums.add(residual.total)
        return site

    def _check_order(self, site: Site) -> None:
        """Whatever reads a replaced value must come after all inputs of the kernel."""
        latest = max(self.order[node] for node in site.inputs)
        inside = set(site.interior)
        for node in (*site.sum_nodes, *site.row_nodes):
            for user in node.users:
                if user not in inside and self.order[user] <= latest:
                    raise Declined(f"%{user.name} reads it before all inputs exist", node.name)


def _operands(*factors: Factor | None) -> tuple[Term | None, ...]:
    return tuple(None if factor is None else factor.term for factor in factors)


def _depth(anchor: Term, core: Term) -> int:
    """How many terms stand between the normalised value and the end."""
    depth, level = 0, [anchor]
    while core not in level and depth < 2 * _MAX_FINISH:
        level = [arg for term in level for arg in term.args]
        depth += 1
    return depth


def _most_telling(reasons: list[Declined]) -> Declined:
    """The reason to show: the one of the shortest finish, which comes last."""
    return reasons[-1] if reasons else Declined("the normalised value is not a node of the graph")


def _spec(
    core: Core,
    element: tuple[object, ...],
    weight: Factor | None,
    bias: Factor | None,
    residual: Residual | None,
    outputs: tuple[str, ...],
) -> NormSpec:
    x, other, total = (
        (core.x, None, None) if residual is None else (residual.x, residual.other, residual.total)
    )
    assert x.dtype is not None
    return NormSpec(
        x=x.dtype,
        row=core.steps,
        element=element,  # type: ignore[arg-type]
        square=core.square,
        residual=None if other is None else other.dtype,
        sum=None if total is None else total.dtype,
        weight=None if weight is None else weight.term.dtype,
        weight_offset=0.0 if weight is None else weight.offset,
        weight_offset_dtype=None if weight is None else weight.offset_dtype,
        bias=None if bias is None else bias.term.dtype,
        outputs=outputs,
    )


def _assemble(
    family: Formula,
    candidate: _Candidate,
    core: Core,
    spec: NormSpec,
    weight: Factor | None,
    bias: Factor | None,
    residual: Residual | None,
    uses: Uses,
    order: dict[fx.Node, int],
    anchor: fx.Node,
) -> Site:
    finish = candidate.formula.name
    read = {source for node in uses.nodes for source in node.all_input_nodes}

    def node_of(term: Term) -> fx.Node:
        """The node of a term; of several equal ones, the one this norm reads."""
        nodes = (term if term.nodes else exact(term)).nodes
        return next((node for node in nodes if node in read), nodes[0])

    return Site(
        variant=f"{family.name}.{finish}" if finish else family.name,
        spec=spec,
        x=node_of(core.x if residual is None else residual.x),
        residual=None if residual is None else node_of(residual.other),
        weight=None if weight is None else node_of(weight.term),
        bias=None if bias is None else node_of(bias.term),
        eps=core.eps or 0.0,
        eps_node=None if core.eps_term is None else core.eps_term.nodes[0],
        dims=core.dims,
        hidden=core.hidden,
        out_nodes=(anchor,),
        sum_nodes=uses.sum_nodes,
        row_nodes=uses.row_nodes,
        interior=tuple(sorted(uses.nodes, key=order.__getitem__)),
        location=facts.location(anchor),
        source=facts.source_line(anchor),
        module=facts.module_path(anchor),
    )
