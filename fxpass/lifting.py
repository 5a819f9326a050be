"""Turns the nodes of a graph into terms, in one pass."""

from __future__ import annotations

from collections.abc import Set

from torch import fx

from fxpass import composites, facts, parts, spellings
from fxpass.calls import TABLE, Builder, Call
from fxpass.terms import Term, TermTable

TABLES = (spellings, parts, composites)
"""The modules whose import fills the table."""


def lift(graph: fx.Graph, writers: Set[fx.Node], overwritten: frozenset[fx.Node]) -> TermTable:
    """The terms of all nodes of a graph, in one pass.

    writers: nodes that write in place. overwritten: those whose memory is written.
    """
    table = TermTable()
    table.writes = bool(writers)
    table.overwritten = overwritten
    for node in graph.nodes:
        if node.op == "output":
            continue
        table.bind(node, _term(table, node))
        if node in writers:
            table.written()
    return table


def _term(table: TermTable, node: fx.Node) -> Term:
    if node.op == "call_method" and node.target == "item":
        return _item(table, node)
    builder = _builder(node)
    found = facts.of(node)
    if builder is None or found is None or "out" in node.kwargs:
        return table.leaf(node)
    return builder(Call(table, node, found)) or table.leaf(node)


def _builder(node: fx.Node) -> Builder | None:
    """The table's row for a call; an operator packet stands for its default overload."""
    if node.op not in ("call_function", "call_method"):
        return None
    return TABLE.get(node.target) or TABLE.get(getattr(node.target, "default", None))


def _item(table: TermTable, node: fx.Node) -> Term:
    """A Python float read off a 0-d tensor, which is how dynamic shapes pass `self.eps`."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return table.leaf(node)
    found = facts.of(source)
    if found is None or found.shape != () or not found.dtype.is_floating_point or table.writes:
        return table.leaf(node)
    return table.of(source)
