"""Eager mode: ATen's operators replaced in the dispatcher, for the threads that asked for it.

The replacements are registered while any thread is in the mode. A thread that is not gets the
kernel that was there before, whoever registered it. Autograd's worker threads inherit the mode from
the call that starts them, as do torch's own thread pools; Python threads do not.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

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


_USE_THE_OPTION = (
    '; for compiled code with invariant rows: torch.compile(..., backend="rmsnorm",'
    ' options={"batch_invariant": True})'
)
_BLOCK_IN_TRACED_CODE = (
    "fxpass: batch_invariant_mode() inside code that torch.compile compiles: the block runs"
    " uncompiled" + _USE_THE_OPTION
)
_ENABLED_IN_TRACED_CODE = (
    "fxpass: enable_batch_invariant() inside code that torch.compile compiles does not reach what"
    " follows in it" + _USE_THE_OPTION
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


class _Open(threading.local):
    """What was before each block of this thread that is open, by its `Mode`."""

    def __init__(self) -> None:
        self.before: weakref.WeakKeyDictionary[Mode, list[tuple[Any, Any]]] = (
            weakref.WeakKeyDictionary()
        )


_open = _Open()


class Mode(contextlib.ContextDecorator):
    """The context manager that `batch_invariant_mode` makes."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def _recreate_cm(self) -> Mode:
        """For each call of a decorated function."""
        return Mode(self._enabled)

    @torch_dispatcher.dynamo_switch
    def __enter__(self) -> None:
        torch_dispatcher.break_graph(_BLOCK_IN_TRACED_CODE)
        compiling = torch_dispatcher.stop_dynamo()
        try:
            if compiling is not None:
                _warn(_BLOCK_IN_TRACED_CODE)
            _registered.acquire()
        except BaseException:
            torch_dispatcher.start_dynamo(compiling)
            raise
        _open.before.setdefault(self, []).append((torch_dispatcher.thread_value(_KEY), compiling))
        torch_dispatcher.set_thread_value(_KEY, self._enabled)

    @torch_dispatcher.dynamo_switch
    def __exit__(self, *error: object) -> None:
        torch_dispatcher.break_graph(_BLOCK_IN_TRACED_CODE)
        compiling = None
        if opened := _open.before.get(self):
            before, compiling = opened.pop()
            torch_dispatcher.set_thread_value(_KEY, before)
        # Else another thread entered it: so it is with a generator that is collected.
        _registered.release()
        torch_dispatcher.start_dynamo(compiling)


def _warn(text: str) -> None:
    """A warning that names the line that entered the mode: not ours, contextlib's or torch's."""
    passed = (__file__, contextlib.__file__, os.path.dirname(torch.__file__) + os.sep)
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(passed):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, RuntimeWarning, stacklevel=level)


@torch_dispatcher.dynamo_switch
def enable() -> None:
    """Turn the mode on for all threads of the process, until `disable`. Twice is as once."""
    _everywhere(True)


@torch_dispatcher.dynamo_switch
def disable() -> None:
    """Turn off what `enable` turned on; `with` blocks that are open keep the mode."""
    _everywhere(False)


@torch_dispatcher.dynamo_switch
def _everywhere(on: bool) -> None:
    torch_dispatcher.break_graph(_ENABLED_IN_TRACED_CODE)
    compiling = torch_dispatcher.stop_dynamo()
    try:
        if on and compiling is not None:
            _warn(_ENABLED_IN_TRACED_CODE)
        if _registered.set_everywhere(on):
            (_registered.acquire if on else _registered.release)()
    finally:
        torch_dispatcher.start_dynamo(compiling)


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
