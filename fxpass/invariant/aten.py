"""What ATen's operators have in common: dims, dtypes and `out=`.

An operator here takes what ATen's overload takes and gives NotImplemented for what it leaves to the
kernel torch has: integers (exact in any order), complex numbers, empty tensors, other layouts and
devices, and arguments that torch refuses, so that its own error is raised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxpass.kernels.invariant import dispatch
from fxpass.torch_private import statically_known_true

Tensor = torch.Tensor
Operator = Callable[..., Any]

NARROW = (torch.bfloat16, torch.float16)
aten = torch.ops.aten


def broadcast(*shapes: torch.Size) -> torch.Size:
    """The shape that tensors of these shapes broadcast to. Raises RuntimeError if they do not."""
    untyped: Any = torch.broadcast_shapes
    return torch.Size(untyped(*shapes))


def is_empty(x: Tensor) -> bool:
    """Whether a tensor is known to have no elements; no size is guarded on while tracing."""
    return statically_known_true(x.numel() == 0)


def dims_of(dim: int | Sequence[int] | None, rank: int) -> tuple[int, ...] | None:
    """The dims as 0 <= d < rank in ascending order; None or () are all. None if torch refuses."""
    if dim is None:
        return tuple(range(rank))
    given = [dim] if isinstance(dim, int) else list(dim)
    if not given:
        return tuple(range(rank))
    bound = max(rank, 1)
    if any(not -bound <= d < bound for d in given):
        return None
    found = sorted({d % bound for d in given})
    if len(found) != len(given):
        return None
    return tuple(found) if rank else ()


def folded(x: Tensor, dims: Sequence[int]) -> Tensor:
    """The tensor with `dims` merged into a last one; the others keep their order."""
    if not dims:
        return x.reshape(1)
    rank, count = x.dim(), len(dims)
    if tuple(dims) != tuple(range(rank - count, rank)):
        x = x.permute([d for d in range(rank) if d not in dims] + list(dims))
    return x if count == 1 else x.flatten(rank - count)


def unfolded(made: Tensor, x: Tensor, dims: Sequence[int], keepdim: bool) -> Tensor:
    """A result with one value per row, in the shape a reduction of x over `dims` has."""
    if not x.dim():
        return made.reshape(())
    if not keepdim:
        return made
    return made.reshape([1 if d in dims else size for d, size in enumerate(x.shape)])


def along(x: Tensor, dim: int, function: Callable[[Tensor], Tensor]) -> Tensor | None:
    """A function of the last dim applied along `dim`; contiguous. None if torch refuses `dim`."""
    dims = dims_of(dim, x.dim())
    if dims is None:
        return None
    if not dims:
        return function(x.reshape(1)).reshape(())
    made: Tensor = function(x.movedim(dims[0], -1))
    if dims[0] == x.dim() - 1:
        return made.contiguous()
    # Not .contiguous(), which keeps the strides of dims of one element.
    return made.movedim(-1, dims[0]).clone(memory_format=torch.contiguous_format)


def as_reduced(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, torch.dtype] | None:
    """The values a reduction with this `dtype` adds up, and its result's dtype.

    As in ATen: the input is cast first, but 16 bits are added up in float32 as they are.
    """
    out = x.dtype if dtype is None else dtype
    if out not in dispatch.FLOATS or x.is_complex() or is_empty(x):
        return None
    if x.dtype != out and not (x.dtype in NARROW and out == torch.float32):
        x = x.to(out)
    return (x, out) if dispatch.takes(x) else None


def into(function: Operator, out_gives_dtype: bool = False) -> Operator:
    """The `out=` form of an operator.

    With `out_gives_dtype` a missing `dtype` argument is that of `out`. An `out` of another dtype
    than the result is left to torch, which refuses it.
    """

    def call(*args: Any, out: Tensor, **kwargs: Any) -> Any:
        if out_gives_dtype and kwargs.get("dtype") is None:
            kwargs["dtype"] = out.dtype
        made = function(*args, **kwargs)
        if made is NotImplemented or made.dtype != out.dtype or made.device != out.device:
            return NotImplemented
        if out.shape != made.shape:
            _resize(out, made)
        return out.copy_(made)

    return call


def _resize(out: Tensor, made: Tensor) -> None:
    shape = made.shape
    if out.numel():
        warnings.warn(
            f"an output with one or more elements was resized: it had shape {list(out.shape)}, the"
            f" result has {list(shape)}; torch deprecates this",
            UserWarning,
            stacklevel=4,
        )
    out.resize_(shape)
    if out.stride() != made.stride():  # of columns, or of channels innermost
        out.as_strided_(shape, made.stride())


def in_place(function: Operator) -> Operator:
    """The in-place form of an operator, which writes to its first argument."""

    def call(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = function(self, *args, **kwargs)
        if made is NotImplemented or made.dtype != self.dtype or made.shape != self.shape:
            return NotImplemented
        return self.copy_(made)

    return call
