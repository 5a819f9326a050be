"""Whether the copies a kernel needs cost more memory traffic than the kernel saves.

Counted per row, so that the answer is the same for every batch. Left to Inductor, a norm needs no
copy: its code reads any strides. It reads x once where a row fits into registers, and a second
time where it does not; that second reading is all a kernel of its own can save.
"""

from __future__ import annotations

from collections.abc import Container

from torch import fx

from fxpass import facts, fusable
from fxpass.layout import LayoutNode, LayoutPlan
from fxpass.sites import Site

_HELD = 1024
"""Longest row that Inductor keeps in registers while it adds up the squares."""


def refusal(site: Site, plan: LayoutPlan, taken: Container[fx.Node]) -> str | None:
    """Both numbers in words if the copies cost more, or None."""
    hidden = facts.static(site.hidden)
    if hidden is None:
        return None
    cost = sum(_bytes(node, site, hidden, taken) for node in plan.nodes)
    saved = sum(_width(node) for node in _rows(site)) * hidden if hidden > _HELD else 0
    return f"copies {cost} bytes a row, saves {saved}" if cost > saved else None


def _rows(site: Site) -> list[fx.Node]:
    return [node for node in (site.x, site.residual) if node is not None]


def _bytes(step: LayoutNode, site: Site, hidden: int, taken: Container[fx.Node]) -> int:
    """What one layout node reads and writes for a row. Weights are copied once, not per row."""
    nodes = {"x": site.x, "residual": site.residual, "out": site.anchor}
    node = nodes.get(step.role) or (site.sum_nodes[0] if step.role == "sum" else None)
    if step.kind not in ("contiguous", "restride") or node is None:
        return 0
    if step.role == "x" and fusable.maker(site, taken) is not None:
        return 0  # the compiler writes x in that order to begin with
    return 2 * hidden * _width(node)


def _width(node: fx.Node) -> int:
    found = facts.of(node)
    assert found is not None
    return found.dtype.itemsize
