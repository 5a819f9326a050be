"""Fake tensors: shapes, dtypes and strides without memory, in graphs, models and symbols.

Private parts of torch, seen in 2.11 and 2.13.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx


def propagate_fakes(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Give every node of a graph its fake value, from example inputs.

    Modules run with fake parameters and buffers: a BatchNorm's would count this as a batch.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp
    from torch.nn.utils.stateless import _reparametrize_module

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    named = itertools.chain(
        graph_module.named_parameters(remove_duplicate=False),
        graph_module.named_buffers(remove_duplicate=False),
    )
    state: dict[str, torch.Tensor] = {name: mode.from_tensor(tensor) for name, tensor in named}
    with _reparametrize_module(graph_module, state):
        FakeTensorProp(graph_module, mode).propagate(*inputs)


def propagate_in(graph_module: fx.GraphModule, mode: Any, fakes: Sequence[Any]) -> None:
    """Give every node its fake value, from fake inputs of `mode`."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    with torch.no_grad():
        FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*fakes)


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made meanwhile have shapes but no memory.

    Converting a module (`.to`, `.cuda`, `.bfloat16`) would swap each parameter in place, which
    torch 2.13 refuses for fake ones; meanwhile it gives the module new parameters.
    """
    from unittest import mock

    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(torch.nn.Module, "_apply", _convert),
    ):
        yield


def _convert(
    module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    """`Module._apply` with new parameters; one that is shared stays shared."""
    made: dict[int, torch.nn.Parameter] = {}
    for inner in module.modules() if recurse else [module]:
        for name, old in list(inner._parameters.items()):
            if old is not None and id(old) not in made:
                with torch.no_grad():
                    made[id(old)] = torch.nn.Parameter(change(old), old.requires_grad)
            inner._parameters[name] = None if old is None else made[id(old)]
        for name, value in inner._buffers.items():
            inner._buffers[name] = None if value is None else change(value)
    return module


def fakes_with_symbols(
    sizes: Mapping[str, int],
) -> tuple[contextlib.AbstractContextManager[Any], dict[str, Any]]:
    """A mode whose fake tensors may have symbolic sizes, and a symbol for each name and hint."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

    env = ShapeEnv()
    made = {}
    for name, hint in sizes.items():
        source = ConstantSource(name)
        symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        made[name] = env.create_symintnode(symbol, hint=hint, source=source)
    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=True), made
