"""A proof by running: every row of a model's results alone, and in batches of other rows."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpass import torch_private, torch_watch
from fxpass.errors import FxpassError
from fxpass.invariant import compare, vary
from fxpass.invariant.compare import Difference
from fxpass.invariant.vary import Rows
from fxpass.target_errors import TargetError, said

ROWS = (1, 2, 3, 7, 8, 64, 255, 256, 257)

KINDS = {
    "neighbours": "other rows beside it",
    "order": "the same rows in another order",
    "padding": "rows of zeros beside it",
    "nan": "rows of NaN beside it",
    "inf": "rows of infinities beside it",
}
"""What is varied; each for every number of rows, with the row first, in the middle and last."""

_STRANGE = ("nan", "inf")


@dataclass(frozen=True)
class Batch:
    """Indices of rows, and the positions whose results are compared."""

    indices: tuple[int, ...]
    compared: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """What came of all batches of one kind and size."""

    kind: str
    rows: int
    compared: int
    differing: int
    largest: float
    failing: Batch | None = field(default=None, repr=False)
    position: int = -1
    """The first row that differs, in `failing`."""


@dataclass
class Proof:
    """All cases of one way to run the model."""

    how: str
    in_mode: bool
    cases: list[Case] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether no row differed."""
        return all(not case.differing for case in self.cases)

    def failing(self) -> list[Case]:
        """The smallest failing case of each kind."""
        found: dict[str, Case] = {}
        for case in sorted(self.cases, key=lambda case: case.rows):
            if case.differing:
                found.setdefault(case.kind, case)
        return list(found.values())


class Model:
    """A model that forgets each call: buffers, random numbers and gradients."""

    def __init__(self, name: str, model: Callable[..., Any], rows: Rows | None) -> None:
        self.name, self.model, self._rows = name, model, rows
        module = model if isinstance(model, torch.nn.Module) else None
        self._buffers = [(b, b.detach().clone()) for b in module.buffers()] if module else []

    @property
    def rows(self) -> Rows:
        """The rows of its arguments, where those are asked for."""
        assert self._rows is not None
        return self._rows

    def run(self, call: Callable[..., Any], indices: Sequence[int]) -> list[Any]:
        """The leaves of the result for a batch. `call` is the model, or compiled from it."""
        args, kwargs = self.rows.call(indices)
        with (
            self.fresh(),
            self.said(f"the model with {len(indices)} row{'s' * (len(indices) > 1)}"),
        ):
            return torch_private.leaves(call(*args, **kwargs))

    @contextlib.contextmanager
    def said(self, doing: str = "the model") -> Iterator[None]:
        """An error of the model's, in one line. Raises TargetError."""
        try:
            yield
        except FxpassError:
            raise
        except Exception as error:
            raise TargetError(f"TARGET {self.name}: {said(error, doing)}") from error

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """As at the start: the same buffers, the same random numbers."""
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            for buffer, before in self._buffers:
                buffer.copy_(before)
            torch.manual_seed(0)
            yield


def model_of(
    name: str,
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    dim: int = 0,
    named: Collection[str] | None = None,
) -> Model:
    """A model with the rows of its arguments. Raises FxpassError if it cannot run."""
    rows = vary.find(args, kwargs, dim, named)
    rows = vary.filled(rows, _limits(Model(name, model, None), rows))
    return Model(name, model, rows)


def _limits(model: Model, rows: Rows) -> dict[int, int]:
    """Leaf -> number of rows of the embedding it is an index into; runs the model once."""
    storages = {
        leaf.value.untyped_storage()._cdata: index
        for index, leaf in enumerate(rows.leaves)
        if leaf.batched
    }
    found: dict[int, int] = {}

    def see(operator: Any, args: Any, kwargs: Any, made: Any) -> None:
        if operator is torch.ops.aten.embedding.default:
            leaf = storages.get(args[1].untyped_storage()._cdata)
            if leaf is not None:
                found[leaf] = min(args[0].shape[0], found.get(leaf, args[0].shape[0]))

    args, kwargs = torch_private.unflattened([leaf.value for leaf in rows.leaves], rows.spec)
    with model.fresh(), model.said(), torch_watch.watching(see):
        model.model(*args, **kwargs)
    return found


def prove(model: Model, call: Callable[..., Any], proof: Proof, counts: Sequence[int]) -> Proof:
    """Run `call` alone and in batches of each size in `counts`; fills `proof`."""
    expected = {index: _alone(model, call, index) for index in range(model.rows.count)}
    without: set[int] = set()
    for count in counts:
        for kind in KINDS:
            chosen = batches(kind, count, model.rows)
            if chosen:
                proof.cases.append(_case(model, call, kind, chosen, expected, without))
    tensors = [leaf for leaf in expected[0] if isinstance(leaf, torch.Tensor)]
    if len(without) == len(tensors):
        raise TargetError(f"TARGET {model.name}: no result has a dim that follows the rows")
    proof.notes += [f"result {index} has no rows; not compared" for index in sorted(without)]
    return proof


def _alone(model: Model, call: Callable[..., Any], index: int) -> list[Any]:
    try:
        return model.run(call, [index])
    except TargetError as error:
        if model.rows.size == 1:
            raise
        hint = "a model that needs several rows gives none a result of its own"
        raise TargetError(f"{error}; {hint}") from error


def batches(kind: str, count: int, rows: Rows) -> list[Batch]:
    """The batches of one kind and size; none where the kind says nothing there."""
    generator = random.Random(count)
    if kind in ("neighbours", "order"):
        indices = [(start + 1) % rows.count for start in range(count)]
        generator.shuffle(indices)
        if kind == "neighbours":
            return [Batch(tuple(indices), tuple(range(count)))]
        return [Batch(tuple(reversed(indices)), tuple(range(count)))] if count > 1 else []
    if count == 1 or (kind in _STRANGE and not rows.has_floats):
        return []
    places = (0, count // 2, count - 1)
    sets = [places] if count > len(places) else [(place,) for place in sorted(set(places))]
    made = []
    for positions in sets:
        beside = rows.special("zeros" if kind == "padding" else kind)
        indices = [beside] * count
        for row, position in enumerate(positions):
            indices[position] = row % rows.count
        made.append(Batch(tuple(indices), positions))
    return made


def _case(
    model: Model,
    call: Callable[..., Any],
    kind: str,
    chosen: Sequence[Batch],
    expected: dict[int, list[Any]],
    without: set[int],
) -> Case:
    compared = differing = 0
    largest, failing, position = 0.0, None, -1
    for batch in chosen:
        results = model.run(call, batch.indices)
        if len(results) != len(expected[0]):
            raise TargetError(
                f"TARGET {model.name}: {len(results)} results with {len(batch.indices)} rows,"
                f" {len(expected[0])} with one; needs as many"
            )
        worst = _worst(batch, results, expected, without)
        compared += len(batch.compared)
        differing += worst.rows
        if worst.rows:
            largest = max(largest, worst.largest)
            if failing is None:
                failing, position = batch, worst.row
    return Case(kind, len(chosen[0].indices), compared, differing, largest, failing, position)


def _worst(
    batch: Batch, results: list[Any], expected: dict[int, list[Any]], without: set[int]
) -> Difference:
    """The result with most differing rows."""
    worst = Difference(0, len(batch.compared))
    for index, result in enumerate(results):
        if not isinstance(result, torch.Tensor):
            continue
        alone = {at: expected[batch.indices[at]][index] for at in batch.compared}
        found = compare.difference(alone, result, len(batch.indices))
        if found is None:
            without.add(index)
        elif found.rows > worst.rows:
            worst = found
    return worst
