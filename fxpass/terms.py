"""Nodes as terms: a small language in which every spelling of an operation is one operation.

Terms are interned: two nodes that compute the same value from the same inputs (three separate
`.float()` of one tensor, say) are one term with three nodes. Casts that cannot round are looked
through, so the same value in two dtypes is one value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpass import facts
from fxpass.dtypes import is_exact_cast


class Term:
    """One value of the graph: an operation on terms, or a leaf (a node not looked into)."""

    __slots__ = ("args", "dtype", "nodes", "op", "params", "shape")

    def __init__(
        self,
        op: str,
        args: tuple[Term, ...],
        params: tuple[Any, ...],
        dtype: torch.dtype | None,
        shape: tuple[Any, ...] | None,
    ) -> None:
        self.op = op
        self.args = args
        self.params = params
        self.dtype = dtype
        self.shape = shape
        self.nodes: list[fx.Node] = []
        """The nodes that compute this value, in graph order; empty inside a composite operator."""

    @property
    def node(self) -> fx.Node | None:
        """The first node that computes this value."""
        return self.nodes[0] if self.nodes else None

    def __repr__(self) -> str:
        name = self.nodes[0].name if self.nodes else "-"
        return f"{self.op}%{name}{self.params or ''}"


class TermTable:
    """Interns terms and remembers which term each node computes."""

    def __init__(self) -> None:
        self.writes = False
        """True if the graph writes in place."""
        self.overwritten: frozenset[fx.Node] = frozenset()
        """Nodes whose memory some node writes to: a copy of one is a value of its own."""
        self._epoch = 0
        self._interned: dict[tuple[Any, ...], Term] = {}
        self._of_node: dict[fx.Node, Term] = {}

    def make(
        self,
        op: str,
        args: tuple[Term, ...] = (),
        params: tuple[Any, ...] = (),
        dtype: torch.dtype | None = None,
        shape: tuple[Any, ...] | None = None,
    ) -> Term:
        """The term of this operation, made once."""
        sizes = tuple(map(str, shape or ()))
        key = (op, tuple(map(id, args)), params, dtype, sizes, 0 if op == "const" else self._epoch)
        term = self._interned.get(key)
        if term is None:
            term = self._interned[key] = Term(op, args, params, dtype, shape)
        return term

    def constant(self, number: float | int | bool) -> Term:
        """The term of a Python number."""
        return self.make("const", params=(float(number),))

    def leaf(self, node: fx.Node) -> Term:
        """A node as a value of its own."""
        found = facts.of(node)
        dtype, shape = (found.dtype, found.shape) if found else (None, None)
        return self.make("leaf", params=(node.name,), dtype=dtype, shape=shape)

    def written(self) -> None:
        """Memory was written: the same operation may give another value from here on."""
        self._epoch += 1

    def bind(self, node: fx.Node, term: Term) -> None:
        """Record that `node` computes `term`."""
        self._of_node[node] = term
        term.nodes.append(node)

    def terms(self) -> list[Term]:
        """All terms, in the order they were made (arguments before results)."""
        return list(self._interned.values())

    def parents(self) -> dict[Term, list[Term]]:
        """For each term, the terms computed from it."""
        found: dict[Term, list[Term]] = {}
        for term in self._interned.values():
            for arg in dict.fromkeys(term.args):
                found.setdefault(arg, []).append(term)
        return found

    def of(self, node: fx.Node) -> Term:
        """The term a node computes (nodes are bound in graph order before anyone asks)."""
        return self._of_node[node]


def exact(term: Term) -> Term:
    """The term without copies and casts that cannot round: the same value, maybe narrower."""
    while term.op == "copy" or (term.op == "cast" and _exact(term)):
        term = term.args[0]
    return term


def ordered(term: Term) -> Term:
    """The same without copies into another memory order too: equal values, maybe other strides."""
    term = exact(term)
    while term.op == "reorder":
        term = exact(term.args[0])
    return term


def _exact(term: Term) -> bool:
    source = term.args[0].dtype
    return source is not None and term.dtype is not None and is_exact_cast(source, term.dtype)


def number(term: Term) -> float | None:
    """The value of a constant term (through casts), or None."""
    while term.op in ("cast", "copy", "view", "expand"):
        term = term.args[0]
    return term.params[0] if term.op == "const" else None
