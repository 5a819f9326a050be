"""The first node that makes a row differ in compiled code, by compiling beginnings of the graph."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpass import facts, torch_private, torch_watch
from fxpass.invariant import source, trace
from fxpass.invariant.compare import Difference
from fxpass.invariant.mode import batch_invariant_mode
from fxpass.invariant.prove import Case, Model
from fxpass.invariant.prove_eager import Culprit

Compile = Callable[[Callable[..., Any], "bool | None"], Callable[..., Any]]
"""Compiles a model as the user would; the flag is torch.compile's `dynamic`."""
Call = tuple[fx.GraphModule, list[Any], list[Any]]


class _Reached(Exception):  # noqa: N818 - control flow
    """The interpreter is where it was to go."""


@dataclass(frozen=True)
class _Pair:
    """One of Dynamo's graphs with its inputs for a row alone and for a batch."""

    alone: fx.GraphModule
    alone_inputs: list[Any]
    batch: fx.GraphModule
    batch_inputs: list[Any]
    count: int
    position: int

    def nodes(self) -> list[str]:
        """Names of the nodes that compute something, in order."""
        return [n.name for n in self.batch.graph.nodes if n.op.startswith("call_")]


def first(model: Model, compile_: Compile, dynamic: bool | None, case: Case) -> Culprit | str:
    """The first node at which the compiled beginning of a graph differs, or why there is none.

    A beginning returns every value that later nodes use, so one that differs is found by halving.
    """
    assert case.failing is not None
    row = case.failing.indices[case.position]
    alone, batch = (_calls(model, chosen, dynamic) for chosen in ([row], case.failing.indices))
    if not alone and not batch:
        return "torch.compile makes no graph of it, so all of it is eager code"
    if len(alone) != len(batch):
        return "the two calls run different numbers of graphs"
    for (one, given, _), (many, inputs, _) in zip(alone, batch, strict=True):
        pair = _Pair(one, given, many, inputs, len(case.failing.indices), case.position)
        if pair.nodes() != [n.name for n in one.graph.nodes if n.op.startswith("call_")]:
            return "the two calls run different graphs"
        if len(trace.tensors(given)) != len(trace.tensors(inputs)):
            return "the two calls run graphs with different inputs"
        if _differences(pair, given, inputs):
            return "the inputs of a graph after a graph break differ already"
        found = _halved(pair, compile_, case) if pair.nodes() else None
        if found is not None:
            return found
    return "each graph compiled by itself gives equal rows"


def _calls(model: Model, indices: Sequence[int], dynamic: bool | None) -> list[Call]:
    calls: list[Call] = []

    def record(*args: Any, **kwargs: Any) -> list[Any]:
        calls.extend(torch_watch.dynamo_calls(model.model, args, kwargs, dynamic))
        return []

    with batch_invariant_mode():  # so that later graphs start with equal rows
        model.run(record, indices)
    return calls


def _halved(pair: _Pair, compile_: Compile, case: Case) -> Culprit | None:
    names = pair.nodes()
    good, bad = -1, len(names) - 1
    worst = _differing(pair, compile_, names[bad])
    if worst is None:
        return None
    while bad - good > 1:
        middle = (good + bad) // 2
        found = _differing(pair, compile_, names[middle])
        if found is None:
            good = middle
        else:
            bad, worst = middle, found
    return _culprit(pair, names[bad], worst, case)


def _differing(pair: _Pair, compile_: Compile, last: str) -> Difference | None:
    """Of the first result that differs, if one does, of the graph up to a node."""
    return next(iter(_differences(pair, *_results(pair, compile_, last))), None)


def _results(pair: _Pair, compile_: Compile, last: str) -> tuple[list[Any], list[Any]]:
    made = []
    for graph, inputs in ((pair.alone, pair.alone_inputs), (pair.batch, pair.batch_inputs)):
        torch.compiler.reset()  # or sizes seen before decide what is dynamic
        symbolic = any(isinstance(value, int) for value in inputs)
        run = compile_(beginning(graph, last), symbolic)
        with torch.no_grad():
            made.append(torch_private.leaves(run(*_copies(inputs))))
    return made[0], made[1]


def _differences(pair: _Pair, one: Sequence[Any], many: Sequence[Any]) -> list[Difference]:
    """Of the tensors whose rows differ."""
    found = [
        trace.against(expected, made, pair.count, pair.position)
        for expected, made in zip(trace.tensors(one), trace.tensors(many), strict=True)
    ]
    return [d for d in found if d is not None and d.place is not None and d.rows]


def beginning(graph_module: fx.GraphModule, last: str) -> fx.GraphModule:
    """The graph up to a node; its results are that node and all that later nodes use."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    shown: list[fx.Node] = []
    nodes = list(graph_module.graph.nodes)
    cut = next(index for index, node in enumerate(nodes) if node.name == last)
    for index, node in enumerate(nodes):
        if index <= cut or node.op == "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    later = set(nodes[cut + 1 :])
    for node in nodes[: cut + 1]:
        computed = node.op.startswith("call_") and _is_result(node)
        if computed and (node is nodes[cut] or later & set(node.users)):
            shown.append(copies[node])
    graph.output(tuple(shown))
    return fx.GraphModule(graph_module, graph)


def _is_result(node: fx.Node) -> bool:
    """Whether a node gives tensors, and not a size or the like."""
    found = facts.value(node)
    return any(isinstance(leaf, torch.Tensor) for leaf in torch_private.leaves(found))


def _copies(inputs: Sequence[Any]) -> list[Any]:
    return [
        v.clone() if isinstance(v, torch.Tensor) and not isinstance(v, torch.nn.Parameter) else v
        for v in inputs
    ]


def _culprit(pair: _Pair, name: str, worst: Difference, case: Case) -> Culprit:
    node = next(n for n in pair.batch.graph.nodes if n.name == name)
    inputs, results, opened = _seen(pair, node)
    culprit = Culprit(
        case.kind,
        case.rows,
        _shown(node),
        inputs,
        results,
        facts.location(node),
        facts.source_line(node),
        "",
        worst.elements,
        worst.total,
        worst.largest,
    )
    if opened and opened != [culprit.node]:
        culprit.notes.append(f"in ATen: {', '.join(opened)}")
    return culprit


def _shown(node: fx.Node) -> str:
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if getattr(node.target, "__module__", "") == operator.__name__ or not callable(node.target):
        return str(getattr(node.target, "__name__", node.target))
    return source.name_of(node.target)


def _seen(pair: _Pair, node: fx.Node) -> tuple[list[str], list[str], list[str]]:
    """A node's inputs, results and ATen operators, from running the graph up to it once more."""
    names: list[str] = []
    inputs: list[str] = []
    results: list[str] = []

    class Until(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n is not node:
                return super().run_node(n)
            inputs.extend(source.kinds(self.fetch_args_kwargs_from_env(n)))
            with torch_watch.watching(lambda op, *_: names.append(source.name_of(op))):
                results.extend(source.kinds(super().run_node(n)))
            raise _Reached

    with torch.no_grad(), contextlib.suppress(_Reached):
        Until(pair.batch).run(*_copies(pair.batch_inputs))
    return inputs, results, list(dict.fromkeys(names))
