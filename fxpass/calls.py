"""One call of a graph as the spelling table sees it, and the table itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpass import facts
from fxpass.terms import Term, TermTable

Builder = Callable[["Call"], "Term | None"]
TABLE: dict[Any, Builder] = {}
"""Target (function, overload or method name) -> what turns a call into a term."""


class Call:
    """One call with its arguments as terms and its result's facts."""

    def __init__(self, table: TermTable, node: fx.Node, result: facts.TensorFacts) -> None:
        self.table = table
        self.node = node
        self.result = result

    def raw(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument as the graph has it, by position or by one of its names."""
        if position < len(self.node.args):
            return self.node.args[position]
        for name in names:
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        return default

    def term(self, position: int, *names: str) -> Term | None:
        """A tensor or number argument as a term."""
        found = self.raw(position, *names)
        if isinstance(found, fx.Node):
            return self.table.of(found)
        if isinstance(found, (int, float)):
            return self.table.constant(found)
        return None

    def make(self, op: str, *args: Term | None, params: tuple[Any, ...] = ()) -> Term | None:
        """A term with the node's own dtype and shape; None if an argument is missing."""
        known = tuple(arg for arg in args if arg is not None)
        if len(known) != len(args):
            return None
        return self.table.make(op, known, params, self.result.dtype, self.result.shape)


def spelled(*targets: Any) -> Callable[[Builder], Builder]:
    """Add targets (functions, overloads, method names) to the table."""

    def add(builder: Builder) -> Builder:
        for target in targets:
            TABLE[target] = builder
        return builder

    return add


def reduced_dims(raw: Any, ndim: int) -> tuple[int, ...] | None:
    """Reduced dimensions counted from the front, sorted; None if they are not ints."""
    if raw is None or raw == [] or raw == ():
        return tuple(range(ndim))
    listed = list(raw) if isinstance(raw, (list, tuple, torch.Size)) else [raw]
    if not all(isinstance(dim, int) for dim in listed):
        return None
    return tuple(sorted(dim % ndim if ndim else 0 for dim in listed))
