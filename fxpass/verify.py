"""Checks that a rewrite changed nothing but the nodes: shapes, dtypes, strides, a legal graph."""

from __future__ import annotations

from torch import fx

from fxpass import facts
from fxpass.layout import is_contiguous


class VerifyError(RuntimeError):
    """A rewrite would change what a value is. A bug in fxpass, never the user's fault."""


class UnprovenError(VerifyError):
    """Symbolic strides that are equal only by a guard; the norm is left alone."""


def same_tensor(old: fx.Node, new: fx.Node) -> None:
    """Raises VerifyError unless both nodes compute tensors of one shape, dtype and strides."""
    a, b = facts.of(old), facts.of(new)
    if a is None or b is None:
        raise VerifyError(f"%{old.name}: no facts to compare")
    if a.dtype != b.dtype:
        raise VerifyError(f"%{old.name} is {a.dtype}, its replacement {b.dtype}")
    if not facts.same_shape(a.shape, b.shape):
        raise VerifyError(f"%{old.name} is {list(a.shape)}, its replacement {list(b.shape)}")
    if not _same_strides(a, b):
        if not all(isinstance(step, int) for step in (*a.stride, *b.stride)):
            raise UnprovenError("the result's strides are known only at run time")
        raise VerifyError(f"%{old.name} has strides {a.stride}, its replacement {b.stride}")


def _same_strides(a: facts.TensorFacts, b: facts.TensorFacts) -> bool:
    if is_contiguous(a.shape, a.stride) and is_contiguous(b.shape, b.stride):
        return True
    return all(
        facts.same(x, y) or facts.same(size, 1)
        for size, x, y in zip(a.shape, a.stride, b.stride, strict=True)
    )


def legal(graph: fx.Graph) -> None:
    """Raises if the graph is not well formed."""
    graph.lint()
