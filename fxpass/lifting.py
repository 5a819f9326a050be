"""Turns the nodes of a graph into terms, in one pass."""

from __future__ import annotations

from torch import fx

from fxpass import composites, facts, mutation, spellings
from fxpass.calls import TABLE, Call
from fxpass.terms import Term, TermTable

TABLES = (spellings, composites)
"""The modules whose import fills the table."""


def lift(graph: fx.Graph) -> TermTable:
    """The terms of all nodes of a graph, in one pass."""
    table = TermTable()
    writers = {writer for writer, _ in mutation.effects(graph).writes}
    table.writes = bool(writers)
    for node in graph.nodes:
        if node.op == "output":
            continue
        table.bind(node, _term(table, node))
        if node in writers:
            table.written()
    return table


def _term(table: TermTable, node: fx.Node) -> Term:
    builder = TABLE.get(node.target) if node.op in ("call_function", "call_method") else None
    found = facts.of(node)
    if builder is None or found is None or "out" in node.kwargs:
        return table.leaf(node)
    return builder(Call(table, node, found)) or table.leaf(node)
