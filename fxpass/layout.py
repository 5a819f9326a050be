"""Which views and copies stand between the graph's tensors and what a kernel reads and writes.

A kernel writes contiguous rows. Eager's result may have another memory order (an elementwise
operator keeps its input's), so the input is first seen through the permutation that makes the
wanted result contiguous; that is free and usually makes the input's rows regular as well. Copies
are planned only where the kernel's contract cannot read the strides at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from fxpass import facts
from fxpass.facts import Size, TensorFacts
from fxpass.kernels import Layout
from fxpass.sites import Site


@dataclass(frozen=True)
class LayoutNode:
    """One node of data movement. `bytes` is what it copies; views copy nothing."""

    kind: str
    """`permute`, `contiguous`, `rows` (flatten to 2-D), `flatten` (join normalised dims),
    `shape` (back to a shape), `restride` (copy into another memory order)."""
    role: str
    """Which tensor: x, residual, out, sum or row."""
    dims: tuple[int, ...] = ()
    shape: tuple[Size, ...] = ()
    bytes: Size = 0

    def __str__(self) -> str:
        return f"{self.kind}({self.role})" + (f" {self.bytes} bytes" if self.bytes else "")


@dataclass(frozen=True)
class LayoutPlan:
    """The nodes before and after the kernel."""

    before: dict[str, tuple[LayoutNode, ...]]
    """By input role."""
    after: dict[str, tuple[LayoutNode, ...]]
    """By output role."""

    @property
    def nodes(self) -> tuple[LayoutNode, ...]:
        """All layout nodes."""
        return tuple(
            node for chains in (self.before, self.after) for c in chains.values() for node in c
        )


def uncopied(made: LayoutPlan) -> LayoutPlan:
    """The plan for code that a compiler generates: it reads any strides, and writes any.

    What brings a result into another memory order stays, for the order, but moves nothing: the
    compiler computes the result where the copy would have stored it.
    """

    def kept(chains: dict[str, tuple[LayoutNode, ...]]) -> dict[str, tuple[LayoutNode, ...]]:
        return {
            role: tuple(replace(node, bytes=0) for node in chain if node.kind != "contiguous")
            for role, chain in chains.items()
        }

    return LayoutPlan(kept(made.before), kept(made.after))


class LayoutError(Exception):
    """The kernel's layout cannot be reached."""


def plan(site: Site, needs: Layout) -> LayoutPlan:
    """Layout nodes for a site. Raises LayoutError, in words, if there are none that do."""
    out = facts.of(site.anchor)
    x = facts.of(site.x)
    if out is None or x is None:
        raise LayoutError("x or the result has no known strides")
    order, restride = _memory_order(site, x, out)
    if order is not None and _weight_repeats(site):
        raise LayoutError("a per-head weight with rows in another memory order")
    before = _input_chains(site, x, order, needs)
    for role, node in (("weight", site.weight), ("bias", site.bias)):
        if node is not None:
            before[role] = _factor_chain(role, node)
    after = {
        name: _output_chain(name, site, x, order, needs, restride) for name in site.spec.outputs
    }
    return LayoutPlan(before, after)


def _weight_repeats(site: Site) -> bool:
    weight = None if site.weight is None else facts.of(site.weight)
    return weight is not None and not facts.same(facts.numel(weight.shape), site.hidden)


def _memory_order(
    site: Site, x: TensorFacts, out: TensorFacts
) -> tuple[tuple[int, ...] | None, bool]:
    """(the permutation that makes the result contiguous or None, whether a copy must do it)."""
    if is_contiguous(out.shape, out.stride):
        return None, False
    if site.dims != 1 or not facts.same_shape(out.shape, x.shape):
        return None, True
    order = sorted(range(out.ndim), key=lambda dim: (-_rank(out, dim), dim))
    if order[-1] != out.ndim - 1:
        return None, True
    shape, stride = _permuted(out.shape, order), _permuted(out.stride, order)
    return (tuple(order), False) if is_contiguous(shape, stride) else (None, True)


def _rank(found: TensorFacts, dim: int) -> int:
    """The stride as a number to sort by; symbolic strides by their hint."""
    stride = found.stride[dim]
    return stride if isinstance(stride, int) else int(stride.node.hint or 0)


def _input_chains(
    site: Site, x: TensorFacts, order: tuple[int, ...] | None, needs: Layout
) -> dict[str, tuple[LayoutNode, ...]]:
    """The chains of x and the residual, which a kernel addresses with the same sizes."""
    seen = {"x": _seen(x, order)}
    if site.residual is not None:
        other = facts.of(site.residual)
        assert other is not None
        seen["residual"] = _seen(other, order)
    copied = {role for role, found in seen.items() if not _readable(found, site.dims, needs)}
    if not copied and len(seen) == 2 and needs.leading is not None:
        shape, strides = seen["x"].shape, [found.stride for found in seen.values()]
        if _row_strides(shape, strides) > needs.leading:
            copied.add("residual")  # without gaps it merges wherever x does
    return {
        role: _input_chain(role, found, site, order, needs, role in copied)
        for role, found in seen.items()
    }


def _seen(found: TensorFacts, order: tuple[int, ...] | None) -> TensorFacts:
    """The facts after the permutation to the result's memory order."""
    if order is None:
        return found
    shape, stride = _permuted(found.shape, list(order)), _permuted(found.stride, list(order))
    return TensorFacts(shape, found.dtype, stride, found.device)


