"""Rows of tensors compared bit by bit, wherever a tensor's rows are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

_LAYOUTS = 8
"""Most ways to read the rows of one tensor that are tried."""


@dataclass(frozen=True)
class Place:
    """Where a tensor's rows are: one dim of it is (outer, rows, inner) merged."""

    dim: int
    outer: int
    inner: int


@dataclass(frozen=True)
class Difference:
    """How many of the compared rows differ, in how many elements, and by how much at most."""

    rows: int
    compared: int
    elements: int = 0
    total: int = 0
    largest: float = 0.0
    place: Place | None = None
    row: int = -1
    """The first differing row's position in the batch."""


def places(alone: Sequence[int], batch: Sequence[int], count: int) -> list[Place]:
    """How a tensor of shape `alone` for one row can hold `count` rows in shape `batch`.

    One dim must be `count` times as large; it can be a batch dim merged with dims before and after
    it (heads, tokens). Empty if the shapes do not say where the rows are.
    """
    if len(alone) != len(batch):
        return []
    if count == 1:
        return [Place(-1, 1, 1)] if tuple(alone) == tuple(batch) else []
    scaled = [d for d, (a, b) in enumerate(zip(alone, batch, strict=True)) if a != b]
    if len(scaled) != 1 or batch[scaled[0]] != count * alone[scaled[0]]:
        return []
    size = alone[scaled[0]]
    outers = [outer for outer in range(1, size + 1) if size % outer == 0]
    ordered = sorted(outers, key=lambda outer: (outer != 1, outer != size, outer))
    return [Place(scaled[0], outer, size // outer) for outer in ordered[:_LAYOUTS]]


def row(value: torch.Tensor, place: Place, count: int, index: int) -> torch.Tensor:
    """One row of a tensor that holds `count`, in the shape it has alone."""
    if place.dim < 0:
        return value
    before, after = value.shape[: place.dim], value.shape[place.dim + 1 :]
    split = value.reshape(*before, place.outer, count, place.inner, *after)
    return split.select(place.dim + 1, index).flatten(place.dim, place.dim + 1)


def difference(
    alone: Mapping[int, torch.Tensor], batch: torch.Tensor, count: int
) -> Difference | None:
    """Rows of a batch against the same rows alone: position in the batch -> the row's tensor.

    Where the shapes leave open where the rows are, the reading in which most rows agree counts:
    rows of unlike data agree in no other. None if the tensor has no rows.
    """
    first = next(iter(alone.values()))
    best: Difference | None = None
    for place in places(first.shape, batch.shape, count):
        found = _in_place(alone, batch, count, place)
        if best is None or found.rows < best.rows:
            best = found
        if not found.rows:
            break
    return best


def _in_place(
    alone: Mapping[int, torch.Tensor], batch: torch.Tensor, count: int, place: Place
) -> Difference:
    rows, elements, total, largest, where = 0, 0, 0, 0.0, -1
    for index, expected in alone.items():
        found = row(batch, place, count, index)
        same = same_bits(found, expected)
        total += expected.numel()
        if bool(same.all()):
            continue
        rows += 1
        where = index if where < 0 else where
        elements += int((~same).sum())
        largest = max(largest, _largest(found, expected))
    return Difference(rows, len(alone), elements, total, largest, place, where)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Element by element: the same bits, or both NaN. Tensors of one shape."""
    if a.dtype != b.dtype:
        return torch.zeros(a.shape, dtype=torch.bool, device=a.device)
    if a.is_complex():
        return same_bits(torch.view_as_real(a), torch.view_as_real(b)).all(-1)
    if not a.is_floating_point():
        return a == b
    if a.element_size() == 1:
        return a.view(torch.uint8) == b.view(torch.uint8)
    return ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    far = (a.double() - b.double()).abs()
    return float(far.nan_to_num(nan=float("inf")).max()) if far.numel() else 0.0
