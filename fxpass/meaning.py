"""From matched terms to meaning: reads the steps, and so every rounding, off the graph.

A formula has said which term is x, the weight, the bias, eps and the value per row. Here the
chains between them are walked and written down as a `NormSpec`; whatever does not mean what the
formula suggests (a mean over another dimension, a weight of another shape) is declined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch

from fxpass import facts
from fxpass.dtypes import SHORT_NAMES, is_exact_cast, short
from fxpass.errors import Declined
from fxpass.formula import Binds, bare
from fxpass.spec import Step
from fxpass.terms import Term, exact, number

KNOWN_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Core:
    """The part every finish shares: x, the program per row, and eps."""

    x: Term
    row: Term
    """The value per row as x meets it."""
    square: torch.dtype
    steps: tuple[Step, ...]
    dims: int
    """How many trailing dimensions are normalised."""
    hidden: facts.Size
    eps: float | None
    eps_term: Term | None
    """eps as a one-element tensor of the graph."""


def read_core(binds: Binds) -> Core:
    """The program per row. Raises Declined with the first thing that is not a norm."""
    x, row = binds["x"], binds["row"]
    _check_x(x)
    reader = _RowReader(x, binds)
    steps = reader.steps(_unexpanded(row))
    eps, eps_term = _read_eps(binds.get("eps"))
    _check_row_shape(x, row, reader.dims)
    return Core(x, row, reader.square, tuple(steps), reader.dims, reader.hidden, eps, eps_term)


def _check_x(x: Term) -> None:
    if x.dtype is None or x.shape is None or not x.nodes:
        raise Declined("x has no known shape and dtype (no fake tensor on its node)", name_of(x))
    if x.dtype not in KNOWN_DTYPES:
        known = ", ".join(map(short, KNOWN_DTYPES))
        raise Declined(f"x is {short(x.dtype)}; known: {known}", name_of(x))
    if _is_centred(x):
        raise Declined("x is y - mean(y): this is a LayerNorm, not an RMSNorm", name_of(x))


def _is_centred(x: Term) -> bool:
    """True for y - mean(y), through casts."""
    while x.op == "cast":
        x = x.args[0]
    if x.op != "sub":
        return False
    mean = bare(x.args[1])
    return mean.op == "mean" and exact(mean.args[0]) is exact(x.args[0])


class _RowReader:
    """Walks from the value per row down to the squares, writing steps."""

    def __init__(self, x: Term, binds: Binds) -> None:
        self.x = x
        self.binds = binds
        self.square = torch.float32
        self.dims = 0
        self.hidden: facts.Size = 1

    def steps(self, term: Term) -> list[Step]:
        """The steps that compute `term` from the sum of squares."""
        if term.op in ("view", "copy"):
            return self.steps(term.args[0])
        if term.op == "expand":
            decline("the value per row is expanded inside the root", term)
        dtype = known_dtype(term)
        if term.op in ("mean", "sum"):
            self._reduce(term)
            return [Step(term.op, dtype)]
        if term.op == "cast":
            before = self.steps(term.args[0])
            return (
                before if is_exact_cast(before[-1].dtype, dtype) else [*before, Step("cast", dtype)]
            )
        if term.op in ("rsqrt", "sqrt", "reciprocal", "square"):
            return [*self.steps(term.args[0]), Step(term.op, dtype)]
        return self._binary(term, dtype)

    def _binary(self, term: Term, dtype: torch.dtype) -> list[Step]:
        value, other = self._split(term)
        before = self.steps(value)
        step = {"add": "add_eps", "clamp_min": "clamp_eps"}.get(term.op)
        if step is not None and self.binds.get("eps") in (other, exact(other)):
            return [*before, Step(step, dtype)]
        return [*before, self._constant(term, other, dtype)]

    def _split(self, term: Term) -> tuple[Term, Term]:
        """(the operand that leads to the squares, the other one)."""
        first, second = term.args
        if term.op in ("mul", "add") and not _leads_to_squares(first):
            return second, first
        return first, second

    def _constant(self, term: Term, other: Term, dtype: torch.dtype) -> Step:
        known = number(other)
        if term.op == "div":
            if self._is_length(other):
                return Step("div_n", dtype)
            if known and self.binds.get("root_length") is other:
                self._check_root_length(known, term)
                if _power_of_two(known):
                    return Step("mul_const", dtype, _f32(1.0 / known))
            shown = "a tensor" if known is None else f"{known}"
            decline(f"divided by {shown}, which is not the row length", term)
        if term.op == "mul" and known is not None:
            length = facts.static(self.hidden)
            if self.binds.get("length") is other:
                if length is None or _f32(known) != _f32(1.0 / length):
                    decline(f"sum of squares times {known}; 1/N is needed", term)
                return Step("mul_n", dtype)
            if self.binds.get("root_length") is other:
                self._check_root_length(1.0 / known if known else math.inf, term)
            return Step("mul_const", dtype, _f32(known))
        decline(f"{term.op} with {other!r} inside the root is not understood", term)

    def _check_root_length(self, value: float, term: Term) -> None:
        length = facts.static(self.hidden)
        if length is None or not math.isclose(value, math.sqrt(length), rel_tol=1e-6):
            decline(f"norm divided by {value:.6g}; sqrt(N) is needed", term)

    def _is_length(self, other: Term) -> bool:
        known = number(other)
        if known is not None:
            length = facts.static(self.hidden)
            return length is not None and known == length
        node = bare(other).node
        return node is not None and facts.same(facts.value(node), self.hidden)

    def _reduce(self, term: Term) -> None:
        """Check what is reduced: squares of x, over the last dimensions."""
        squares = exact(term.args[0])
        shape = squares.shape or ()
        dims = term.params[0]
        if squares.op != "square" or exact(squares.args[0]) is not self.x:
            decline("the mean is of a different tensor than the one normalised", term)
        if dims != tuple(range(len(shape) - len(dims), len(shape))) or not dims:
            shown = ", ".join(str(dim - len(shape)) for dim in dims)
            decline(f"{term.op} is over dim {shown}; only the last dims can be fused", term)
        self.square = known_dtype(squares)
        self.dims = len(dims)
        self.hidden = facts.numel(shape[len(shape) - len(dims) :])


def _leads_to_squares(term: Term) -> bool:
    for _ in range(12):
        term = bare(term)
        if term.op in ("mean", "sum"):
            return exact(term.args[0]).op == "square"
        if not term.args:
            return False
        term = next((arg for arg in term.args if number(arg) is None), term.args[0])
    return False


def _read_eps(term: Term | None) -> tuple[float | None, Term | None]:
    """Eps as a number, or as a tensor of one element."""
    if term is None:
        return None, None
    known = number(term)
    if known is not None:
        return known, None
    value = term
    while value.op == "cast" and value.dtype in (torch.float32, torch.float64):
        value = value.args[0]
    if value.shape is None or not value.nodes:
        raise Declined("eps is neither a number nor a tensor of the graph", name_of(term))
    if facts.static(facts.numel(value.shape)) != 1:
        raise Declined(f"eps has shape {list(value.shape)}; one element is needed", name_of(term))
    if value.dtype not in SHORT_NAMES:
        raise Declined(f"eps is {value.dtype}; a floating dtype is needed", name_of(term))
    return None, value


def _check_row_shape(x: Term, row: Term, dims: int) -> None:
    """The value per row must broadcast over exactly the normalised dimensions."""
    row = _unexpanded(row)
    shape, found = x.shape or (), row.shape or ()
    needed = (*shape[: len(shape) - dims], *([1] * dims))
    padded = (*([1] * (len(shape) - len(found))), *found)
    if not facts.same_shape(padded, needed):
        decline(f"the inverse has shape {list(found)}; {list(needed)} is needed", row)


def _unexpanded(row: Term) -> Term:
    """The value per row before it is broadcast, which is what the multiply would do anyway."""
    while row.op == "expand":
        row = row.args[0]
    return row


def known_dtype(term: Term) -> torch.dtype:
    """The dtype a term is rounded to. Raises Declined unless it is one fxpass knows."""
    if term.dtype not in KNOWN_DTYPES:
        shown = "unknown" if term.dtype is None else short(term.dtype)
        raise Declined(f"{term.op} is computed in {shown}", name_of(term))
    return term.dtype


def _f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _power_of_two(value: float) -> bool:
    return math.frexp(abs(value))[0] == 0.5


def decline(reason: str, term: Term) -> NoReturn:
    """Raises Declined at a term's node."""
    raise Declined(reason, name_of(term))


def name_of(term: Term) -> str:
    """The node of a term, or of the first term under it that has one."""
    seen = 0
    while not term.nodes and term.args and seen < 8:
        term, seen = term.args[0], seen + 1
    return term.nodes[0].name if term.nodes else ""
