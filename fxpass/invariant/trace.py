"""The first operator of an eager run whose row differs between alone and in a batch.

Every operator of the run alone is kept, with its result for one row; then a batch is run, and each
result's row is compared as it is made. Only one row of activations is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpass import torch_private, torch_watch
from fxpass.invariant import compare, source
from fxpass.invariant.compare import Difference

Run = Callable[[], Sequence[Any]]
"""Runs the model; the leaves of its result."""

_AHEAD = 32
"""How far operators are looked for where the two runs do not do the same."""

_UNSET = frozenset(
    f"aten.{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "resize_")
)
"""What these give is written later."""


@dataclass
class Step:
    """One operator of a run."""

    name: str
    made: list[torch.Tensor]
    """Results: copies in the run alone, nothing in a batch."""
    inputs: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    where: str = "?"
    line: str = ""
    reads: list[int] = field(default_factory=list)
    """Steps that wrote what this one reads."""
    difference: Difference | None = None
    matched: bool = False
    """Whether its rows were found in both runs."""

    @property
    def differs(self) -> bool:
        """Whether it is known to differ."""
        return self.difference is not None and self.difference.rows > 0


def alone(run: Run) -> list[Step]:
    """The operators of a run, with copies of their results."""
    steps: list[Step] = []

    def see(operator: Any, args: Any, kwargs: Any, made: Any) -> None:
        steps.append(Step(source.name_of(operator), [t.detach().clone() for t in tensors(made)]))

    with torch_watch.watching(see):
        run()
    return steps


def batch(run: Run, expected: Sequence[Step], count: int, position: int) -> list[Step]:
    """The operators of a run on `count` rows that the difference in the result comes from.

    `position` is where the row of `expected` is. In the order they ran; empty if the results agree.
    """
    seen = _Batch(expected, count, position)
    with torch_watch.watching(seen.see):
        made = [t for t in run() if isinstance(t, torch.Tensor)]
    return seen.behind(made)


class _Batch:
    """Compares the operators of a batch with those of the run alone as they come."""

    def __init__(self, expected: Sequence[Step], count: int, position: int) -> None:
        self._expected, self._count, self._position = expected, count, position
        self._next = 0
        self._steps: list[Step] = []
        self._writers: dict[int, int] = {}

    def see(self, operator: Any, args: Any, kwargs: Any, made: Any) -> None:
        given, results = tensors((args, kwargs)), tensors(made)
        step = Step(source.name_of(operator), [], source.kinds(given), source.kinds(results))
        step.where, step.line = source.here()
        keys = [key for key in map(_storage, given) if key in self._writers]
        step.reads = sorted({self._writers[key] for key in keys})
        self._compare(step, results)
        for tensor in results:
            self._writers[_storage(tensor)] = len(self._steps)
        self._steps.append(step)

    def _compare(self, step: Step, results: Sequence[torch.Tensor]) -> None:
        found = self._find(step.name)
        if found is None or len(found.made) != len(results):
            return
        step.matched = True
        if step.name in _UNSET:
            return
        for expected, result in zip(found.made, results, strict=True):
            difference = against(expected, result, self._count, self._position)
            if difference is None:
                step.matched = False
            elif difference.rows and step.difference is None:
                step.difference = difference

    def _find(self, name: str) -> Step | None:
        ahead = self._expected[self._next : self._next + _AHEAD]
        for offset, step in enumerate(ahead):
            if step.name == name:
                self._next += offset + 1
                return step
        return None

    def behind(self, made: Sequence[torch.Tensor]) -> list[Step]:
        """Steps that differ, or cannot be compared, on the way to results that differ."""
        keys = [key for key in map(_storage, made) if key in self._writers]
        waiting = [self._writers[key] for key in keys]
        chosen: set[int] = set()
        while waiting:
            index = waiting.pop()
            step = self._steps[index]
            if index not in chosen and (step.differs or not step.matched):
                chosen.add(index)
                waiting += step.reads
        return [self._steps[index] for index in sorted(chosen)]


def against(
    expected: torch.Tensor, made: torch.Tensor, count: int, position: int
) -> Difference | None:
    """One result alone against its row in a batch; one without rows is compared as a whole.

    None if the shapes do not say where the row is.
    """
    if expected.shape == made.shape and count > 1:
        different = int((~compare.same_bits(made, expected)).sum())
        return Difference(int(different > 0), 1, different, made.numel(), float("nan"))
    return compare.difference({position: expected}, made, count)


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors of a nested value."""
    return [leaf for leaf in torch_private.leaves(value) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    if tensor.layout != torch.strided:
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)
