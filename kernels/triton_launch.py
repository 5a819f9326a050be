"""Launches of Triton kernels, complete but for their tensors.

Triton finds the compiled kernel for each call's arguments again, by their types, alignment and
values. Here that is done once for each kind of arguments; what it returns is launched directly from
then on. Two calls are of one kind if Triton would compile one kernel for both: equal dtypes,
constants and options, all tensors aligned, and integers that agree in being 1, a multiple of 16, or
neither, and in their width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fxpass.kernels.triton_direct import Direct, direct

Tensor = torch.Tensor

ALIGNED = 16
"""Bytes: what Triton compiles pointers for, and what descriptors need."""


_NARROW = range(-(2**31), 2**31)
_KNOWN_MOST = 4096


class _Known(NamedTuple):
    """A kernel for arguments of one kind. Keeps alive what the kind names by its id."""

    kernel: Any
    compiled: Any
    direct: Direct | None


_known: dict[Any, _Known] = {}


class Launch:
    """One kernel with its grid, numbers and constants, for tensors of given dtypes."""

    def __init__(
        self,
        kernel: Any,
        programs: tuple[int, ...],
        numbers: Sequence[int | float],
        constants: dict[str, Any],
        options: dict[str, Any],
        *,
        aligned: bool,
    ) -> None:
        """Of the arguments.

        Args:
            kernel: a jitted function; its parameters are what a call gives, numbers, constants.
            programs: one to three dims of the grid.
            numbers: Python integers and floats.
            constants: a value for every constexpr parameter.
            options: Triton's, such as num_warps.
            aligned: whether all tensors of every call start at a multiple of ALIGNED bytes.
        """
        self._kernel = kernel
        one, two, three = (*programs, 1, 1)[:3]
        assert max(one, two, three) < 2**31  # ctypes would cut it off
        self._grid = (one, two, three)
        self._numbers, self._constants, self._options = tuple(numbers), constants, options
        # For AMD GPUs Triton also looks at the size of the memory that a tensor is a view of.
        self._reusable = aligned and torch.version.hip is None
        self.again: Callable[[int, Sequence[Any]], Any] | None = None
        """(device, addresses and numbers) -> a launch; once a kernel is known for the arguments."""
        self.is_direct = False
        """Whether that is without Triton: of tensor maps then, else of descriptors."""

    def __call__(self, device: int, tensors: Sequence[Tensor], *numbers: float) -> None:
        """On the current stream of the current device, which is `device` (-1: interpreted).

        numbers: parameters between the tensors and those that are kept.
        """
        if self.again is None and self.known(device, tensors, *numbers) is None:
            self.first(device, tensors, *numbers)
        elif self.again is not None:
            self.again(device, [*[tensor.data_ptr() for tensor in tensors], *numbers])

    def known(self, device: int, arguments: Sequence[Any], *numbers: float) -> _Known | None:
        """Sets `again` if a kernel has run for arguments of this kind; gives what is known of it.

        arguments: tensors, or descriptors of them.
        """
        if not self._reusable or device < 0:
            return None
        found = _known.get(self._kind(device, arguments))
        if found is None:
            return None
        self.is_direct = found.direct is not None and not _has_hooks()
        if found.direct is not None and self.is_direct:
            self.again = found.direct.launch(self._grid, self._numbers)
        else:
            self.again = self._by_triton(found.compiled, len(arguments) + len(numbers))
        return found

    def first(self, device: int, arguments: Sequence[Any], *numbers: float) -> None:
        """By Triton, which compiles what it has to, and checks descriptors."""
        compiled = self._kernel[self._grid](
            *arguments, *numbers, *self._numbers, **self._constants, **self._options
        )
        # Nothing is compiled if Triton interprets, or a hook of its own kept it from compiling.
        if self._reusable and device >= 0 and hasattr(compiled, "__getitem__"):
            leading = len(arguments) + len(numbers)
            if len(_known) >= _KNOWN_MOST:
                _known.clear()
            _known[self._kind(device, arguments)] = _Known(
                self._kernel, compiled, direct(compiled, leading, len(self._numbers))
            )

    def _kind(self, device: int, arguments: Sequence[Any]) -> Any:
        """What Triton compiles a kernel for; blocks of descriptors are among the constants."""
        return (
            id(self._kernel),
            device,
            *[getattr(argument, "base", argument).dtype for argument in arguments],
            *[_kind_of(number) for number in self._numbers],
            *self._constants.values(),
            *self._options.values(),
        )

    def _by_triton(self, compiled: Any, leading: int) -> Callable[[int, Sequence[Any]], Any]:
        """Its own launch, of addresses."""
        run = compiled[self._grid]
        names = self._kernel.arg_names[leading + len(self._numbers) :]
        last = (*self._numbers, *(self._constants[name] for name in names))
        return lambda device, given: run(*given, *last)


def _kind_of(number: int | float) -> int:
    """What Triton compiles for, of a number: its type, 1, a multiple of 16."""
    if isinstance(number, float):
        return -1
    if number == 1:
        return 1
    return (0 if number % 16 else 16) + (0 if number in _NARROW else 32)


def _has_hooks() -> bool:
    """Whether a profiler wants to be told of Triton's launches."""
    from triton import knobs  # type: ignore[import-not-found, import-untyped, unused-ignore]

    runtime = knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
