"""Launching Triton kernels of many arguments with little host time.

Triton finds the compiled kernel for each call's arguments again, by their types, alignment and
values. Here that is done once for each kind of arguments; what it returns is launched directly from
then on, with addresses for tensors. Two calls are of one kind if Triton would compile one kernel
for both: equal dtypes, constants and options, all tensors aligned, and integers that agree in being
1, a multiple of 16, or neither, and in their width.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

Tensor = torch.Tensor

_ALIGNED = 16
"""Bytes: what Triton compiles pointers for."""
_NARROW = range(-(2**31), 2**31)
_KINDS_MOST = 4096

_compiled: dict[Any, Any] = {}


def launch(
    kernel: Any,
    programs: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    numbers: tuple[int | float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    """Run `kernel(*tensors, *numbers, **constants)` on the current stream of the tensors' device.

    Args:
        kernel: a jitted function whose parameters are in this order.
        programs: one to three dims of the grid.
        tensors: on one device.
        numbers: Python integers and floats.
        constants: a value for every constexpr parameter.
        options: Triton's, such as num_warps.
    """
    index = tensors[0].get_device()
    grid = (*programs, 1, 1)[:3]
    here = index < 0 or torch.cuda.current_device() == index
    with nullcontext() if here else torch.cuda.device(index):
        if index < 0 or torch.version.hip is not None:
            # For AMD GPUs Triton also looks at the size of the memory that a tensor is a view of.
            kernel[grid](*tensors, *numbers, **constants, **options)
            return
        pointers = [tensor.data_ptr() for tensor in tensors]
        if any(pointer % _ALIGNED for pointer in pointers):
            kernel[grid](*tensors, *numbers, **constants, **options)
            return
        key = (
            id(kernel),
            index,
            tuple([tensor.dtype for tensor in tensors]),
            tuple([_kind(number) for number in numbers]),
            tuple(constants.items()),
            tuple(options.items()),
        )
        found = _compiled.get(key)
        if found is None:
            if len(_compiled) >= _KINDS_MOST:
                _compiled.clear()
            _compiled[key] = kernel[grid](*tensors, *numbers, **constants, **options)
            return
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        found[grid](*pointers, *numbers, *[constants[name] for name in names])


def _kind(number: int | float) -> int:
    """What Triton compiles for, of a number: its type, 1, a multiple of 16."""
    if isinstance(number, float):
        return -1
    if number == 1:
        return 1
    return (0 if number % 16 else 16) + (0 if number in _NARROW else 32)
