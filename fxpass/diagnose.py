"""Why something that looks like a norm is none: the first broken condition of each near miss.

A near miss is a root (rsqrt, sqrt, a fractional power) of a mean or sum of something like squares
that is multiplied or divided into a tensor, and that no formula took.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fxpass import facts
from fxpass.dtypes import short
from fxpass.formula import bare
from fxpass.meaning import KNOWN_DTYPES
from fxpass.sites import Decline, Site
from fxpass.terms import Term, TermTable, exact, number

_ROOTS = ("rsqrt", "sqrt", "pow")
_PER_ROW = frozenset("add mul div clamp_min clamp_max reciprocal cast view expand sub".split())


def near_misses(table: TermTable, sites: Iterable[Site], named: set[str]) -> list[Decline]:
    """One decline per root that no site covers and no earlier decline speaks of (`named`)."""
    covered = {node for site in sites for node in site.interior}
    parents = table.parents()
    found: list[Decline] = []
    for root in table.terms():
        shown = _shown(root, parents)
        if root.op not in _ROOTS or shown is None or shown in covered:
            continue
        reduction = _reduction_under(root)
        if reduction is None or _spoken_for(root, reduction, named, parents):
            continue
        applied = _applied(root, parents)
        reason = _reason(root, reduction, applied, parents)
        if reason is not None:
            found.append(_at(shown, reason))
    return found


def _spoken_for(
    root: Term, reduction: Term, named: set[str], parents: dict[Term, list[Term]]
) -> bool:
    """True if an earlier decline names a node of the same chain."""
    chain = {root, reduction, exact(reduction.args[0]), *_chain(root, parents)}
    chain.update(exact(arg) for term in list(chain) for arg in term.args)
    return any(node.name in named for term in chain for node in term.nodes)


def _chain(root: Term, parents: dict[Term, list[Term]]) -> list[Term]:
    """What is computed from the root while it still has one value per row, and where it ends."""
    level, found = [root], []
    for _ in range(5):
        level = [parent for term in level for parent in parents.get(term, ())]
        found += level
        level = [term for term in level if term.op in _PER_ROW]
    return found


def _reduction_under(root: Term) -> Term | None:
    """The mean or sum inside the root, if it is one of something like squares."""
    term = root.args[0]
    for _ in range(10):
        term = bare(term)
        if term.op in ("mean", "sum"):
            inner = exact(term.args[0])
            product = inner.op == "mul" and all(number(arg) is None for arg in inner.args)
            return term if inner.op in ("square", "pow", "abs") or product else None
        if term.op not in ("add", "sub", "mul", "div", "clamp_min", "sqrt", "square", "reciprocal"):
            return None
        term = next((arg for arg in term.args if _reduces(arg)), term.args[0])
    return None


def _reduces(term: Term) -> bool:
    for _ in range(10):
        term = bare(term)
        if term.op in ("mean", "sum"):
            return True
        if not term.args:
            return False
        term = next((arg for arg in term.args if number(arg) is None), term.args[0])
    return False


def _applied(root: Term, parents: dict[Term, list[Term]]) -> Term | None:
    """The first product or quotient of the root with a larger tensor."""
    rank = _numel(root)
    for term in _chain(root, parents):
        if term.op in ("mul", "div") and term.shape is not None and _numel(term) != rank:
            return term
    return None


def _numel(term: Term) -> str:
    return str(facts.numel(tuple(term.shape or ())))


def _reason(
    root: Term, reduction: Term, applied: Term | None, parents: dict[Term, list[Term]]
) -> str | None:
    """The first broken condition, checked from the squares outwards."""
    inner = exact(reduction.args[0])
    if applied is None:
        return None
    return (
        _inner_reason(inner, reduction)
        or _dims_reason(reduction, inner)
        or _dtype_reason(reduction, root)
        or _root_reason(root)
        or _outside_reason(root, applied)
        or _operand_reason(applied, inner, parents)
    )


def _inner_reason(inner: Term, reduction: Term) -> str | None:
    if inner.op == "pow":
        return f"{reduction.op} of x**{inner.params[0]:.12g}; x**2 is needed"
    if inner.op == "abs":
        return f"{reduction.op} of absolute values, not of squares"
    if inner.op == "mul":
        return f"{reduction.op} of a product of two different tensors, not of squares"
    return None


def _dims_reason(reduction: Term, inner: Term) -> str | None:
    rank = len(inner.shape or ())
    dims = reduction.params[0]
    if dims == tuple(range(rank - len(dims), rank)):
        return None
    shown = ", ".join(str(dim - rank) for dim in dims)
    return f"{reduction.op} is over dim {shown}; only the last dims can be fused"


def _dtype_reason(*terms: Term) -> str | None:
    for term in terms:
        if term.dtype is not None and term.dtype not in KNOWN_DTYPES:
            return f"{term.op} is computed in {short(term.dtype)}"
    return None


def _root_reason(root: Term) -> str | None:
    if root.op == "pow":
        return f"the mean is raised to {root.params[0]:.12g}; -0.5 is needed"
    return None


def _outside_reason(root: Term, applied: Term) -> str | None:
    """Eps added to the root instead of under it."""
    for operand in applied.args:
        term = bare(operand)
        for _ in range(4):
            if term.op == "add" and any(_unscaled(arg) is root for arg in term.args):
                return "eps is added outside the root; it must be added to the mean"
            if term.op == "clamp_max":
                return "the inverse is clipped (clamp with max), so short rows are not normalised"
            if not term.args:
                break
            term = bare(next((arg for arg in term.args if number(arg) is None), term.args[0]))
    return None


def _unscaled(term: Term) -> Term:
    """A value per row without its constant factors."""
    term = bare(term)
    while term.op in ("mul", "div") and number(term.args[1]) is not None:
        term = bare(term.args[0])
    return term


def _operand_reason(applied: Term, inner: Term, parents: dict[Term, list[Term]]) -> str:
    x = exact(inner.args[0])
    if not _reads(applied, x):
        if any(_reads(term, x) for term in _chain(applied, parents)):
            return "the inverse is scaled before x is: another rounding order than any norm has"
        return "the mean is of a different tensor than the one normalised"
    return "the operations between the mean and x are not a norm fxpass knows"


def _reads(product: Term, x: Term) -> bool:
    return product.op in ("mul", "div") and any(exact(arg) is x for arg in product.args)


def _shown(root: Term, parents: dict[Term, list[Term]]) -> fx.Node | None:
    """The node to name: the root's, or that of the composite operator it stands in."""
    nodes: list[fx.Node] = [n for term in (root, *parents.get(root, ())) for n in term.nodes]
    return nodes[0] if nodes else None


def _at(node: fx.Node, reason: str) -> Decline:
    return Decline(
        node.name, reason, facts.location(node), facts.source_line(node), facts.module_path(node)
    )