def _input_chain(
    role: str,
    seen: TensorFacts,
    site: Site,
    order: tuple[int, ...] | None,
    needs: Layout,
    copied: bool,
) -> tuple[LayoutNode, ...]:
    chain: list[LayoutNode] = []
    if order is not None:
        chain.append(LayoutNode("permute", role, dims=order))
    if copied:
        size = facts.numel(seen.shape) * seen.dtype.itemsize
        chain.append(LayoutNode("contiguous", role, bytes=size))
    if site.dims > 1:
        chain.append(LayoutNode("flatten", role, dims=(site.dims,)))
    if needs.rank == 2 and (len(seen.shape) - site.dims + 1) != 2:
        chain.append(LayoutNode("rows", role))
    return tuple(chain)


def _factor_chain(role: str, node: fx.Node) -> tuple[LayoutNode, ...]:
    """Kernels read weights and biases contiguous."""
    found = facts.of(node)
    if found is None:
        raise LayoutError(f"{role} has no known strides")
    if is_contiguous(found.shape, found.stride):
        return ()
    size = facts.numel(found.shape) * found.dtype.itemsize
    return (LayoutNode("contiguous", role, bytes=size),)


def _output_chain(
    role: str,
    site: Site,
    x: TensorFacts,
    order: tuple[int, ...] | None,
    needs: Layout,
    restride: bool,
) -> tuple[LayoutNode, ...]:
    chain: list[LayoutNode] = []
    base = x.shape
    if role == "row":
        base = (*base[: len(base) - site.dims], *([1] * site.dims))
    shape = base if order is None else _permuted(base, list(order))
    flat = needs.rank == 2 and len(shape) != 2
    if flat or site.dims > 1:
        chain.append(LayoutNode("shape", role, shape=tuple(shape)))
    if order is not None:
        back = tuple(sorted(range(len(order)), key=order.__getitem__))
        chain.append(LayoutNode("permute", role, dims=back))
    target = {"out": site.out_nodes, "sum": site.sum_nodes, "row": site.row_nodes}[role]
    found = facts.of(target[0])
    if found is None:
        raise LayoutError(f"{role} has no known strides")
    if not facts.same_shape(found.shape, base):
        chain.append(LayoutNode("shape", role, shape=found.shape))
    if (restride and role == "out") or (role != "out" and not _same_memory(found, order)):
        chain.append(_restride(role, found))
    return tuple(chain)


def _same_memory(found: TensorFacts, order: tuple[int, ...] | None) -> bool:
    """True if the contiguous kernel output, permuted back, has the strides eager gives."""
    dims = list(order) if order is not None else list(range(found.ndim))
    if len(dims) != found.ndim:
        return is_contiguous(found.shape, found.stride)
    return is_contiguous(_permuted(found.shape, dims), _permuted(found.stride, dims))


def _restride(role: str, found: TensorFacts) -> LayoutNode:
    order = tuple(sorted(range(found.ndim), key=lambda dim: (-_rank(found, dim), dim)))
    size = facts.numel(found.shape) * found.dtype.itemsize
    return LayoutNode("restride", role, dims=order, bytes=size)


def _readable(found: TensorFacts, dims: int, needs: Layout) -> bool:
    """Whether the kernel can read these strides as they are (after free views)."""
    shape, stride = found.shape, found.stride
    rows = list(zip(shape[:-1], stride[:-1], strict=True))
    if is_contiguous(shape, stride):
        return True
    if needs.rows == "contiguous" or dims > 1:
        return False
    if not (facts.same(stride[-1], 1) or facts.same(shape[-1], 1)):
        return False
    if needs.rows == "any" and needs.rank is None:
        return needs.leading is None or _row_strides(shape, [stride]) <= needs.leading
    # A kernel that is told one row stride may take it for the distance of rows that lie apart.
    apart = all(facts.same(size, 1) or not _less(step, shape[-1]) for size, step in rows)
    return apart and _row_strides(shape, [stride]) <= 1


def _less(a: Size, b: Size) -> bool:
    """True if known to be less, without adding a guard."""
    return facts.same(a, 0) or (isinstance(a, int) and isinstance(b, int) and a < b)


def _row_strides(shape: tuple[Size, ...], strides: Sequence[tuple[Size, ...]]) -> int:
    """How many leading dims are left when those are joined that are one dim in every tensor."""
    merged: list[list[Size]] = []
    for dim, size in enumerate(shape[:-1]):
        if facts.same(size, 1):
            continue
        steps = [stride[dim] for stride in strides]
        if merged and all(map(facts.same, merged[-1], [step * size for step in steps])):
            merged[-1] = steps
        else:
            merged.append(steps)
    return len(merged)


def is_contiguous(shape: tuple[Size, ...], stride: tuple[Size, ...]) -> bool:
    """Row-major without gaps; strides of dims of size 1, or of nothing, do not count."""
    if any(facts.same(size, 0) for size in shape):
        return True
    expected: Size = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if facts.same(size, 1):
            continue
        if not facts.same(step, expected):
            return False
        expected = expected * size
    return True


def _permuted(values: tuple[Size, ...], order: list[int]) -> tuple[Size, ...]:
    return tuple(values[dim] for dim in order)
