"""Private parts of torch's dispatcher: operators replaced in Python, and who asked for it.

Seen in torch 2.11 and 2.13. Inductor's and Dynamo's are in `torch_private.py`.
"""

from __future__ import annotations

import collections
import functools
import operator
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch


def python_overrides(operator_name: str) -> dict[str, str]:
    """Dispatch key -> `file:line` of implementations of an operator written in Python, torch's not.

    The dispatcher's dump marks what an override has replaced as inactive.
    """
    ours = (os.path.dirname(torch.__file__) + os.sep, "/dev/null")
    found: dict[str, str] = {}
    for line in torch._C._dispatch_dump(operator_name).splitlines():
        key, _, rest = line.partition(": registered at ")
        place = rest.partition(" :: ")[0]
        in_python = place.rpartition(":")[0].endswith(".py")
        if in_python and "inactive" not in key and not place.startswith(ours):
            found[key] = place
    return found


def thread_value(key: str) -> Any:
    """A value of this thread, which autograd's threads inherit from the one that starts them."""
    return torch._C._get_obj_in_tls(key) if torch._C._is_key_in_tls(key) else None


def set_thread_value(key: str, value: Any) -> None:
    """Set a `thread_value`."""
    torch._C._stash_obj_in_tls(key, value)


Kernels = Mapping[str, Callable[[Any], Callable[..., Any]]]

_KEPT: collections.deque[list[Any]] = collections.deque(maxlen=64)
"""Kernels that were taken back last. Another thread may have looked one up and wait for Python's
lock to enter it; the dispatcher itself keeps none alive that is no longer registered."""


