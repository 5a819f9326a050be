"""The residual add in front of a norm, as a second way to read the same site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fxpass import facts
from fxpass.dtypes import is_exact_cast
from fxpass.meaning import KNOWN_DTYPES
from fxpass.terms import Term, exact


@dataclass(frozen=True, eq=False)
class Residual:
    """x is `total` = `x` + `other`, maybe seen through views that keep the last dimension."""

    x: Term
    other: Term
    total: Term
    inside: frozenset[Term]
    """The add and the views between it and the norm."""


def residuals(x: Term, dims: int, taken: set[Term]) -> Iterator[Residual | None]:
    """The residual reading of x, if there is one, then the plain one (None).

    `dims` trailing dimensions are normalised; a view between add and norm must keep them.
    An add that another norm has taken over is not taken twice: that norm returns the sum.
    """
    found = _residual(x, dims)
    if found is not None and found.total not in taken:
        yield found
    yield None


def _residual(x: Term, dims: int) -> Residual | None:
    total, inside = x, {x}
    while total.op == "view" and _keeps_last_dims(total, dims):
        total = total.args[0]
        inside.add(total)
    if total.op != "add" or total.dtype not in KNOWN_DTYPES or not total.nodes:
        return None
    between: set[Term] = set(inside)
    operands = []
    for arg in total.args:
        operands.append(exact(arg))
        while arg is not exact(arg):
            between.add(arg)
            arg = arg.args[0]
    a, b = operands
    if not (_addend(a, total) and _addend(b, total)):
        return None
    return Residual(a, b, total, frozenset(between))


def _keeps_last_dims(view: Term, dims: int) -> bool:
    before, after = tuple(view.args[0].shape or ()), tuple(view.shape or ())
    if min(len(before), len(after)) < dims:
        return False
    return facts.same_shape(before[len(before) - dims :], after[len(after) - dims :])


def _addend(term: Term, total: Term) -> bool:
    """A tensor of the sum's own shape, in a dtype whose values the sum's arithmetic holds."""
    if not term.nodes or term.dtype not in KNOWN_DTYPES or term.shape is None:
        return False
    wide = total.dtype
    assert wide is not None
    return facts.same_shape(tuple(term.shape), tuple(total.shape or ())) and is_exact_cast(
        term.dtype, wide
    )
