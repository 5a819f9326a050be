"""How many norms a model executes in eager, and how many its Dynamo graphs contain.

`count_norms` also makes a second, cruder count (calls of modules that have a norm's name), so that
the two can be checked against each other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.modules import module as module_hooks

from zoo.counting import NormCall, NormCounter

NORM_CLASS = re.compile(r"rms_?norm|l2_?norm|t5layer_?norm", re.IGNORECASE)
"""Modules whose class says that they are an RMS or L2 norm."""


@dataclass
class NormCount:
    """What one eager run executed."""

    calls: list[NormCall] = field(default_factory=list)
    module_calls: Counter[str] = field(default_factory=Counter)
    """Calls per class of modules that are norms by name (outermost ones)."""
    silent: Counter[str] = field(default_factory=Counter)
    """Of these, the ones in which no norm was seen: not a norm after all, or a missed one."""

    @property
    def executed(self) -> int:
        """Number of executed norms."""
        return len(self.calls)

    @property
    def functional(self) -> int:
        """Executed norms outside any module that is a norm by name."""
        return sum(not NORM_CLASS.search(call.owner) for call in self.calls)

    def owners(self) -> dict[str, int]:
        """Executed norms per class of the module that ran them."""
        return dict(Counter(call.owner for call in self.calls).most_common())


class _Stack:
    """The modules that are running, kept by two hooks that see every module call."""

    def __init__(self, model: torch.nn.Module, count: NormCount) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.count = count
        self.running: list[tuple[torch.nn.Module, int]] = []

    def where(self) -> tuple[str, str]:
        """Class and name of the innermost running module."""
        module = self.running[-1][0] if self.running else None
        return type(module).__name__ if module is not None else "", self.names.get(module, "")

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        """Forward pre-hook."""
        self.running.append((module, len(self.count.calls)))

    def leave(self, module: torch.nn.Module, args: Any, out: Any) -> None:
        """Forward hook."""
        _, before = self.running.pop()
        owner = type(module).__name__
        outer = any(NORM_CLASS.search(type(other).__name__) for other, _ in self.running)
        if NORM_CLASS.search(owner) and not outer:
            self.count.module_calls[owner] += 1
            if len(self.count.calls) == before:
                self.count.silent[owner] += 1


def count_norms(model: torch.nn.Module, *args: Any, **kwargs: Any) -> NormCount:
    """Run the model once in eager, without gradients, and count the norms it executes."""
    count = NormCount()
    stack = _Stack(model, count)
    counter = NormCounter(stack.where)
    count.calls = counter.calls
    with _hooks(stack), torch.no_grad(), counter:
        model(*args, **kwargs)
    return count


@contextmanager
def _hooks(stack: _Stack) -> Iterator[None]:
    handles = [
        module_hooks.register_module_forward_pre_hook(stack.enter),
        module_hooks.register_module_forward_hook(stack.leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class GraphCount:
    """Where the executed norms went when Dynamo cut the model into graphs."""

    sites: int = 0
    """Norms written in the captured graphs: what a graph pass can rewrite, each once."""
    executed: int = 0
    """Norms executed by those graphs. More than `sites` when layers share a graph."""
    graphs: int = 0


def count_graph_norms(model: torch.nn.Module, *args: Any, **kwargs: Any) -> GraphCount:
    """Capture the model with Dynamo, run every graph in eager and count the norms in it.

    With graph breaks, layers of one class may share a graph, and some norms may run outside any
    graph; then the executed count of the model and the sites of its graphs differ, and this says
    by how much.
    """
    total = GraphCount()

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        first = True
        total.graphs += 1

        def run(*values: Any) -> Any:
            nonlocal first
            with NormCounter() as counter:
                out = graph.forward(*values)
            total.executed += len(counter.calls)
            total.sites += len(counter.calls) if first else 0
            first = False
            return out

        return run

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend=backend)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    return total
