"""Element-wise operators of the CPU whose last bit follows an element's place in memory.

torch computes whole vectors by one function and what is left over, and strided elements, by
another: `silu` of a value differs in the last bit at the end of a tensor, at the border of two
threads' shares, or in a transposed one. Here every element goes through the vectors: operands
without gaps, the tail filled up to one. Which operators it takes was measured (see the test).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from fxpass.invariant.aten import Operator, aten, broadcast

Tensor = torch.Tensor

NAMES = (
    "pow.Tensor_Tensor pow.Tensor_Scalar pow.Scalar atan2 atanh cosh sinh elu exp2 gelu hypot"
    " igamma igammac logaddexp logaddexp2 logit mish rsqrt sigmoid silu softplus special_i0e"
    " elu_backward gelu_backward mish_backward silu_backward softplus_backward glu"
).split()
"""Overloads without their `out=` and in-place forms. Not here: add and sub of 16-bit tensors with
an `alpha` other than one, since every addition would then cost a call of Python."""

_VECTORS = 64
"""Elements: a multiple of what any machine's loop takes at once."""
_MULTIPLIED = (0, 0.5, 1, 2, 3)
"""Exponents for which torch multiplies or takes a root: the same in both loops."""
_SHARE = 32_768
"""torch gives a thread at least so many elements (at::internal::GRAIN_SIZE)."""


def table() -> dict[str, Operator]:
    """Every form of every operator, by overload name."""
    found: dict[str, Operator] = {}
    for name in NAMES:
        packet = getattr(aten, name.partition(".")[0])
        functional = getattr(packet, name.partition(".")[2] or "default")
        for overload in _forms(packet, functional):
            full = str(overload).removeprefix("aten.").removesuffix(".default")
            found[full] = _glu(overload) if name == "glu" else _whole_vectors(overload, functional)
    return found


@functools.cache
def tensors_at(name: str) -> tuple[int, ...]:
    """Which arguments of an overload are tensors."""
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(aten, packet), overload or "default")._schema
    return tuple(
        i for i, a in enumerate(schema.arguments) if str(a.type) == "Tensor" and not a.is_out
    )


def without_numbers(args: tuple[Any, ...], at: tuple[int, ...]) -> tuple[Any, ...]:
    """Arguments with tensors where a kernel in Python got numbers.

    C++ passes a number as a tensor that is marked as one, which reaches Python as the number.
    """
    first = next((args[i] for i in at if isinstance(args[i], torch.Tensor)), None)
    if first is None or all(isinstance(args[i], torch.Tensor) for i in at if i < len(args)):
        return args
    dtype = torch.float64 if first.is_floating_point() else None
    return tuple(
        torch.tensor(a, dtype=dtype) if i in at and not isinstance(a, torch.Tensor) else a
        for i, a in enumerate(args)
    )


def _forms(packet: Any, functional: Any) -> list[Any]:
    """The functional overload, its `out=` form and its in-place form, as far as they exist."""
    wanted = [str(a.type) for a in functional._schema.arguments]
    found = [functional]
    for other in (packet, getattr(aten, f"{packet.__name__}_", None)):
        for name in [] if other is None else other.overloads():
            overload = getattr(other, name)
            given = [str(a.type) for a in overload._schema.arguments if not a.is_out]
            if overload is not functional and given == wanted:
                found.append(overload)
    return found


def _whole_vectors(overload: Any, functional: Any) -> Operator:
    """One form of an operator; NotImplemented where torch's own is as good."""
    in_place = overload._schema.name.endswith("_")
    out_name = next((a.name for a in overload._schema.arguments if a.is_out), "out")

    def call(*args: Any, **kwargs: Any) -> Any:
        out = args[0] if in_place else kwargs.pop(out_name, None)
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        tensors = [t for t in tensors if t.dim()] or tensors
        if not all(map(_takes, tensors)) or _is_whole(tensors, out):
            return NotImplemented
        if functional is aten.pow.Tensor_Scalar and args[1] in _MULTIPLIED:
            return NotImplemented
        order = None
        if functional is not aten.pow.Scalar:  # whose result torch makes contiguous
            order = _memory_order(tensors if out is None else [*tensors, out])
        if order is None:
            return _written(_evaluate(functional, args, kwargs, tensors), out)
        # As they lie in memory, or every operand would be copied: transposed ones took 9 times.
        turned = [a.permute(order) if any(a is t for t in tensors) else a for a in args]
        more = {} if out is None or in_place else {out_name: out.permute(order)}
        made = call(*turned, **kwargs, **more)
        if made is NotImplemented:  # torch's own, of contiguous tensors: its gelu asks for that
            made = overload(*turned, **kwargs, **more)
        shape = tensors[0].shape
        return made.as_strided(shape, _strides(shape, tensors)) if out is None else out

    return call


