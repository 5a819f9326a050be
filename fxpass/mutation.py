"""In-place writes and switches of grad mode: which nodes do it, and whether a norm spans one."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from fxpass import facts
from fxpass.errors import Declined
from fxpass.sites import Site
from fxpass.torch_private import GRAD_SWITCHES

VIEWS = frozenset(
    (
        "view", "view_as", "reshape", "reshape_as", "unsqueeze", "squeeze", "flatten", "unflatten",
        "transpose", "permute", "t", "mT", "T", "expand", "expand_as", "contiguous", "to", "float",
        "half", "bfloat16", "type", "type_as", "narrow", "select", "chunk", "split", "unbind",
        "detach", "swapaxes", "movedim", "diagonal", "unfold", "as_strided", "alias", "squeeze_",
        "__getitem__", "getattr",
        torch.unsqueeze, torch.squeeze, torch.reshape, torch.flatten, torch.unflatten,
        torch.transpose, torch.permute, torch.chunk, torch.split, torch.unbind, torch.narrow,
        torch.select, torch.swapaxes, torch.movedim, torch.t, operator.getitem, getattr,
    )
)  # fmt: skip
"""Targets outside ATen whose result may share its inputs' memory (ATen's say so themselves)."""

_INPLACE_FUNCTIONS = frozenset(
    (
        operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.ipow,
        operator.setitem,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Effects:
    """Writing nodes in graph order, each with the root of the memory it writes."""

    writes: tuple[tuple[fx.Node, frozenset[fx.Node]], ...]
    roots: dict[fx.Node, frozenset[fx.Node]]
    switches: tuple[fx.Node, ...]
    """Nodes that turn autograd on or off, in graph order."""


def effects(graph: fx.Graph) -> Effects:
    """The effects in a graph. ATen graphs after functionalisation have next to none."""
    switches = tuple(n for n in graph.nodes if n.target in GRAD_SWITCHES)
    if not any(map(writes_to, graph.nodes)):
        return Effects((), {}, switches)
    roots: dict[fx.Node, frozenset[fx.Node]] = {}
    sharing: dict[int, frozenset[fx.Node]] = {}
    writes = []
    for node in graph.nodes:
        memory = facts.storage(node)
        shared = frozenset() if memory is None else sharing.get(memory, frozenset())
        roots[node] = shared.union({node}, *(roots[source] for source in _aliased(node)))
        if memory is not None:
            sharing[memory] = roots[node]
        written = writes_to(node)
        if written:
            writes.append((node, frozenset().union(*(roots[target] for target in written))))
    return Effects(tuple(writes), roots, switches)


def _aliased(node: fx.Node) -> list[fx.Node]:
    """Inputs whose memory the node's result may share."""
    if node.op == "call_module":
        shares = True
    elif node.op == "call_method":
        shares = node.target in VIEWS or str(node.target).endswith("_")
    else:
        shares = node.target in VIEWS or node.target in _INPLACE_FUNCTIONS or _schema_alias(node)
    return list(node.all_input_nodes) if shares else []


def writes_to(node: fx.Node) -> list[fx.Node]:
    """Inputs the node writes to."""
    first = [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    if node.op == "call_method" and isinstance(node.target, str):
        name = node.target
        inplace = name.endswith("_") and not name.endswith("__")
        return first if inplace or name in ("__iadd__", "__imul__", "__setitem__") else []
    if node.op == "call_module":
        return first if _module_writes(node) else []
    if node.op != "call_function":
        return []
    if node.target in _INPLACE_FUNCTIONS:
        return first
    out = node.kwargs.get("out")
    written = [out] if isinstance(out, fx.Node) else []
    return written + _schema_written(node) + _named_inplace(node, first)


def _module_writes(node: fx.Node) -> bool:
    """True for modules such as `nn.ReLU(inplace=True)`."""
    owner = node.graph.owning_module
    if owner is None:
        return False
    called = owner.get_submodule(str(node.target))
    return any(getattr(module, "inplace", False) for module in called.modules())


def _named_inplace(node: fx.Node, first: list[fx.Node]) -> list[fx.Node]:
    """Torch functions named like `torch.relu_`, `torch._foreach_mul_`; and `inplace=True`."""
    name = getattr(node.target, "__name__", "")
    plain = name.endswith("_") and not name.endswith("__") and not hasattr(node.target, "_schema")
    if plain and not first:
        return list(node.all_input_nodes)  # a list of tensors comes first
    return first if plain or node.kwargs.get("inplace") is True else []


def _schema_written(node: fx.Node) -> list[fx.Node]:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    written = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            values = value if isinstance(value, (list, tuple)) else [value]
            written += [item for item in values if isinstance(item, fx.Node)]
    return written


def _schema_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(result.alias_info is not None for result in schema.returns)


def check(site: Site, found: Effects, order: dict[fx.Node, int]) -> None:
    """Raises Declined if memory the norm reads is written while the norm is being computed.

    Or if part of it is hidden from autograd, which the kernel would not be.
    """
    _check_gradients(site, found, order)
    if not found.writes:
        return
    inside = set(site.interior)
    # The kernel, and copies of its inputs, are put right after the inputs.
    start = min(order[node] for node in (*site.inputs, *inside))
    end = max(order[node] for node in site.out_nodes)
    read = frozenset().union(*(found.roots[node] for node in (*site.inputs, *site.interior)))
    for writer, memory in found.writes:
        if writer in inside or (start < order[writer] < end and memory & read):
            raise Declined(
                f"%{writer.name} writes in place to a tensor the norm reads", writer.name
            )


def _check_gradients(site: Site, found: Effects, order: dict[fx.Node, int]) -> None:
    if site.eps_node is not None and facts.requires_grad(site.eps_node):
        raise Declined("eps needs a gradient, which the kernel does not give", site.eps_node.name)
    if not found.switches or not any(map(facts.requires_grad, site.inputs)):
        return
    start = max(order[node] for node in site.inputs)
    end = max(order[node] for node in site.out_nodes)
    for node in found.switches:
        if start < order[node] < end:
            raise Declined(f"%{node.name} switches grad mode inside the norm", node.name)
