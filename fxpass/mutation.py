"""In-place writes and switches of grad mode: which nodes do it, and whether a norm spans one."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxpass import facts
from fxpass.errors import Declined
from fxpass.sites import Site
from fxpass.torch_private import GRAD_SWITCHES, runs_graphs, schemas

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
        # In evaluation these return their input.
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
        torch.dropout, torch.alpha_dropout, torch.ops.aten.dropout.default,
        torch.ops.aten.alpha_dropout.default, torch.ops.aten.feature_dropout.default,
    )
)  # fmt: skip
"""Targets whose result may share its inputs' memory, where no schema says so."""

_INPLACE_FUNCTIONS = frozenset(
    (
        operator.iadd, operator.imul, operator.isub, operator.itruediv, operator.ifloordiv,
        operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
        operator.ilshift, operator.irshift, operator.setitem,
    )
)  # fmt: skip
_INPLACE_METHODS = frozenset(f"__{function.__name__}__" for function in _INPLACE_FUNCTIONS)


@dataclass(frozen=True)
class Effects:
    """Writing nodes in graph order, each with the root of the memory it writes."""

    writes: tuple[tuple[fx.Node, frozenset[fx.Node]], ...]
    roots: dict[fx.Node, frozenset[fx.Node]]
    switches: tuple[fx.Node, ...]
    """Nodes that turn autograd on or off, in graph order."""

    def memory(self, nodes: Iterable[fx.Node]) -> frozenset[fx.Node]:
        """The roots of the memory of several nodes."""
        return frozenset[fx.Node]().union(*(self.roots[node] for node in nodes))

    def overwritten(self) -> frozenset[fx.Node]:
        """The nodes that share memory with one that is written to."""
        written = frozenset[fx.Node]().union(*(memory for _, memory in self.writes))
        return frozenset(node for node, memory in self.roots.items() if memory & written)


def effects(graph: fx.Graph) -> Effects:
    """The effects in a graph. ATen graphs after functionalisation have next to none."""
    switches = tuple(n for n in graph.nodes if n.target in GRAD_SWITCHES)
    if not _writes(graph):
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
        known = node.target in VIEWS or node.target in _INPLACE_FUNCTIONS
        shares = known or _schema_alias(node.target) or _is_opaque(node.target)
    return list(node.all_input_nodes) if shares else []


