"""How many launches a norm takes and how many bytes they move, before and after. Counted.

Before: every node that computes something is one launch, which reads its inputs and writes its
result, as eager runs a graph; a compiler fuses some of them. After: the kernel is one launch, each
copy another. Kernels that are not one launch are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx

from fxpass import facts
from fxpass.layout import LayoutPlan
from fxpass.mutation import writes_to
from fxpass.sites import Site

_NOT_ONE_LAUNCH = ("reference.eager", "inductor.fused")
"""The first runs the steps one by one, the second is Inductor's code, fused with what surrounds."""


@dataclass(frozen=True)
class Traffic:
    """Launches, and the bytes they read and write; None where that is not known."""

    launches: int | None
    bytes: int | None


def before(site: Site) -> Traffic:
    """What the nodes of a norm do one by one. The graph must not be changed yet."""
    seen = dict.fromkeys(site.interior)
    seen.update(dict.fromkeys(read for node in site.interior for read in node.all_input_nodes))
    known = {node: found for node in seen if (found := facts.of(node)) is not None}
    sizes = {node: _bytes(found) for node, found in known.items()}
    memory = {node: facts.storage(node) for node in known}
    nodes = [node for node in site.interior if node in known and _computes(node, memory)]
    tensors = [each for node in nodes for each in (node, *node.all_input_nodes) if each in known]
    return Traffic(len(nodes), _sum(sizes[each] for each in tensors))


def after(site: Site, kernel: str, outputs: Iterable[str], layout: LayoutPlan) -> Traffic:
    """What the kernel and its copies do."""
    if kernel in _NOT_ONE_LAUNCH:
        return Traffic(None, None)
    nodes = {"out": site.out_nodes, "sum": site.sum_nodes, "row": site.row_nodes}
    tensors = [*site.inputs, *(nodes[name][0] for name in outputs)]
    copies = [node.bytes for node in layout.nodes if not facts.same(node.bytes, 0)]
    moved = [
        *map(_bytes, map(facts.of, tensors)),
        *map(facts.static, copies),
        *map(facts.static, copies),
    ]
    return Traffic(1 + len(copies), _sum(moved))


def _computes(node: fx.Node, memory: Mapping[fx.Node, int | None]) -> bool:
    """False for views, which share the memory of what they read."""
    own = memory[node]
    shared = own is not None and own in [memory.get(read) for read in node.all_input_nodes]
    return not shared or bool(writes_to(node))


def _bytes(found: facts.TensorFacts | None) -> int | None:
    """Size of a tensor in memory, where a broadcast dimension is there once."""
    if found is None or not all(isinstance(n, int) for n in (*found.shape, *found.stride)):
        return None
    sizes = [n for n, step in zip(found.shape, found.stride, strict=True) if step != 0]
    return int(math.prod(sizes) * found.dtype.itemsize)


def _sum(parts: Iterable[int | None]) -> int | None:
    """The sum, if all parts are known."""
    listed = list(parts)
    return None if None in listed else sum(part for part in listed if part is not None)
