"""The first operator that makes a row differ when a model runs in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpass import torch_watch
from fxpass.invariant import compare, source, trace
from fxpass.invariant.prove import Case, Model
from fxpass.invariant.trace import Step

BY_NUMBER = "the number of rows or the row's place"
BY_NEIGHBOURS = "what other rows hold"

_MIXERS = {
    "native_batch_norm": "batch norm in training mode",
    "_native_batch_norm_legit": "batch norm in training mode",
    "_batch_norm_with_update": "batch norm in training mode",
    "cudnn_batch_norm": "batch norm in training mode",
    "miopen_batch_norm": "batch norm in training mode",
    "rand": "random numbers by position in the batch",
    "bernoulli": "random numbers by position in the batch",
    "native_dropout": "random numbers by position in the batch",
    "multinomial": "random numbers by position in the batch",
    "topk": "a choice among rows, such as an expert's capacity",
    "sort": "a choice among rows, such as an expert's capacity",
    "nonzero": "positions that follow what other rows hold",
}


@dataclass
class Culprit:
    """The first node whose row differs."""

    kind: str
    rows: int
    node: str
    """The operator: `aten.addmm`."""
    inputs: list[str]
    results: list[str]
    where: str
    line: str
    follows: str
    """What the row's bits follow: BY_NUMBER or BY_NEIGHBOURS; empty where that is not known."""
    elements: int = 0
    total: int = 0
    largest: float = 0.0
    notes: list[str] = field(default_factory=list)


def first(model: Model, call: Callable[..., Any], case: Case) -> Culprit | str:
    """The first operator whose row differs in a failing case, or why it was not found."""
    assert case.failing is not None
    indices, position = case.failing.indices, case.position
    kept = trace.alone(lambda: model.run(call, [indices[position]]))
    steps = trace.batch(lambda: model.run(call, indices), kept, len(indices), position)
    at = next((index for index, step in enumerate(steps) if step.differs), None)
    if at is None:
        return "no operator differs while each is watched; the difference comes of how they run"
    step = steps[at]
    assert step.difference is not None
    culprit = Culprit(
        case.kind,
        case.rows,
        step.name,
        step.inputs,
        step.results,
        step.where,
        step.line,
        _follows(model, call, case, kept, step),
        step.difference.elements,
        step.difference.total,
        step.difference.largest,
    )
    culprit.notes = [*_mixes(step.name), *_lost(steps[:at])]
    return culprit


def _mixes(name: str) -> list[str]:
    plain = name.rpartition(".")[2].removesuffix("_like").rstrip("_")
    return [f"mixes rows by nature: {_MIXERS[plain]}"] if plain in _MIXERS else []


def _lost(before: Sequence[Step]) -> list[str]:
    """What comes before it whose rows cannot be followed."""
    if not before:
        return []
    step = before[0]
    return [f"its rows come through {step.name} ({step.where}), where rows cannot be followed"]


def _follows(
    model: Model, call: Callable[..., Any], case: Case, kept: Sequence[Step], step: Step
) -> str:
    """Whether the row changes once more when only its neighbours do."""
    assert case.failing is not None
    position, indices = case.position, case.failing.indices
    if step.difference is None or step.difference.place is None:
        return BY_NEIGHBOURS
    others = [
        index if at == position else (index + 1) % model.rows.count
        for at, index in enumerate(indices)
    ]
    values = [_row(model, call, list(chosen), step, position) for chosen in (indices, others)]
    if values[0] is None or values[1] is None or values[0].shape != values[1].shape:
        return ""
    same = bool(compare.same_bits(values[0], values[1]).all())
    return BY_NUMBER if same else BY_NEIGHBOURS


def _row(
    model: Model, call: Callable[..., Any], indices: list[int], step: Step, position: int
) -> torch.Tensor | None:
    """The row of the first result of the same step in another batch of as many rows."""
    found: list[torch.Tensor] = []
    same = (step.name, step.where, step.results)

    def see(operator: Any, args: Any, kwargs: Any, made: Any) -> None:
        if found or source.name_of(operator) != same[0]:
            return
        if source.kinds(made) == same[2] and source.here()[0] == same[1]:
            assert step.difference is not None
            place = step.difference.place
            assert place is not None
            tensors = trace.tensors(made)
            matching = [t for t in tensors if _fits(t, place, len(indices))]
            if matching:
                found.append(compare.row(matching[0], place, len(indices), position).clone())

    with torch_watch.watching(see):
        model.run(call, indices)
    return found[0] if found else None


def _fits(tensor: torch.Tensor, place: compare.Place, count: int) -> bool:
    return tensor.ndim > place.dim and (
        tensor.shape[place.dim] == place.outer * count * place.inner
    )