def writes_to(node: fx.Node) -> list[fx.Node]:
    """Inputs the node writes to."""
    first = [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    if node.op == "call_method" and isinstance(node.target, str):
        return first if _ends_inplace(node.target) or node.target in _INPLACE_METHODS else []
    if node.op == "call_module":
        return list(node.all_input_nodes) if _module_writes(node) else []
    if node.op != "call_function":
        return []
    if node.target in _INPLACE_FUNCTIONS:
        return first
    return _in(node.kwargs.get("out")) + _schema_written(node) + _called(node, first)


def _module_writes(node: fx.Node) -> bool:
    """True for modules such as `nn.ReLU(inplace=True)`, and those that are not torch's own."""
    owner = node.graph.owning_module
    if owner is None:
        return False
    called = owner.get_submodule(str(node.target))
    return any(
        getattr(module, "inplace", False) or _is_foreign(type(module))
        for module in called.modules()
    )


def _is_opaque(target: Any) -> bool:
    return inspect.isfunction(target) and _is_foreign(target)


def _is_foreign(code: Any) -> bool:
    """Code that is not torch's, and may do anything with a tensor."""
    return str(code.__module__).partition(".")[0] not in _KNOWN


_KNOWN = ("torch", "fxpass", "_operator", "builtins", "math", "einops")


def _called(node: fx.Node, first: list[fx.Node]) -> list[fx.Node]:
    """Torch functions named like `torch.relu_`, `torch._foreach_mul_`; those that are told to."""
    if runs_graphs(node.target):
        writes = str(node.target) == _LAUNCH or any(map(_writes_inputs, _bodies(node)))
        return list(node.all_input_nodes) if writes else []
    if node.target in _STATISTICS:
        return [source for source in node.all_input_nodes if source not in first]
    if hasattr(node.target, "_schema"):
        return []
    plain = _ends_inplace(getattr(node.target, "__name__", ""))
    if plain and not first:
        return list(node.all_input_nodes)  # a list of tensors comes first
    if plain or _argument(node, "inplace") is True:
        return first
    if node.target in _TABLES and _argument(node, "max_norm") is not None:
        return _in(_argument(node, "weight"))
    if _is_opaque(node.target):
        return list(node.all_input_nodes)
    return []


def _ends_inplace(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


_LAUNCH = "triton_kernel_wrapper_mutation"
_TABLES = (F.embedding, F.embedding_bag)
_STATISTICS = (
    F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm, torch.native_batch_norm,
    torch.ops.aten.native_batch_norm.default, torch.ops.aten.batch_norm.default,
    torch.ops.aten.instance_norm.default,
)  # fmt: skip
"""They write the running mean and variance, two of the tensors after the first."""


def _argument(node: fx.Node, name: str) -> Any:
    """An argument of a Python function by its name, wherever it stands; None without one."""
    if name in node.kwargs:
        return node.kwargs[name]
    place = _places(node.target).get(name, len(node.args))
    return node.args[place] if place < len(node.args) else None


@functools.cache
def _places(target: Any) -> dict[str, int]:
    if not inspect.isfunction(target):
        return {}
    return {name: place for place, name in enumerate(inspect.signature(target).parameters)}


def _in(value: Any) -> list[fx.Node]:
    """The nodes in an argument."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return [item for item in values if isinstance(item, fx.Node)]


def _bodies(node: fx.Node) -> list[fx.Graph]:
    """The graphs that a higher-order operator runs."""
    owner = node.graph.owning_module
    if owner is None:
        return []
    named = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
    found = [getattr(owner, name, None) for name in named]
    return [one.graph for one in found if isinstance(one, fx.GraphModule)]


def _writes(graph: fx.Graph) -> bool:
    return any(map(writes_to, graph.nodes))


def _writes_inputs(graph: fx.Graph) -> bool:
    """Whether a body writes to more than what it makes itself."""
    written = (root for _, memory in effects(graph).writes for root in memory)
    return any(root.op in ("placeholder", "get_attr") for root in written)


def _schema_written(node: fx.Node) -> list[fx.Node]:
    written = []
    for index, name in _written_arguments(node.target):
        written += _in(node.args[index] if index < len(node.args) else node.kwargs.get(name))
    return written


@functools.cache
def _written_arguments(target: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (index, argument.name)
        for schema in schemas(target)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@functools.cache
def _schema_alias(target: Any) -> bool:
    returned = (result for schema in schemas(target) for result in schema.returns)
    return any(result.alias_info is not None for result in returned)


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
    read = found.memory((*site.inputs, *site.interior))
    # Our gradient reads all inputs again; the model's may read copies.
    tracked = any(map(facts.requires_grad, site.inputs))
    kept = found.memory(site.inputs if tracked else ())
    for writer, memory in found.writes:
        if writer in inside or (start < order[writer] < end and memory & read):
            raise Declined(
                f"%{writer.name} writes in place to a tensor the norm reads", writer.name
            )
        if order[writer] >= end and memory & kept:
            raise Declined(
                f"%{writer.name} writes in place to what backward would read", writer.name
            )


def _check_gradients(site: Site, found: Effects, order: dict[fx.Node, int]) -> None:
    if site.eps_node is not None and facts.requires_grad(site.eps_node):
        raise Declined("eps needs a gradient, which the kernel does not give", site.eps_node.name)
    if not found.switches or not any(map(facts.requires_grad, site.inputs)):
        return
    # The kernel is put right after the inputs.
    start = min(max(order[node] for node in site.inputs), *(order[n] for n in site.interior))
    end = max(order[node] for node in site.out_nodes)
    for node in found.switches:
        if start < order[node] < end:
            raise Declined(f"%{node.name} switches grad mode inside the norm", node.name)
