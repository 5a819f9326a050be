"""The program per element, and the weight and bias it reads, off the matched terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxpass import facts
from fxpass.dtypes import is_exact_cast, short
from fxpass.errors import Declined
from fxpass.formula import Binds
from fxpass.meaning import KNOWN_DTYPES, Core, decline, known_dtype, name_of
from fxpass.spec import Step
from fxpass.terms import Term, exact, number


@dataclass(frozen=True, eq=False)
class Factor:
    """A weight or bias operand."""

    term: Term
    offset: float = 0.0
    offset_dtype: torch.dtype | None = None


def read_element(anchor: Term, core: Core, binds: Binds) -> tuple[Step, ...]:
    """The steps per element, from x to the anchor. Raises Declined."""
    shape = core.x.shape or ()
    steps: list[Step] = []
    term = anchor
    while exact(term) is not core.x:
        if term.shape is None or not facts.same_shape(tuple(term.shape), shape):
            decline("the result is broadcast to another shape", term)
        if term.op in ("copy", "reorder"):
            term = term.args[0]
            continue
        dtype = known_dtype(term)
        term, step = _element_step(term, dtype, core, binds)
        if step is not None:
            steps.append(step)
    return tuple(reversed(steps))


def _element_step(
    term: Term, dtype: torch.dtype, core: Core, binds: Binds
) -> tuple[Term, Step | None]:
    if term.op == "cast":
        rounds = not is_exact_cast(term.args[0].dtype or dtype, dtype)
        return term.args[0], Step("cast", dtype) if rounds else None
    first, second = term.args
    roles = {id(core.row): "row", id(binds.get("weight")): "weight"}
    if binds.get("b") is not None:
        roles[id(binds["b"])] = "bias"
    for inner, other in ((first, second), (second, first)):
        role = roles.get(id(other)) or roles.get(id(exact(other)))
        op = {("mul", "row"): "mul_row", ("div", "row"): "div_row", ("mul", "weight"): "mul_weight"}
        name = "add_bias" if (term.op, role) == ("add", "bias") else op.get((term.op, role or ""))
        if name is not None and not (name == "div_row" and other is first):
            return inner, Step(name, dtype)
    decline(f"{term.op} is not a step of a norm", term)


def read_weight(binds: Binds, core: Core) -> Factor | None:
    """The weight operand and its offset. Raises Declined if its shape is not the row's."""
    w = binds.get("w")
    if w is None:
        return None
    _check_over_row(w, core, "weight", most=core.dims + (1 if _is_parameter(w) else 0))
    whole = exact(binds["weight"])
    if "offset" not in binds or whole is exact(w):
        return Factor(w)
    offset = number(binds["offset"])
    assert offset is not None
    return Factor(w, offset, known_dtype(whole))


def read_bias(binds: Binds, core: Core) -> Factor | None:
    """The bias operand."""
    if "b" not in binds:
        return None
    _check_over_row(binds["b"], core, "bias", most=core.dims)
    return Factor(binds["b"])


def _is_parameter(term: Term) -> bool:
    """True for an input or attribute of the graph, seen through casts and views."""
    while term.op in ("cast", "view", "expand"):
        term = term.args[0]
    return term.node is not None and term.node.op in ("placeholder", "get_attr")


def _check_over_row(term: Term, core: Core, role: str, most: int) -> None:
    """A weight must cover the normalised dimensions, and at most `most` dimensions in all.

    One more dimension is a weight per head, which repeats every few rows. An operand that covers
    more than that (a gate, rotary angles, a second stream) is no weight.
    """
    shape = core.x.shape or ()
    found = term.shape
    if number(term) is not None or found is None or not term.nodes or term.dtype is None:
        raise Declined(f"{role} is not a tensor of the graph", name_of(term))
    if term.dtype not in KNOWN_DTYPES:
        raise Declined(f"{role} is {short(term.dtype)}", name_of(term))
    trimmed = tuple(found)
    while len(trimmed) > core.dims and facts.same(trimmed[0], 1):
        trimmed = trimmed[1:]
    fits = core.dims <= len(trimmed) <= min(most, max(core.dims, len(shape) - 1)) and (
        facts.same_shape(trimmed, tuple(shape[len(shape) - len(trimmed) :]))
    )
    if not fits:
        needed = list(shape[len(shape) - core.dims :])
        raise Declined(f"{role} has shape {list(found)}; {needed} is needed", name_of(term))