def _written(made: Any, out: Tensor | None) -> Any:
    """A result in `out`, if there is one that torch would take."""
    if out is None or made is NotImplemented:
        return made
    if not out.numel():
        out.resize_(made.shape)
    if out.shape != made.shape or not torch.can_cast(made.dtype, out.dtype):
        return NotImplemented
    return out.copy_(made)


def _takes(x: Tensor) -> bool:
    return x.layout == torch.strided and x.device.type == "cpu" and not x.is_complex()


def _is_whole(tensors: list[Tensor], out: Tensor | None) -> bool:
    """Whether torch's loops take these operands in whole vectors anyway."""
    first, every = tensors[0], tensors if out is None else [*tensors, out]
    if any(t.shape != first.shape or not t.is_contiguous() for t in every):
        return False
    return whole_part(first.numel()) == first.numel()


def _memory_order(tensors: Sequence[Tensor]) -> list[int] | None:
    """The order of dims in which all are contiguous; None if there is none, or nothing to order."""
    first = tensors[0]
    kind = first.shape, first.stride()
    if first.is_contiguous() or any((t.shape, t.stride()) != kind for t in tensors):
        return None
    strides = first.stride()
    order = sorted(range(first.dim()), key=lambda dim: -strides[dim])
    return order if first.permute(order).is_contiguous() else None


def whole_part(count: int) -> int:
    """How many of so many elements every thread takes in whole vectors."""
    while True:
        threads = max(1, min(torch.get_num_threads(), -(-count // _SHARE)))
        less = count - count % (threads * _VECTORS)
        if less == count:
            return count
        count = less


def _evaluate(function: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
    try:
        shape = broadcast(*(t.shape for t in tensors))
    except RuntimeError:
        return NotImplemented  # torch says it better
    total = math.prod(shape)
    if not total:
        return NotImplemented
    flat = [a.expand(shape).reshape(-1) if any(a is t for t in tensors) else a for a in args]
    whole = whole_part(total)
    parts = []
    if whole:
        parts.append(function(*_cut(flat, 0, whole), **kwargs))
    if whole < total:
        tail = function(*_cut(flat, whole, total), **kwargs)
        parts.append(tail[: total - whole])
    made = parts[0] if len(parts) == 1 else torch.cat(parts)
    made = made.view(shape)
    # torch.pow(2.0, x) is contiguous whatever x is.
    return made if function is aten.pow.Scalar else _laid_out(made, tensors)


def _cut(flat: list[Any], start: int, stop: int) -> list[Any]:
    """A piece of each operand, filled up to whole vectors with copies of its last element."""
    missing = -(stop - start) % _VECTORS

    def piece(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim():
            return value  # one for all elements
        taken = value[start:stop].contiguous()
        return torch.cat([taken, taken[-1:].expand(missing)]) if missing else taken

    return [piece(value) for value in flat]


def _laid_out(made: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The result with the strides torch gives one of these operands."""
    strides = _strides(made.shape, tensors)
    if strides == made.stride():
        return made
    return torch.empty_strided(made.shape, strides, dtype=made.dtype).copy_(made)


def _strides(shape: torch.Size, tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """What at::TensorIterator gives a result: the operands decide, and no dtype or operator."""
    if all(t.shape == shape for t in tensors):  # as in its compute_fast_setup_type
        for form in (torch.contiguous_format, torch.channels_last)[: 2 if len(shape) == 4 else 1]:
            if all(t.is_contiguous(memory_format=form) for t in tensors):
                return torch.empty(shape, device="meta", memory_format=form).stride()
        if _memory_order(tensors) is not None:
            return tensors[0].stride()
    shadows = [torch.empty_strided(t.shape, t.stride(), device="meta") for t in tensors]
    return (torch.add(*shadows) if len(shadows) == 2 else torch.neg(*shadows)).stride()


def _glu(overload: Any) -> Operator:
    def call(self: Tensor, dim: int = -1, *, out: Tensor | None = None) -> Any:
        if out is not None or not _takes(self) or not self.dim() or self.shape[dim] % 2:
            return NotImplemented
        halves = self.chunk(2, dim)
        count = halves[0].numel()
        if not count:
            return NotImplemented
        pairs = torch.stack([half.reshape(-1) for half in halves])
        whole = whole_part(count)
        parts = [aten.glu(pairs[:, :whole].contiguous(), 0)[0]] if whole else []
        if whole < count:
            tail = torch.stack(_cut(list(pairs), whole, count))
            parts.append(aten.glu(tail, 0)[0][: count - whole])
        return _laid_out(torch.cat(parts).view(halves[0].shape), halves)

    return call
