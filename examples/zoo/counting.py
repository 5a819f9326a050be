"""Count the norms a model executes, in eager, by following where squares go.

A norm is seen as a chain of tensor operations on one tensor x: squared, reduced, inverted, and
multiplied back onto x. `NormCounter` watches ATen operations and carries a small tag along such
chains, so it finds module norms, functional forms and hand-written ones alike and counts each
once, whatever its class is called. It shares no code with the matcher of fxpass: what one
misses, the other shows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

TORCH = torch.__path__[0] + "/"
SAME_VALUES = frozenset(
    """_to_copy to clone contiguous detach alias view _unsafe_view reshape expand transpose t
    permute unsqueeze squeeze movedim lift_fresh _reshape_alias""".split()
)
"""Operations that keep every value (a cast rounds it): the result is still the same x."""
SAME_ROW = frozenset("add sub clamp clamp_min maximum mul div neg abs".split())
"""With a constant as the other operand, these keep a row value a row value."""
CLAMPS = frozenset("clamp clamp_min maximum".split())
INVERSES = {
    ("rsqrt", "row"): "inverse",
    ("sqrt", "row"): "root",
    ("reciprocal", "root"): "inverse",
}
WHOLE_NORMS = frozenset("rms_norm _fused_rms_norm".split())
VECTOR_NORMS = frozenset("linalg_vector_norm norm".split())


class Tag(NamedTuple):
    """What is known of a tensor: its role in a norm of the tensor numbered `origin`."""

    role: str
    """source, square, row (reduced squares), root, inverse, or centred (x - mean(x))."""
    origin: int
    param: bool = False
    """The values are those of a parameter."""
    mean_of: int = 0
    """The values are the mean of the tensor with that number."""


@dataclass(frozen=True)
class NormCall:
    """One executed norm."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    owner: str
    """Class of the innermost module that was running."""
    name: str
    """Its qualified name."""
    line: str
    """Source line, as file:line."""
    last_dim: bool
    """The reduction is over the last dimension."""

    @property
    def site(self) -> tuple[str, str]:
        """Two calls with the same site run the same line of the same module."""
        return self.name, self.line


