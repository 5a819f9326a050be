"""Compiled mode: a graph whose operators are those of eager mode.

Softmax, products, attention and the like become `fxpass::bi_*` while AOTAutograd traces the graph,
through the decomposition table; `tracing` gives it. Sums, means and norms stay until the norm pass
has read them; `rewrite` turns what it left. Between the two nothing of torch may decompose them.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from fxpass import facts, torch_inductor, torch_private
from fxpass.invariant import library
from fxpass.invariant.aten import Operator, aten
from fxpass.invariant.mode import batch_invariant_mode
from fxpass.invariant.table import CUSTOM, LEAVES
from fxpass.kernels.invariant import dispatch

FLAGS = {
    "emulate_precision_casts": True,  # or roundings follow what is fused, and that the batch
    "split_reductions": False,
    "shape_padding": False,
    "max_autotune_gemm": False,
    "deterministic": True,
    "batch_invariant": True,
    # Or what does not fill a vector is computed by other functions (`std::log1p` for Sleef's).
    "cpp.enable_tiling_heuristics": False,
    "cpp.enable_loop_tail_vec": True,
}
"""Settings of Inductor for the rest of the graph; those that this torch does not have are left."""

_LATE = ("sum", "mean", "linalg_vector_norm", "norm")
"""Packets that the norm pass reads."""
_NOT_HERE = ("_fused_rms_norm",)
"""Packets that the norm pass takes decomposed."""


def flags() -> dict[str, Any]:
    """The settings this torch has."""
    config = torch_private.inductor_config()
    return {name: value for name, value in FLAGS.items() if _has(config, name)}


def _has(config: Any, name: str) -> bool:
    group, _, last = name.rpartition(".")
    return hasattr(getattr(config, group, None) if group else config, last)


@functools.cache
def _functional() -> dict[Any, Operator]:
    """OpOverload -> our operator, for those that a functional graph holds."""
    found = {}
    for name, function in LEAVES.items():
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet, None), overload or "default", None)
        if op is not None and packet not in _NOT_HERE and not op._schema.is_mutable:
            found[op] = function
    return found


def _replaced() -> dict[Any, Operator]:
    """Those, and operators of other libraries that are there by now."""
    found = dict(_functional())
    for name, function in CUSTOM.items():
        space, _, packet = name.partition(".")
        op = getattr(getattr(torch.ops, space), packet, None)
        if op is not None:
            found[op.default] = function
    return found


@contextlib.contextmanager
def tracing() -> Iterator[dict[Any, Callable[..., Any]]]:
    """The decomposition table for AOTAutograd, for as long as it traces.

    The eager mode is on meanwhile: it decides what `linear`, `matmul` and attention open into, and
    computes what is folded into constants.
    """
    base = torch_private.inductor_decompositions()
    table = {op: function for op, function in base.items() if _packet(op) not in _LATE}
    for op, function in _replaced().items():
        if _packet(op) not in _LATE:
            table[op] = _decomposition(function, base.get(op))
    with batch_invariant_mode():
        yield table


def _packet(op: Any) -> str:
    return str(op._schema.name).removeprefix("aten::") if hasattr(op, "_schema") else ""


def _decomposition(function: Operator, base: Callable[..., Any] | None) -> Callable[..., Any]:
    def decompose(*args: Any, **kwargs: Any) -> Any:
        made = _as_operators(function, *args, **kwargs)
        if made is NotImplemented and base is not None:
            return base(*args, **kwargs)
        return made

    return decompose


def _as_operators(function: Operator, *args: Any, **kwargs: Any) -> Any:
    with dispatch.through(library.OPERATORS):
        return function(*args, **kwargs)


def rewrite(graph: fx.Graph) -> dict[str, int]:
    """Turn what is left in a post-grad graph; gives how many calls of each operator it has now."""
    register()
    table = _replaced()
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in table:
            _replace(graph, node, table[node.target])
    names = {op: str(op).removesuffix(".default") for op in library.PACKETS.values()}
    return dict(collections.Counter(names[n.target] for n in graph.nodes if n.target in names))


def _replace(graph: fx.Graph, node: fx.Node, function: Operator) -> None:
    inputs = [n for n in node.all_input_nodes if facts.value(n) is not None]
    if len(inputs) != len(node.all_input_nodes):
        return
    made = torch_private.traced(
        lambda *values: _call(node, function, dict(zip(inputs, values, strict=True))),
        [facts.value(n) for n in inputs],
    )
    if made is None:
        return
    results = _copy(graph, node, made, inputs)
    users = [n for n in node.users if str(n.target) == "<built-in function getitem>"]
    if len(results) == 1 and not isinstance(facts.value(node), (tuple, list)):
        node.replace_all_uses_with(results[0])
    else:
        for user in users:
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            graph.erase_node(user)
    graph.erase_node(node)


def _call(node: fx.Node, function: Operator, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return _as_operators(function, *args, **kwargs)


def _copy(
    graph: fx.Graph, node: fx.Node, made: fx.GraphModule, inputs: list[fx.Node]
) -> list[fx.Node]:
    """The nodes of a traced replacement before a node; gives those of its results."""
    old = iter(inputs)
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for step in made.graph.nodes:
            if step.op == "placeholder":
                copies[step] = next(old)
            elif step.op == "output":
                results = step.args[0]
                several = results if isinstance(results, (tuple, list)) else [results]
                return [copies[result] for result in several]
            else:
                copies[step] = graph.node_copy(step, copies.__getitem__)
                facts.set_value(copies[step], facts.value(step), node)
    raise AssertionError("a traced graph has an output")


@functools.cache
def register() -> None:
    """Tell Inductor how to call our operators."""
    for name, op in library.PACKETS.items():
        torch_inductor.call_directly(op, name, library.calls)
