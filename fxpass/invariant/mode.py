"""Eager mode: ATen's operators replaced in the dispatcher, for the threads that asked for it.

The replacements are registered while any thread is in the mode. A thread that is not gets the
kernel that was there before, whoever registered it. Autograd's worker threads inherit the mode from
the call that starts them, as do torch's own thread pools; Python threads do not.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from fxpass import torch_dispatcher
from fxpass.invariant import pointwise
from fxpass.invariant.aten import Operator
from fxpass.invariant.table import COMPOSITES, CPU_POINTWISE, LEAVES

_KEY = "fxpass.batch_invariant"


class _Registered:
    """The registrations, and who needs them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._take_back: Callable[[], None] | None = None
        self.everywhere = False

    def acquire(self) -> None:
        with self._lock:
            if not self._users:
                self._take_back = _register()
            self._users += 1

    def release(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._take_back is not None:
                self._take_back()
                self._take_back = None

    def set_everywhere(self, on: bool) -> bool:
        """Whether that changed anything."""
        with self._lock:
            changed = self.everywhere != on
            self.everywhere = on
        return changed


_registered = _Registered()


class _Busy(threading.local):
    """Set while one of our kernels runs: the operators it is made of are torch's own."""

    on = False


_busy = _Busy()


class _Watch(threading.local):
    """Calls in the mode that were left to torch's kernel, while somebody asks."""

    left: list[Operator] | None = None


_watch = _Watch()


@contextlib.contextmanager
def watched() -> Iterator[list[Operator]]:
    """The functions that leave calls of this thread to torch's kernels meanwhile."""
    before, found = _watch.left, list[Operator]()
    _watch.left = found
    try:
        yield found
    finally:
        _watch.left = before


def active() -> bool:
    """Whether this thread is in the mode."""
    return _registered.everywhere or torch_dispatcher.thread_value(_KEY) is True


_IN_TRACED_CODE = (
    "fxpass: batch_invariant_mode() inside code that torch.compile compiles runs uncompiled; for"
    ' compiled code with invariant rows: torch.compile(..., backend="rmsnorm",'
    ' options={"batch_invariant": True})'
)


def batch_invariant_mode(enabled: bool = True) -> Mode:
    """Rows of every operator's result do not depend on other rows, in this thread, until the end.

    Can be nested and used as a decorator; what autograd runs for a `backward()` called inside is
    included. `enabled=False` leaves the mode for a while, but not one that `enable` started.
    The outermost entry registers every replacement, which takes about 8 ms: around a loop it is
    cheaper than inside.

    A graph that torch.compile traced has no mode in it. So where compiled code enters the mode, the
    graph ends and the block runs uncompiled, with a warning.
    """
    return Mode(enabled)


class Mode(contextlib.ContextDecorator):
    """The context manager that `batch_invariant_mode` makes. Not for several threads at once."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._before: list[tuple[Any, Any]] = []

    def _recreate_cm(self) -> Mode:
        """For each call of a decorated function."""
        return Mode(self._enabled)

    @torch_dispatcher.dynamo_switch
    def __enter__(self) -> None:
        torch_dispatcher.break_graph(_IN_TRACED_CODE)
        compiling = torch_dispatcher.set_dynamo(None)
        if callable(compiling):
            warnings.warn(_IN_TRACED_CODE, RuntimeWarning, stacklevel=2)
        self._before.append((torch_dispatcher.thread_value(_KEY), compiling))
        _registered.acquire()
        torch_dispatcher.set_thread_value(_KEY, self._enabled)

    @torch_dispatcher.dynamo_switch
    def __exit__(self, *error: object) -> None:
        before, compiling = self._before.pop()
        torch_dispatcher.set_thread_value(_KEY, before)
        _registered.release()
        torch_dispatcher.set_dynamo(compiling)


def enable() -> None:
    """Turn the mode on for all threads of the process, until `disable`. Twice is as once."""
    torch_dispatcher.break_graph(_IN_TRACED_CODE)
    if _registered.set_everywhere(True):
        _registered.acquire()


def disable() -> None:
    """Turn off what `enable` turned on; `with` blocks that are open keep the mode."""
    torch_dispatcher.break_graph(_IN_TRACED_CODE)
    if _registered.set_everywhere(False):
        _registered.release()


def _register() -> Callable[[], None]:
    """Register everything; what comes back takes it back."""
    return torch_dispatcher.override(
        {name: functools.partial(_leaf, function) for name, function in LEAVES.items()},
        {name: functools.partial(_on_cpu, name, f) for name, f in CPU_POINTWISE.items()},
        {name: functools.partial(_composite, function) for name, function in COMPOSITES.items()},
    )


def _leaf(function: Operator, original: Any) -> Operator:
    """The kernel of an operator whose parts are not to be replaced once more."""
    call_original = original.call_boxed

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if not _busy.on and active():
            _busy.on = True
            try:
                made = function(*args, **kwargs)
            finally:
                _busy.on = False
            if made is not NotImplemented:
                return made
            if _watch.left is not None:
                _watch.left.append(function)
        return call_original(keyset, *args, **kwargs)

    return kernel


def _on_cpu(name: str, function: Operator, original: Any) -> Operator:
    """The kernel of an element-wise operator, to which C++ may give numbers as tensors."""
    kernel, at = _leaf(function, original), pointwise.tensors_at(name)
    if len(at) < 2:
        return kernel
    return lambda keyset, *args, **kwargs: kernel(
        keyset, *pointwise.without_numbers(args, at), **kwargs
    )


def _composite(function: Operator, original: Any) -> Operator:
    """The kernel of an operator that is made of others."""
    call_original = original.call_boxed

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        if not _busy.on and active():
            made = function(*args, **kwargs)
            if made is not NotImplemented:
                return made
        return call_original(keyset, *args, **kwargs)

    return kernel