class NormCounter(TorchDispatchMode):
    """Tags tensors on their way through a norm; `calls` is the result."""

    def __init__(self, where: Callable[[], tuple[str, str]] = lambda: ("", "")) -> None:
        super().__init__()
        self.calls: list[NormCall] = []
        self._tags: Any = WeakTensorKeyDictionary()
        self._next = 0
        self._where = where
        self._dims: dict[int, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then tag what it returned."""
        name = func._schema.name.split("::")[1].removesuffix("_")
        handler = HANDLERS.get(name)
        before = handler(self, name, args, kwargs or {}) if handler else None
        out = func(*args, **(kwargs or {}))
        result = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(result, torch.Tensor):
            if before is not None:
                self._tags[result] = before
            elif result in self._tags and func._schema.is_mutable:
                self._tags[result] = self.fresh()
        return out

    def tag(self, value: Any) -> Tag | None:
        """The tag of a tensor; every tensor is at least the source of its own values."""
        if not isinstance(value, torch.Tensor):
            return None
        found = self._tags.get(value)
        if found is None:
            found = self.fresh(isinstance(value, torch.nn.Parameter))
            self._tags[value] = found
        return found

    def fresh(self, param: bool = False) -> Tag:
        """The tag of values not seen before."""
        self._next += 1
        return Tag("source", self._next, param)

    def record(self, op: str, x: torch.Tensor, row: Tag) -> None:
        """Note one executed norm of x."""
        owner, name = self._where()
        last = self._dims.get(row.origin, True)
        dtype = str(x.dtype).removeprefix("torch.")
        self.calls.append(NormCall(op, tuple(x.shape), dtype, owner, name, caller(), last))

    def reduced(self, origin: int, x: torch.Tensor, dims: Any) -> None:
        """Remember whether the squares of `origin` were reduced over the last dimension."""
        dims = [dims] if isinstance(dims, int) else list(dims or [])
        self._dims[origin] = any(dim in (-1, x.dim() - 1) for dim in dims)


def caller() -> str:
    """The innermost line of model code: not torch's and not this file's."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((TORCH, __file__, "<")):
            return f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


# What each operation does to tags. A handler returns the tag of the result, or None for "new".


def keep(counter: NormCounter, name: str, args: Any, kwargs: Any) -> Tag | None:
    """Casts and views."""
    return counter.tag(args[0])


def power(counter: NormCounter, name: str, args: Any, kwargs: Any) -> Tag | None:
    """`x ** 2` squares, `row ** -0.5` inverts, `row ** 0.5` is a root."""
    tag, exponent = counter.tag(args[0]), 2 if name == "square" else args[1]
    if tag is None or isinstance(exponent, torch.Tensor):
        return None
    if exponent == 2 and tag.role == "source":
        return Tag("square", tag.origin)
    if tag.role == "row" and exponent in (0.5, -0.5):
        return Tag("root" if exponent == 0.5 else "inverse", tag.origin)
    return Tag("inverse", tag.origin) if tag.role == "root" and exponent == -1 else None


def reduce(counter: NormCounter, name: str, args: Any, kwargs: Any) -> Tag | None:
    """A mean or sum of squares is a row value; a mean of x itself may be there to centre it."""
    tag = counter.tag(args[0])
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if tag is None or not dims:
        return None
    if tag.role == "square":
        counter.reduced(tag.origin, args[0], dims)
        return Tag("row", tag.origin)
    if tag.role == "source" and name == "mean":
        return counter.fresh()._replace(mean_of=tag.origin)
    return None


def vector_norm(counter: NormCounter, name: str, args: Any, kwargs: Any) -> Tag | None:
    """`norm(x, 2, dim)` is squares, sum and root in one."""
    tag = counter.tag(args[0])
    order = args[1] if len(args) > 1 else kwargs.get("ord", kwargs.get("p", 2))
    dims = args[2] if len(args) > 2 else kwargs.get("dim")
    if tag is None or tag.role != "source" or order not in (None, 2, 2.0) or not dims:
        return None
    counter.reduced(tag.origin, args[0], dims)
    return Tag("root", tag.origin)


def invert(counter: NormCounter, name: str, args: Any, kwargs: Any) -> Tag | None:
    """rsqrt, sqrt and reciprocal of a row value."""
    tag = counter.tag(args[0])
    steps = {
        ("rsqrt", "row"): "inverse",
        ("sqrt", "row"): "root",
        ("reciprocal", "root"): "inverse",
    }
    role = steps.get((name, tag.role)) if tag else None
    return Tag(role, tag.origin) if tag and role else None


def combine(counter: NormCounter, name: str, args: Any, kwargs: Any) -> Tag | None:
    """Two operands: applying the row to x, squaring, centring, or a constant on either side."""
    left, right = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()), None)
    a, b = counter.tag(left), counter.tag(right)
    if a is None or b is None:
        return _with_constant(name, a or b, row_is_right=a is None)
    for x, row, tensor in ((a, b, left), (b, a, right)):
        if _applies(name, x, row, row is b):
            counter.record(name, tensor, row)
            return None
    if name == "mul" and a.role == b.role == "source" and a.origin == b.origin:
        return Tag("square", a.origin)
    if name == "sub" and b.mean_of == a.origin:
        return Tag("centred", a.origin)
    if right.numel() == 1 or left.numel() == 1:
        row_is_right = left.numel() == 1
        return _with_constant(name, b if row_is_right else a, row_is_right)
    return _scaled(a, b) if name == "mul" else None


def _applies(name: str, x: Tag, row: Tag, row_is_right: bool) -> bool:
    """X * inverse, x / root."""
    if x.role != "source" or x.origin != row.origin:
        return False
    if name == "mul":
        return row.role == "inverse"
    return name == "div" and row.role == "root" and row_is_right


def _scaled(a: Tag, b: Tag) -> Tag | None:
    """A weight may be multiplied onto x, or onto the row, before the two meet."""
    if a.param and not b.param:
        return b
    return a if b.param and not a.param else None


def _with_constant(name: str, tag: Tag | None, row_is_right: bool) -> Tag | None:
    """A scalar operand: eps, a clamp, a constant factor."""
    if tag is None or name not in SAME_ROW:
        return None
    if name == "div" and row_is_right:
        return Tag("inverse", tag.origin) if tag.role == "root" else None
    if name in CLAMPS and tag.role == "inverse":
        return None  # x * min(1, limit / norm(x)) clips long rows; it normalises none
    return tag if tag.param or tag.role in ("row", "root", "inverse") else None


def whole(counter: NormCounter, name: str, args: Any, kwargs: Any) -> Tag | None:
    """`torch.rms_norm`, where it is one operation."""
    tag = counter.tag(args[0])
    if tag is not None:
        counter.record(name, args[0], tag)
    return None


HANDLERS: dict[str, Callable[..., Tag | None]] = {
    **dict.fromkeys(SAME_VALUES, keep),
    **dict.fromkeys("pow square".split(), power),
    **dict.fromkeys("mean sum".split(), reduce),
    **dict.fromkeys(VECTOR_NORMS, vector_norm),
    **dict.fromkeys("rsqrt sqrt reciprocal".split(), invert),
    **dict.fromkeys("mul div sub add clamp clamp_min maximum".split(), combine),
    **dict.fromkeys(WHOLE_NORMS, whole),
}
