"""Applies plans to a graph. The only module that changes one.

First every new node is added, which may fail and is then undone without a trace. Only when all of
them exist and compute what eager computes (shape, dtype, strides) are the old nodes replaced.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxpass import facts, ops, verify
from fxpass.layout import LayoutNode
from fxpass.plan import Plan
from fxpass.sites import Site
from fxpass.torch_private import run_fake
from fxpass.uses import is_passive

aten = torch.ops.aten


@dataclass(frozen=True)
class Applied:
    """What was added and removed, and which plans would have changed a tensor and were dropped."""

    added: int
    removed: int
    dropped: tuple[tuple[Plan, verify.VerifyError], ...]
    made: Mapping[Plan, tuple[fx.Node, ...]]
    """The nodes each plan added; a layout node that sites share is with the first of them."""


def apply(graph: fx.Graph, plans: Iterable[Plan]) -> Applied:
    """Rewrite the planned sites. If anything fails the graph is left as it was."""
    editor = _Editor(graph)
    dropped = []
    made: dict[Plan, tuple[fx.Node, ...]] = {}
    try:
        for plan in plans:
            count = len(editor.new)
            try:
                editor.add(plan)
                made[plan] = tuple(editor.new[count:])
            except verify.VerifyError as error:
                editor.undo(count)
                dropped.append((plan, error))
    except Exception:
        editor.undo(0)
        raise
    removed = editor.commit()
    return Applied(len(editor.new), removed, tuple(dropped), made)


class _Editor:
    """Adds nodes next to the old ones, then swaps."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.new: list[fx.Node] = []
        self.shared: dict[tuple[Any, ...], fx.Node] = {}
        """Layout nodes by (source, kind, arguments): sites with the same source share them."""
        self._replacements: dict[fx.Node, fx.Node] = {}
        self._interior: list[fx.Node] = []
        self._site: Site
        self._last_input = [n for n in graph.nodes if n.op == "placeholder"][-1:]
        """New nodes stay behind it; AOTInductor's graphs have the weights before the inputs."""
        self._first = self._last_input[0].next if self._last_input else next(iter(graph.nodes))

    def add(self, plan: Plan) -> None:
        """Add the nodes of one plan and note what they replace."""
        site = self._site = plan.site
        tensors: dict[str, fx.Node | None] = {
            "x": self._resolved(site.x),
            "residual": self._resolved(site.residual),
            "weight": self._resolved(site.weight),
            "bias": self._resolved(site.bias),
        }
        for role, chain in plan.layout.before.items():
            tensors[role] = self._chain(tensors[role], chain, site.anchor)
        results = self._kernel(plan, tensors)
        replaced: dict[fx.Node, fx.Node] = {}
        for role, chain in plan.layout.after.items():
            result = self._chain(results[role], chain, site.anchor)
            assert result is not None
            old = {"out": site.out_nodes, "sum": site.sum_nodes, "row": site.row_nodes}[role]
            for node in old:
                verify.same_tensor(node, result)
                replaced[node] = result
        self._replacements |= replaced
        self._interior += site.interior

    def _resolved(self, node: fx.Node | None) -> fx.Node | None:
        """The node, or what an earlier site puts in its place."""
        return None if node is None else self._replacements.get(node, node)

    def _kernel(self, plan: Plan, tensors: dict[str, fx.Node | None]) -> dict[str, fx.Node]:
        site, choice = plan.site, plan.choice
        assert choice.kernel is not None
        eps_node = self._resolved(site.eps_node)
        args = (
            tensors["x"], tensors["residual"], tensors["weight"], tensors["bias"],
            eps_node, site.eps, choice.kernel.name, str(choice.spec),
        )  # fmt: skip
        node = self._call(ops.op_for(choice.spec.outputs), args, site.anchor)
        if len(choice.spec.outputs) == 1:
            return {"out": node}
        return {
            name: self._call(operator.getitem, (node, index), site.anchor)
            for index, name in enumerate(choice.spec.outputs)
        }

    def _chain(
        self, node: fx.Node | None, chain: Iterable[LayoutNode], like: fx.Node
    ) -> fx.Node | None:
        for step in chain:
            assert node is not None
            key = (node, step.kind, step.dims, tuple(map(str, step.shape)))
            if key not in self.shared:
                self.shared[key] = self._layout(node, step, like)
            node = self.shared[key]
        return node

    def _layout(self, node: fx.Node, step: LayoutNode, like: fx.Node) -> fx.Node:
        if step.kind == "permute":
            return self._call(aten.permute.default, (node, list(step.dims)), like)
        if step.kind == "contiguous":
            return self._copy(node, like)
        if step.kind == "restride":
            back = sorted(range(len(step.dims)), key=step.dims.__getitem__)
            inner = self._call(aten.permute.default, (node, list(step.dims)), like)
            return self._call(aten.permute.default, (self._copy(inner, like), back), like)
        found = facts.of(node)
        assert found is not None
        shape = found.shape
        if step.kind == "rows":
            target: list[Any] = [-1, self._size(node, len(shape) - 1, like)]
        elif step.kind == "flatten":
            kept = len(shape) - step.dims[0]
            hidden = facts.static(facts.numel(shape[kept:]))  # -1 is no size of nothing
            target = [self._size(node, dim, like) for dim in range(kept)]
            target.append(-1 if hidden is None else hidden)
        else:
            target = self._known_sizes(step.shape, like)
        return self._call(aten.reshape.default, (node, target), like)

    def _copy(self, node: fx.Node, like: fx.Node) -> fx.Node:
        contiguous = {"memory_format": torch.contiguous_format}
        return self._call(aten.clone.default, (node,), like, contiguous)

    def _size(self, node: fx.Node, dim: int, like: fx.Node) -> Any:
        found = facts.of(node)
        assert found is not None
        size = found.shape[dim]
        return size if isinstance(size, int) else self._sym_size(node, dim, like)

    def _known_sizes(self, shape: tuple[facts.Size, ...], like: fx.Node) -> list[Any]:
        """The sizes of a reshape; one that no value has (a product, say) is left to reshape."""
        known = [self._known_size(size, like) for size in shape]
        if known.count(None) > 1:
            raise RuntimeError(f"no values of the graph have the sizes {list(shape)}")
        return [-1 if size is None else size for size in known]

    def _known_size(self, size: facts.Size, like: fx.Node) -> Any:
        """A size of the old result: a number, or read off a value that outlives the rewrite."""
        if isinstance(size, int):
            return size
        for node in self._lasting(like):
            known = facts.value(node)
            if isinstance(known, torch.SymInt) and facts.same(known, size):
                return node
            found = facts.of(node)
            for dim, other in enumerate(found.shape if found else ()):
                if facts.same(size, other):
                    return self._sym_size(node, dim, like)
        return None

    def _lasting(self, like: fx.Node) -> Iterator[fx.Node]:
        """The site's inputs, then whatever stands before it and is not taken over."""
        yield from (node for node in map(self._resolved, self._site.inputs) if node is not None)
        inside = {*self._interior, *self._site.interior}
        for node in self.graph.nodes:
            if node is like:
                return
            if node not in inside:
                yield node

    def _sym_size(self, node: fx.Node, dim: int, like: fx.Node) -> fx.Node:
        key = (node, "size", (dim,), ())
        if key not in self.shared:
            self.shared[key] = self._call(aten.sym_size.int, (node, dim), like)
        return self.shared[key]

    def _call(
        self,
        target: Any,
        args: tuple[Any, ...],
        like: fx.Node,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """Add a call right after its latest input, with its fake value."""
        inputs = [arg for arg in _flat(args) if isinstance(arg, fx.Node)]
        with self._after(inputs):
            node = self.graph.call_function(target, args, kwargs or {})
        self.new.append(node)
        fakes = [facts.value(arg) if isinstance(arg, fx.Node) else arg for arg in args]
        value = run_fake(target, _fake_list(fakes), kwargs or {})
        facts.set_value(node, value, like)
        return node

    def _after(self, inputs: list[fx.Node]) -> AbstractContextManager[None]:
        latest = max([*inputs, *self._last_input], default=None)
        if latest is None or latest in self._last_input:
            place = self.graph.inserting_before(self._first)
        else:
            place = self.graph.inserting_after(latest)
        return cast("AbstractContextManager[None]", place)

    def undo(self, count: int) -> None:
        """Take back every added node but the first `count`."""
        gone = set(self.new[count:])
        for node in reversed(self.new[count:]):
            self.graph.erase_node(node)
        del self.new[count:]
        self.shared = {key: node for key, node in self.shared.items() if node not in gone}

    def commit(self) -> int:
        """Put the new values in place and erase what has no reader left."""
        for old, new in self._replacements.items():
            old.replace_all_uses_with(new, delete_user_cb=lambda user: not is_passive(user))
        interior = dict.fromkeys(self._interior)
        for node in list(interior):
            interior.update(dict.fromkeys(filter(_is_cast, node.all_input_nodes)))
        removed = 0
        for node in sorted(interior, reverse=True):
            for user in [user for user in node.users if is_passive(user)]:
                self.graph.erase_node(user)
                removed += 1
            if not node.users:
                self.graph.erase_node(node)
                removed += 1
        return removed


def _is_cast(node: fx.Node) -> bool:
    """Casts that matching looked through: they go with their last reader."""
    return node.target in ("float", "to", torch.ops.prims.convert_element_type.default)


def _flat(args: Iterable[Any]) -> Iterable[Any]:
    for arg in args:
        if isinstance(arg, (list, tuple)):
            yield from _flat(arg)
        else:
            yield arg


def _fake_list(values: list[Any]) -> list[Any]:
    """Sizes given as nodes, replaced by their values."""
    return [
        [facts.value(v) if isinstance(v, fx.Node) else v for v in value]
        if isinstance(value, list)
        else value
        for value in values
    ]
