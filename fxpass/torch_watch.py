"""The private torch APIs behind running a model and watching it: see `torch_private.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

Seen = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""Called with an operator, its arguments and its result."""


def flattened(value: Any) -> tuple[list[Any], Any]:
    """What a nested value holds, and the spec `torch_private.unflattened` puts it together with."""
    from torch.utils import _pytree

    return _pytree.tree_flatten(value)


def is_overload(operator: Any) -> bool:
    """Whether this is an operator of the dispatcher, and not a higher-order one or a function."""
    return isinstance(operator, torch._ops.OpOverload)


def watching(see: Seen) -> contextlib.AbstractContextManager[Any]:
    """Meanwhile `see` is called after every ATen operator of this thread, below autograd.

    What `see` computes itself is not watched.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    def dispatch(
        _: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        see(func, args, kwargs or {}, made)
        return made

    members = {
        "__torch_dispatch__": dispatch,
        "supports_higher_order_operators": True,  # flex_attention and the like: seen, not opened
    }
    watch: Any = type("Watch", (TorchDispatchMode,), members)
    made: contextlib.AbstractContextManager[Any] = watch()
    return made


@contextlib.contextmanager
def many_recompiles() -> Iterator[None]:
    """Meanwhile a function may be compiled for many shapes, and never silently runs in eager."""
    from torch._dynamo import config

    with config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        yield


def apart(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model behind a function of its own, which shares no compiled code with other calls."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name="watched")
    return call


def dynamo_calls(
    model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], dynamic: bool | None
) -> list[tuple[fx.GraphModule, list[Any], list[Any]]]:
    """(graph, inputs, outputs) of each of Dynamo's graphs that one call of a model runs, in order.

    The graphs are run as they are, so what they compute is eager's.
    """
    calls: list[tuple[fx.GraphModule, list[Any], list[Any]]] = []

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        def run(*given: Any) -> Any:
            kept = [v.clone() if isinstance(v, torch.Tensor) else v for v in given]
            made = graph.forward(*given)
            calls.append((graph, kept, list(made)))
            return made

        return run

    with many_recompiles():
        torch.compile(apart(model), backend=backend, dynamic=dynamic)(*args, **kwargs)
    return calls
