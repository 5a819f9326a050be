"""Who else reads the inside of a match, and what the kernel must therefore return."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from fxpass.errors import Declined
from fxpass.meaning import Core
from fxpass.residual import Residual
from fxpass.terms import Term, exact

_PASSIVE = frozenset(
    (
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten._assert_async.msg",
    )
)
"""Nodes of exported graphs that check a value and pass nothing on: no users."""


def is_passive(node: fx.Node) -> bool:
    """True for nodes that assert something about a tensor and compute nothing."""
    return node.op == "call_function" and str(node.target) in _PASSIVE


def region(anchor: Term, leaves: set[Term]) -> set[Term]:
    """All terms from the anchor down to the leaves, leaves excluded."""
    inside: set[Term] = set()
    stack = [anchor]
    while stack:
        term = stack.pop()
        if term in inside or term in leaves or term.op in ("leaf", "const"):
            continue
        inside.add(term)
        stack.extend(term.args)
    return inside


class Uses:
    """Splits the inside of a match into what dies, what stays and what must be returned.

    Raises Declined if a value is read outside that the kernel can neither return nor leave alone.
    """

    def __init__(
        self,
        anchor: Term,
        node: fx.Node,
        inside: set[Term],
        core: Core,
        residual: Residual | None,
    ) -> None:
        self.nodes = _feeding(node, {node for term in inside for node in term.nodes})
        self.sum_nodes: tuple[fx.Node, ...] = ()
        self.row_nodes: tuple[fx.Node, ...] = ()
        self._total = None if residual is None else residual.total
        self._row = _row_value(core.row)
        self._kept: set[fx.Node] = set()
        ordered = sorted(inside, key=_depth_first(anchor, inside))
        for term in ordered:
            if term is not anchor:
                self._serve(term)
        self.nodes -= self._kept

    def _serve(self, term: Term) -> None:
        nodes = tuple(node for node in term.nodes if node in self.nodes)
        read = [node for node in nodes if any(map(self._reads, node.users))]
        if not read:
            return
        if term in (self._total, self._row) and len(computing(nodes)) > 1:
            # One output for both would make two tensors of the source share memory.
            raise Declined(f"{term.op} is computed twice and read outside", nodes[0].name)
        if term is self._total:
            self.sum_nodes = nodes
        elif len(read) < len(nodes):
            self._kept.update(read)  # computed twice in the source: the other one is ours
        elif term is self._row:
            self.row_nodes = nodes
        elif _cheap(term):
            self._kept.update(nodes)
        else:
            user = next(user for user in read[0].users if self._reads(user)).name
            raise Declined(f"{term.op} inside the norm is also read by %{user}", nodes[0].name)

    def _reads(self, user: fx.Node) -> bool:
        return (user not in self.nodes or user in self._kept) and not is_passive(user)


def computing(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Of the nodes of one term, those that make a tensor; the rest pass one of these on."""
    return [node for node in nodes if not any(source in nodes for source in node.all_input_nodes)]


def _feeding(anchor: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """The nodes the anchor is computed from; equal ones elsewhere in the graph are not ours."""
    found: set[fx.Node] = set()
    stack = [anchor]
    while stack:
        node = stack.pop()
        if node in inside and node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _row_value(row: Term) -> Term:
    """The last value per row that is computed, not only reshaped or widened."""
    while row.op in ("view", "expand", "copy") or (row.op == "cast" and exact(row) is not row):
        row = row.args[0]
    return row


def _cheap(term: Term) -> bool:
    """Nodes that may stay for their other readers: exact casts, views, weight preparation."""
    if term.op in ("view", "expand", "copy", "cast"):
        return term.op != "cast" or exact(term) is not term
    return (
        term.op == "add"
        and any(arg.op == "const" for arg in term.args)
        and all(exact(arg).op in ("const", "leaf") for arg in term.args)
    )


def _depth_first(anchor: Term, inside: set[Term]) -> Callable[[Term], int]:
    """A sort key: terms nearer to the anchor first, so that readers are judged before the read."""
    rank: dict[Term, int] = {}

    def visit(term: Term, depth: int) -> None:
        if term in inside and rank.get(term, -1) < depth:
            rank[term] = depth
            for arg in term.args:
                visit(arg, depth + 1)

    visit(anchor, 0)
    return lambda term: rank.get(term, len(inside))
