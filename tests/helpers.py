"""Captures a function's graphs once, at both levels, and runs rewritten graphs beside the old."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx

import fxpass
from fxpass import torch_inductor
from fxpass.options import Options

DTYPES = {
    "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "f64": torch.float64,
    "i64": torch.int64, "bool": torch.bool, "c64": torch.complex64,
}  # fmt: skip
NEEDS_ROUNDINGS = pytest.mark.skipif(
    not torch_inductor.CPP_KEEPS_ROUNDINGS, reason="this Inductor's C++ drops roundings"
)
REFERENCE = Options(providers=("reference",), strict=True)


def tensor(text: str, seed: int = 0) -> torch.Tensor:
    """`bf16[2,8,64]` as a random tensor; `+` in front makes it positive, `!` a leaf with grad."""
    kind, _, rest = text.strip("+!").partition("[")
    shape = [int(size) for size in rest.rstrip("]").split(",") if size]
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    made = made.abs() + 0.01 if "+" in text else made
    made = (made * 3).to(DTYPES[kind]) if kind in ("i64", "bool") else made.to(DTYPES[kind])
    return made.requires_grad_() if "!" in text else made


def tensors(*texts: Any) -> tuple[Any, ...]:
    """Each text as its own tensor; anything else as it is."""
    return tuple(tensor(t, i) if isinstance(t, str) else t for i, t in enumerate(texts))


def copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy whose graph may be changed; node names and metadata stay."""
    graph, copies = fx.Graph(), {}
    for node in graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(graph_module, graph)


@dataclass
class Level:
    """One captured graph and the arguments it was run with."""

    name: str
    graph_module: fx.GraphModule
    inputs: tuple[Any, ...] = ()


@dataclass
class Captured:
    """All graphs of one call, Dynamo's and ATen's, and eager's result."""

    levels: list[Level] = field(default_factory=list)
    result: Any = None

    def graphs(self, level: str) -> list[Level]:
        """The graphs of one level."""
        return [found for found in self.levels if found.name == level]


def capture(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    dynamic: bool | None = None,
    aten: bool = True,
) -> Captured:
    """Run `function` once through Dynamo and AOTAutograd, keeping every graph with its inputs."""
    found = Captured()

    def watched(name: str, graph_module: fx.GraphModule) -> Callable[..., Any]:
        level = Level(name, copied(graph_module))
        found.levels.append(level)

        def run(*args: Any) -> Any:
            level.inputs = args
            return graph_module(*args)

        return run

    def inner(graph_module: fx.GraphModule, _: Any, **__: Any) -> Any:
        return watched("aten", graph_module)

    def backend(graph_module: fx.GraphModule, example: list[Any]) -> Any:
        run = watched("dynamo", graph_module)
        if not aten:
            return run
        lowered = compile_fx(copied(graph_module), example, inner, {"force_disable_caches": True})

        def both(*args: Any) -> Any:
            run_level = found.graphs("dynamo")[-1]
            run_level.inputs = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
            return lowered(*args)

        return both

    torch._dynamo.reset()
    compiled = torch.compile(_fresh(function), backend=backend, dynamic=dynamic)
    found.result = compiled(*inputs)
    return found


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A new function, so that a compile of an earlier one is not found again."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


def rewritten(level: Level, options: Options = REFERENCE) -> tuple[fx.GraphModule, fxpass.Report]:
    """A rewritten copy of a captured graph."""
    made = copied(level.graph_module)
    return made, fxpass.rewrite(made, options=options)


def flat(values: Any) -> list[Any]:
    """The tensors and numbers of a nested result."""
    if isinstance(values, (list, tuple)):
        return [leaf for value in values for leaf in flat(value)]
    return [values]


def differences(old: Any, new: Any) -> list[str]:
    """What differs between two results: dtype, shape, strides or bits."""
    found = []
    for index, (a, b) in enumerate(zip(flat(old), flat(new), strict=True)):
        if not isinstance(a, torch.Tensor):
            continue
        if layout(a) != layout(b):
            found.append(f"output {index}: {layout(a)} became {layout(b)}")
        elif not torch.equal(bits(a), bits(b)):
            apart = (bits(a) != bits(b)).sum().item()
            found.append(f"output {index}: {apart} of {a.numel()} elements differ")
    return found


def layout(value: torch.Tensor) -> tuple[Any, ...]:
    """Dtype, shape and strides; a dim of size 1 has no stride to speak of."""
    strides = [step for size, step in zip(value.shape, value.stride(), strict=True) if size != 1]
    return value.dtype, tuple(value.shape), strides if value.numel() else []


def bits(value: torch.Tensor) -> torch.Tensor:
    """The memory of a float tensor as integers, NaNs made equal."""
    if not value.dtype.is_floating_point:
        return value
    clean = torch.where(value.isnan(), torch.full_like(value, float("nan")), value)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return clean.detach().contiguous().view(width)


def changed(level: Level, options: Options = REFERENCE) -> list[str]:
    """What a rewrite changes in the results of a captured graph, run on its own inputs."""
    with torch.no_grad():
        made, _ = rewritten(level, options)
        return differences(_seeded(copied(level.graph_module), level), _seeded(made, level))


def _seeded(graph_module: fx.GraphModule, level: Level) -> Any:
    torch.manual_seed(0)
    return graph_module(*cloned(level.inputs))


def cloned(inputs: Sequence[Any]) -> list[Any]:
    """Inputs with memory of their own (strides kept), so that graphs may write to them."""
    return [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a.detach())
        if isinstance(a, torch.Tensor) else a
        for a in inputs
    ]  # fmt: skip
