"""The rows of a call's arguments, alone and in batches with other rows.

A row is one index of the batch dim. The rows of the user's arguments and random ones like them
make a pool; a batch is a list of indices into it, so that every row of a batch is known alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxpass import torch_private, torch_watch
from fxpass.errors import FxpassError

GIVEN, RANDOM = 3, 3
"""Most rows taken from the arguments, and rows made up beside them."""

SPECIAL = ("zeros", "nan", "inf")
"""Rows that are neighbours only."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of the arguments: where it is, and whether rows are along `dim`."""

    name: str
    value: Any
    batched: bool


@dataclass(frozen=True)
class Rows:
    """A call whose rows can be chosen."""

    leaves: tuple[Leaf, ...]
    spec: Any
    dim: int
    size: int
    """Rows of the user's arguments."""
    pool: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    """Leaf -> all rows: `count` ordinary ones, then the special ones."""
    count: int = 0
    has_floats: bool = False

    @property
    def batched(self) -> list[str]:
        """Names of the arguments that have rows."""
        return list(dict.fromkeys(leaf.name for leaf in self.leaves if leaf.batched))

    def special(self, name: str) -> int:
        """The index of a special row."""
        return self.count + SPECIAL.index(name)

    def call(self, indices: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) for a batch of these rows; all tensors are copies."""
        values = []
        for index, leaf in enumerate(self.leaves):
            if leaf.batched:
                rows = self.pool[index]
                chosen = torch.tensor(list(indices), device=rows.device)
                values.append(rows.index_select(self.dim, chosen))
            else:
                is_tensor = isinstance(leaf.value, torch.Tensor)
                values.append(leaf.value.detach().clone() if is_tensor else leaf.value)
        args, kwargs = torch_private.unflattened(values, self.spec)
        return args, kwargs


def find(
    args: Sequence[Any],
    kwargs: dict[str, Any],
    dim: int = 0,
    named: Collection[str] | None = None,
) -> Rows:
    """The rows of a call's arguments: dim `dim` of the tensors that have the first one's size.

    `named` says which arguments have rows instead: positions ("0") or keywords.
    Raises FxpassError if no tensor has rows, or the named ones do not agree.
    """
    leaves, spec = torch_watch.flattened((tuple(args), dict(kwargs)))
    names = [str(index) for index, arg in enumerate(args) for _ in torch_private.leaves(arg)]
    names += [key for key, arg in kwargs.items() for _ in torch_private.leaves(arg)]
    for name in named or ():
        if name not in names:
            known = ", ".join(dict.fromkeys(names)) or "none"
            raise FxpassError(f"--batch-args: no argument {name!r}; the call has {known}")
    able = [
        isinstance(leaf, torch.Tensor) and leaf.ndim > dim and (named is None or name in named)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    sizes = [leaf.shape[dim] for leaf, ok in zip(leaves, able, strict=True) if ok]
    if not sizes or not sizes[0]:
        raise FxpassError(
            f"the arguments hold no tensor with rows in dim {dim}; name them: --batch-dim,"
            " --batch-args"
        )
    if named is not None and len(set(sizes)) > 1:
        raise FxpassError(f"--batch-args: dim {dim} has sizes {sizes}, needs one size")
    batched = [ok and leaf.shape[dim] == sizes[0] for leaf, ok in zip(leaves, able, strict=True)]
    made = [Leaf(*row) for row in zip(names, leaves, batched, strict=True)]
    return Rows(tuple(made), spec, dim, sizes[0])


def filled(rows: Rows, limits: dict[int, int], seed: int = 0) -> Rows:
    """The same rows with a pool. `limits` gives leaves that are indices their first illegal one."""
    generator = torch.Generator().manual_seed(seed)
    given = min(rows.size, GIVEN)
    pool, floats = {}, False
    for index, leaf in enumerate(rows.leaves):
        if leaf.batched:
            value = leaf.value.detach().movedim(rows.dim, 0).cpu()
            random = _random_rows(value, limits.get(index), generator)
            specials = [torch.zeros_like(value[:1]), *_strange(value, random)]
            made = torch.cat([value[:given], random, *specials]).movedim(0, rows.dim)
            pool[index] = made.contiguous().to(leaf.value.device)
            floats |= _is_free(value)
    return Rows(rows.leaves, rows.spec, rows.dim, rows.size, pool, given + RANDOM, floats)


def _random_rows(
    value: torch.Tensor, limit: int | None, generator: torch.Generator
) -> torch.Tensor:
    """RANDOM rows like those of a tensor (rows first).

    Floats get its mean and spread, indices any legal value, other integers some of its values.
    Flags and masks are copied row by row: not every mask is a legal one.
    """
    shape = (RANDOM, *value.shape[1:])
    if _is_free(value):
        mean, spread = value.double().mean(), value.double().std(correction=0)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return (noise * (spread if spread > 0 else 1.0) + mean).to(value.dtype)
    if limit is not None:
        return torch.randint(0, limit, shape, generator=generator).to(value.dtype)
    if _is_mask(value) or not value.numel():
        return value[torch.arange(RANDOM) % len(value)]
    flat = value.reshape(len(value), -1)  # a column keeps to its own values, as positions do
    chosen = torch.randint(0, len(value), (RANDOM, flat.shape[1]), generator=generator)
    return flat.gather(0, chosen).reshape(shape)


def _strange(value: torch.Tensor, random: torch.Tensor) -> list[torch.Tensor]:
    """A row of NaN and one of both infinities; ordinary ones where a tensor has no such values."""
    if not _is_free(value):
        return [random[:1], random[1:2]]
    infinite = torch.full_like(random[:1], float("inf"))
    infinite.reshape(-1)[1::2] = float("-inf")
    return [torch.full_like(random[:1], float("nan")), infinite]


def _is_free(value: torch.Tensor) -> bool:
    """Whether a tensor holds floats that may be any number."""
    wide = value.dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return wide and not _is_mask(value)


def _is_mask(value: torch.Tensor) -> bool:
    """Whether a tensor has no more than two values, or infinite ones: flags or an additive mask.

    Floats that are all alike are a stand-in for data.
    """
    if value.dtype == torch.bool:
        return True
    if not value.numel():
        return False
    low, high = value.min(), value.max()
    two = bool(((value == low) | (value == high)).all())
    if not value.is_floating_point():
        return two
    return (two and bool(low != high)) or not bool(value.isfinite().all())