def untraced(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with neither its frame nor those it calls compiled by Dynamo.

    Where a graph breaks, Dynamo compiles every Python frame of the eager code that follows: parts
    of a kernel would get Inductor's roundings.
    """
    if _is_skipped(kernel.__code__):
        return kernel
    disable: Any = torch.compiler.disable
    return cast(Callable[..., Any], disable(kernel))  # 1 us a call


@functools.cache
def _is_skipped(code: types.CodeType, with_calls: bool = True) -> bool:
    """Marks a function's code, once for all that share it; False if this torch cannot.

    with_calls: also the frames that it calls.
    """
    try:
        from torch._C._dynamo import eval_frame

        action: Any = eval_frame._FrameAction
        calls = action.SKIP if with_calls else action.DEFAULT
        strategy: Any = eval_frame._FrameExecStrategy(action.SKIP, calls)
        eval_frame.set_code_exec_strategy(code, strategy)
    except (ImportError, AttributeError):
        return False
    return True


Switch = TypeVar("Switch", bound=Callable[..., Any])


def dynamo_switch(function: Switch) -> Switch:
    """For functions that call `stop_dynamo` and the like: what they set stays when they return."""
    _is_skipped(function.__code__, with_calls=False)
    return function


@dynamo_switch
def stop_dynamo() -> Any:
    """Let nothing compile the frames this thread enters from now on; None if nothing does.

    Else what `start_dynamo` takes. Call both only from a `dynamo_switch`.
    """
    from torch._C._dynamo import eval_frame

    before = eval_frame.set_eval_frame(None)
    if callable(before):
        return before
    eval_frame.set_eval_frame(before)
    return None


@dynamo_switch
def start_dynamo(before: Any) -> None:
    """Undo `stop_dynamo`, if the call of compiled code that it was in, or another, still runs."""
    from torch._C._dynamo import eval_frame

    if before is not None and _in_compiled_call():
        eval_frame.set_eval_frame(before)


@dynamo_switch
def _in_compiled_call() -> bool:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.endswith(_EVAL_FRAME) and code.co_name in _CALLS:
            return _CALLS[code.co_name]
        frame = frame.f_back
    return False


_EVAL_FRAME = os.path.join("_dynamo", "eval_frame.py")
_CALLS = {"compile_wrapper": True, "_fn": False}
"""Functions that a call of compiled code goes through, and one of what Dynamo is disabled for."""


@dynamo_switch
def break_graph(why: str) -> None:
    """End the graph that Dynamo traces, if it does: what follows is run, not traced."""
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(msg=why)


def override(leaves: Kernels, on_cpu: Kernels, composites: Kernels) -> Callable[[], None]:
    """Replace ATen operators; what is returned puts back what was there.

    The names are overloads (`mm`, `mm.out`). Each function gets the kernel there is, whose
    `call_boxed(keyset, *args)` runs it, and gives the new one, which takes (keyset, *args). Leaves
    are replaced for CPU and CUDA tensors where they have kernels, or on the CPU only; composites
    where they decompose.
    torch.library would forget on the way out that somebody else's Python kernel is registered.
    """
    import warnings

    library: Any = torch._C._dispatch_library("IMPL", "aten", "", __file__, 0)
    kernel, ours = torch.library.get_kernel, []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Overriding a previously registered kernel"
            devices = ("CPU", "CUDA") if torch.cuda.is_available() else ("CPU",)
            for kernels, keys in ((leaves, devices), (on_cpu, ("CPU",))):
                for name, key in _places(tuple(kernels), keys):
                    made = untraced(kernels[name](kernel(f"aten::{name}", key)))
                    library.impl(name, key, made, True)
                    ours.append(kernel(f"aten::{name}", key))
            for name, make in composites.items():
                made = untraced(make(kernel(f"aten::{name}", "CPU")))
                library.impl(name, "CompositeImplicitAutograd", made, True)
                ours.append(kernel(f"aten::{name}", "CPU"))
    except BaseException:
        library.reset()
        raise

    def take_back() -> None:
        _KEPT.append(ours)
        library.reset()

    return take_back


@functools.cache
def _places(names: tuple[str, ...], keys: tuple[str, ...]) -> list[tuple[str, str]]:
    """(overload, dispatch key) where an operator has a kernel of its own below autograd."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    found = []
    for name in names:
        full = f"aten::{name}"
        if not torch._C._dispatch_has_kernel(full):
            continue
        everywhere = any(has(full, f"CompositeExplicitAutograd{s}") for s in ("", "NonFunctional"))
        found += [(name, key) for key in keys if everywhere or has(full, key)]
    return found


def tf32_allowed(backend: str = "cuda.matmul") -> bool:
    """Whether the user lets float32 products on a GPU round their inputs to TF32.

    torch asks `cuda.matmul` for products and `cudnn.conv` for convolutions.
    """
    settings: Any = operator.attrgetter(backend)(torch.backends)
    return bool(settings.fp32_precision == "tf32")


def convolution_is_channels_last(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, windows: Sequence[Any]
) -> bool:
    """Whether torch gives the result of aten::convolution with its channels innermost.

    That depends on the strides of both operands and on the library it takes.
    """
    innermost = (torch.channels_last, torch.channels_last_3d)
    try:
        backend = torch._C._select_conv_backend(input, weight, bias, *windows)
    except RuntimeError:  # 2.11 asks for the number of samples, which a graph may not know
        return suggested_format(input) in innermost or suggested_format(weight) in innermost
    found = torch._C._conv_determine_backend_memory_format(input, weight, backend)
    return found in innermost


def suggested_format(x: torch.Tensor) -> torch.memory_format:
    """The memory format that torch's operators give the result for an input's strides."""
    found: torch.memory_format = torch._prims_common.suggest_memory_format(x)
    return found


def is_traced() -> bool:
    """Whether a mode or a transform watches operators: then composite ones should open up."""
    return bool(torch._C._len_torch_dispatch_stack()) or is_transformed()


def is_transformed() -> bool:
    """Whether torch.func or forward-mode derivatives look at every operator."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return bool(torch.autograd.forward_ad._current_level >= 0)
