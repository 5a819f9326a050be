"""Stable text of a graph: one line per node, short names, nothing that follows the torch version.

%mul: bf16[2,8,64] = mul(%w, %cast)
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx

from fxpass import facts, ops
from fxpass.dtypes import SHORT_NAMES, short

_CAST = "prims.convert_element_type"


def text(graph: fx.Graph) -> str:
    """The graph, with nodes renamed in order of appearance after what they compute."""
    names = _names(graph)
    return "\n".join(_line(node, names) for node in graph.nodes)


def lines(graph: fx.Graph) -> dict[fx.Node, str]:
    """One line per node, under the names that the graph, and so the report, has for them."""
    names = {node: f"%{node.name}" for node in graph.nodes}
    return {node: _line(node, names) for node in graph.nodes}


def label(node: fx.Node, is_input: bool = False) -> str:
    """What a picture writes into a node's box: what is computed, and the kind of the result."""
    if is_input or node.op == "placeholder":
        return f"%{node.name}\n{_kind(node)}"
    if ops.is_ours(node.target):
        return f"{node.args[-2]}\n{_kind(node)}"
    numbers = [f"{arg:.6g}" for arg in node.args[1:] if type(arg) in (int, float)]
    shown = _target(node) + (f" {', '.join(numbers)}" if numbers else "")
    return f"{shown}\n{_kind(node)}"


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    counts: dict[str, int] = {}
    names = {}
    for node in graph.nodes:
        word = "input" if node.op == "placeholder" else _target(node).rpartition(".")[2]
        word = re.sub(r"\W+", "_", word).strip("_") or "value"
        counts[word] = counts.get(word, 0) + 1
        names[node] = f"%{word}{counts[word] if counts[word] > 1 else ''}"
    return names


def _line(node: fx.Node, names: dict[fx.Node, str]) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0], names)}"
    left = f"{names[node]}: {_kind(node)}"
    if node.op == "placeholder":
        return f"{left} = input"
    if node.op == "get_attr":
        return f"{left} = self.{node.target}"
    if ops.is_ours(node.target):
        return f"{left} = {_norm(node, names)}"
    shown = [_value(arg, names) for arg in node.args]
    shown += [f"{key}={_value(arg, names)}" for key, arg in sorted(node.kwargs.items())]
    return f"{left} = {_target(node)}({', '.join(shown)})"


def _norm(node: fx.Node, names: dict[fx.Node, str]) -> str:
    """A kernel call: its tensors by role, then the meaning, then who computes it."""
    *tensors, eps, kernel, spec = node.args
    roles = ("x", "residual", "weight", "bias", "eps")
    given = [
        f"{r}={_value(t, names)}" for r, t in zip(roles, tensors, strict=True) if t is not None
    ]
    if tensors[-1] is None:
        given.append(f"eps={eps}")
    return f"norm({', '.join(given)})\n    {spec}\n    @ {kernel}"


def _target(node: fx.Node) -> str:
    """`mul` for an operator of any level; a namespace only where it is not ATen."""
    if node.op in ("call_method", "call_module"):
        return f".{node.target}" if node.op == "call_method" else str(node.target)
    if hasattr(node.target, "overloadpacket"):
        packet = str(node.target.overloadpacket)
        return "cast" if packet == _CAST else packet.removeprefix("aten.")
    return str(getattr(node.target, "__name__", node.target))


def _kind(node: fx.Node) -> str:
    """`bf16[2,8,64]`, with the strides if they are not those of a contiguous tensor."""
    found = facts.of(node)
    if found is None:
        return type(facts.value(node)).__name__
    sizes = ",".join(map(str, found.shape))
    from fxpass.layout import is_contiguous

    strides = "" if is_contiguous(found.shape, found.stride) else _strides(found)
    return f"{short(found.dtype)}[{sizes}]{strides}"


def _strides(found: facts.TensorFacts) -> str:
    return f" strides {','.join(map(str, found.stride))}"


def _value(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_value(item, names) for item in value)
        return f"[{inside}]"
    if isinstance(value, torch.dtype):
        return SHORT_NAMES.get(value, str(value))
    return str(value)
