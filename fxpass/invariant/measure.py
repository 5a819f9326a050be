"""One operator, measured: at which numbers of rows its rows are not those of a larger batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxpass import torch_private, torch_watch
from fxpass.invariant import compare
from fxpass.invariant.compare import Place


@dataclass(frozen=True)
class Shape:
    """What one leaf of a call was in a run of one row: a shape, or a number."""

    sizes: tuple[int, ...] | None
    number: Any = None


def shapes(args: Any, kwargs: Any) -> list[Shape]:
    """The leaves of a call, without their values."""
    return [
        Shape(tuple(leaf.shape)) if isinstance(leaf, torch.Tensor) else Shape(None, leaf)
        for leaf in torch_private.leaves((args, kwargs))
    ]


class Cut:
    """A call of an operator on `count` rows, cut down to fewer."""

    def __init__(self, args: Any, kwargs: Any, one: Sequence[Shape], count: int) -> None:
        self._leaves, self._spec = torch_watch.flattened((tuple(args), dict(kwargs)))
        self._count = count
        self._places = [
            _place(shape, leaf, count) for shape, leaf in zip(one, self._leaves, strict=True)
        ]

    @property
    def has_rows(self) -> bool:
        """Whether any tensor of the call has rows that can be cut out."""
        return any(isinstance(place, Place) for place in self._places)

    def pattern(self) -> str:
        """The inputs with `*` for what follows the rows: `bf16[*,4096] bf16[4096,1024]`."""
        from fxpass.invariant import source

        shown = []
        for leaf, place in zip(self._leaves, self._places, strict=True):
            if isinstance(leaf, torch.Tensor):
                kind, sizes = source.kind(leaf).rstrip("]").split("[")
                parts = sizes.split(",")
                if isinstance(place, Place):
                    parts[place.dim] = "*"
                shown.append(f"{kind}[{','.join(parts)}]")
        return " ".join(shown)

    def run(self, operator: Callable[..., Any], start: int, rows: int) -> list[torch.Tensor]:
        """The operator on some of the rows; all tensors are copies."""
        values: list[Any] = []
        for leaf, place in zip(self._leaves, self._places, strict=True):
            if isinstance(place, Place):
                cut = leaf.narrow(place.dim, start * place.inner, rows * place.inner)
                values.append(_like(cut))
            elif isinstance(place, int):
                values.append(place * rows)
            else:
                values.append(leaf.clone() if isinstance(leaf, torch.Tensor) else leaf)
        args, kwargs = torch_private.unflattened(values, self._spec)
        made = operator(*args, **kwargs)
        return [leaf for leaf in torch_private.leaves(made) if isinstance(leaf, torch.Tensor)]


def _place(shape: Shape, leaf: Any, count: int) -> Place | int | None:
    """Where a leaf's rows are; for a number that follows them, what it is for one row."""
    if isinstance(leaf, torch.Tensor) and shape.sizes is not None:
        found = compare.places(shape.sizes, leaf.shape, count)
        return found[0] if found and found[0].outer == 1 else None
    if type(leaf) is int and type(shape.number) is int and leaf == count * shape.number != 0:
        return shape.number
    return None


def _like(cut: torch.Tensor) -> torch.Tensor:
    """A copy that is dense in the order of the dims' strides, as a call on fewer rows would be."""
    order = sorted(range(cut.ndim), key=lambda d: -cut.stride()[d])
    back = sorted(range(cut.ndim), key=order.__getitem__)
    return cut.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def varies_at(
    operator: Callable[..., Any], cut: Cut, count: int, counts: Sequence[int]
) -> list[int]:
    """Numbers of rows below `count` at which rows, first or last, differ from the whole batch's."""
    whole = cut.run(operator, 0, count)
    found = []
    for rows in counts:
        starts = sorted({0, count - rows}) if rows < count else []
        if any(
            _differs(whole, cut.run(operator, start, rows), start, rows, count) for start in starts
        ):
            found.append(rows)
    return found


def _differs(
    whole: Sequence[torch.Tensor],
    part: Sequence[torch.Tensor],
    start: int,
    rows: int,
    count: int,
) -> bool:
    for all_rows, some in zip(whole, part, strict=True):
        dims = [
            d for d, (a, b) in enumerate(zip(some.shape, all_rows.shape, strict=True)) if a != b
        ]
        if len(dims) != 1 or some.shape[dims[0]] * count != all_rows.shape[dims[0]] * rows:
            continue
        inner = all_rows.shape[dims[0]] // count
        same = all_rows.narrow(dims[0], start * inner, rows * inner)
        if not bool(compare.same_bits(same, some).all()):
            return True
    return False
