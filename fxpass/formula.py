"""Formulas: a pattern is the expression itself, and its argument names are the captures.

    lambda p, x, eps: p.over_root(x, p.mean_square(x) + eps)

`*` and `+` match either operand order. Words (`mean_square`, `over_root`, `cast`) absorb the
spellings that mean the same; where spellings round differently the graph's own steps are read off
afterwards (meaning.py), so a formula says only what may stand where.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fxpass.terms import Term, exact, number, ordered

Binds = dict[str, Term]


class Expr:
    """A pattern. Operators build larger patterns."""

    def __mul__(self, other: Expr) -> Expr:
        return Op("mul", (self, other), commutes=True)

    def __add__(self, other: Expr) -> Expr:
        return Op("add", (self, other), commutes=True)

    def __truediv__(self, other: Expr) -> Expr:
        return Op("div", (self, other))

    def match(self, term: Term, binds: Binds) -> Iterator[Binds]:
        """Every way the term is this pattern, as extended captures."""
        raise NotImplementedError


@dataclass(frozen=True)
class Capture(Expr):
    """A named input. Bound twice, it must be the same value both times."""

    name: str

    def match(self, term: Term, binds: Binds) -> Iterator[Binds]:
        """Bind the value, casts that cannot round left out."""
        value = exact(term)
        bound = binds.get(self.name)
        if bound is None:
            yield {**binds, self.name: value}
        elif bound is value:
            yield binds


@dataclass(frozen=True)
class Known(Expr):
    """A value found before."""

    term: Term

    def match(self, term: Term, binds: Binds) -> Iterator[Binds]:
        """Yes if it is that value."""
        if term is self.term or ordered(term) is exact(self.term):
            yield binds


@dataclass(frozen=True)
class Number(Expr):
    """Any constant."""

    name: str

    def match(self, term: Term, binds: Binds) -> Iterator[Binds]:
        """Bind a constant."""
        if number(term) is not None:
            yield {**binds, self.name: term}


@dataclass(frozen=True)
class Op(Expr):
    """An operation on patterns. `per_row` values may be rounded and reshaped on the way."""

    op: str
    args: tuple[Expr, ...]
    commutes: bool = False
    per_row: bool = False

    def match(self, term: Term, binds: Binds) -> Iterator[Binds]:
        """Match the operation, then its arguments left to right."""
        term = bare(term) if self.per_row else ordered(term)
        if term.op != self.op or len(term.args) != len(self.args):
            return
        yield from _match_all(self.args, term.args, binds)
        if self.commutes and term.args[0] is not term.args[1]:
            yield from _match_all(self.args, term.args[::-1], binds)


@dataclass(frozen=True)
class Either(Expr):
    """Any of several patterns, tried in order."""

    options: tuple[Expr, ...]

    def match(self, term: Term, binds: Binds) -> Iterator[Binds]:
        """Match each option."""
        for option in self.options:
            yield from option.match(term, binds)


@dataclass(frozen=True)
class Tagged(Expr):
    """A pattern whose whole value is remembered, casts and views included."""

    name: str
    inner: Expr

    def match(self, term: Term, binds: Binds) -> Iterator[Binds]:
        """Match the inner pattern and bind the term as the graph has it."""
        for inner in self.inner.match(term, binds):
            yield {**inner, self.name: term}


def _match_all(
    patterns: tuple[Expr, ...], terms: tuple[Term, ...], binds: Binds
) -> Iterator[Binds]:
    if not patterns:
        yield binds
        return
    for first in patterns[0].match(terms[0], binds):
        yield from _match_all(patterns[1:], terms[1:], first)


def bare(term: Term) -> Term:
    """A value per row without casts, copies, views and expansions over the row."""
    while term.op in ("cast", "copy", "view", "expand"):
        term = term.args[0]
    return term


class Words:
    """The vocabulary of formulas."""

    def square(self, x: Expr) -> Expr:
        """x*x, x.pow(2), x.square(), x**2.0."""
        return Op("square", (x,), per_row=False)

    def sum_square(self, x: Expr) -> Expr:
        """The sum of squares over the row."""
        return _row("sum", self.square(x))

    def norm(self, x: Expr) -> Expr:
        """The Euclidean length of the row: sqrt(sum(x*x)), or vector_norm."""
        return _row("sqrt", self.sum_square(x))

    def mean_square(self, x: Expr) -> Expr:
        """mean(x*x), sum(x*x) / N, sum(x*x) * (1/N), and the same of norm(x) squared."""
        sums = (self.sum_square(x), _row("square", self.norm(x)))
        length = Capture("length")
        return Either(
            (
                _row("mean", self.square(x)),
                *(_row("div", total, length) for total in sums),
                *(_row("mul", total, Number("length"), commutes=True) for total in sums),
            )
        )

    def rms(self, x: Expr) -> Expr:
        """norm(x) / sqrt(N), which is sqrt(mean(x*x))."""
        return Either(
            (
                _row("mul", self.norm(x), Number("root_length"), commutes=True),
                _row("div", self.norm(x), Number("root_length")),
            )
        )

    def plus_eps(self, value: Expr, eps: Expr) -> Expr:
        """Value + eps."""
        return _row("add", value, eps, commutes=True)

    def at_least(self, value: Expr, eps: Expr) -> Expr:
        """max(value, eps)."""
        return _row("clamp_min", value, eps)

    def root(self, value: Expr) -> Expr:
        """sqrt(value)."""
        return _row("sqrt", value)

    def over(self, x: Expr, length: Expr) -> Expr:
        """X / length, x * (1 / length), x * (1 / length * constant)."""
        inverse = _row("reciprocal", length)
        return Either(
            (
                x / Tagged("row", length),
                x * Tagged("row", inverse),
                x * Tagged("row", _row("mul", inverse, Number("gain"), commutes=True)),
            )
        )

    def over_root(self, x: Expr, value: Expr) -> Expr:
        """`x * rsqrt(value)`, `x * (1 / sqrt(value))`, `x * sqrt(1 / value)`, `x / sqrt(value)`."""
        inverses = (_row("rsqrt", value), _row("sqrt", _row("reciprocal", value)))
        products = (x * Tagged("row", inverse) for inverse in inverses)
        return Either((*products, self.over(x, self.root(value))))

    def cast(self, value: Expr) -> Expr:
        """A cast that rounds."""
        return Op("cast", (value,))

    def weight(self, w: Expr) -> Expr:
        """w, or w + a constant (Gemma's 1 + w), in any dtype."""
        return Tagged("weight", Either((Op("add", (w, Number("offset")), commutes=True), w)))


def _row(op: str, *args: Expr, commutes: bool = False) -> Expr:
    return Op(op, args, commutes, per_row=True)


@dataclass(frozen=True)
class Formula:
    """A named formula: `expression(words, **captures)`."""

    name: str
    expression: Callable[..., Expr]
    about: str = ""
    """Where it is met, for the table of supported variants."""

    def pattern(self, **known: Term) -> Expr:
        """The pattern, with captures that are already known put in."""
        if not known:
            return _open_pattern(self.expression)
        given: dict[str, Any] = {
            name: Known(known[name]) if name in known else Capture(name)
            for name in _captures(self.expression)
        }
        return self.expression(_WORDS, **given)


_WORDS = Words()


@functools.cache
def _captures(expression: Callable[..., Expr]) -> tuple[str, ...]:
    return tuple(inspect.signature(expression).parameters)[1:]


@functools.cache
def _open_pattern(expression: Callable[..., Expr]) -> Expr:
    return expression(_WORDS, **{name: Capture(name) for name in _captures(expression)})
