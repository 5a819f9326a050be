"""A norm found in a graph, with its meaning and the nodes it touches. Nothing is changed yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from fxpass import facts
from fxpass.spec import NormSpec


@dataclass(frozen=True, eq=False)
class Site:
    """One norm to rewrite. Node lists are in graph order."""

    variant: str
    """`family.finish`, for example `rms_norm.cast_then_scale`."""
    spec: NormSpec
    x: fx.Node
    residual: fx.Node | None
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    eps_node: fx.Node | None
    """eps as a one-element tensor of the graph; `eps` is then not used."""
    dims: int
    """How many trailing dimensions are normalised."""
    hidden: facts.Size
    out_nodes: tuple[fx.Node, ...]
    sum_nodes: tuple[fx.Node, ...]
    row_nodes: tuple[fx.Node, ...]
    interior: tuple[fx.Node, ...]
    """All nodes the kernel takes over, outputs included."""
    location: str = "?"
    source: str = ""
    module: str = ""

    @property
    def anchor(self) -> fx.Node:
        """The node whose value the kernel's result replaces."""
        return self.out_nodes[0]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The graph values the kernel reads."""
        found = (self.x, self.residual, self.weight, self.bias, self.eps_node)
        return tuple(node for node in found if node is not None)


@dataclass(frozen=True)
class Decline:
    """A subgraph that looks like a norm and is not rewritten, with the first broken condition."""

    node: str
    reason: str
    location: str = "?"
    source: str = ""
    module: str = ""

    def __str__(self) -> str:
        place = f" ({self.location})" if self.location != "?" else ""
        return f"declined rms_norm at %{self.node}{place}: {self.reason}"


@dataclass(frozen=True)
class Found:
    """What matching makes of one graph."""

    sites: tuple[Site, ...] = ()
    declined: tuple[Decline, ...] = field(default=())
