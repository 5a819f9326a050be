"""What the rewrite does to the numbers: site by site, and for the model as a whole.

A site is compared on the values that reach it in the original model, so that each answers for
itself; the first that differs is where a difference enters. The whole model is compared compiled.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpass import matching, sampling, torch_private
from fxpass.backend import rmsnorm_backend
from fxpass.errors import FxpassError
from fxpass.options import Options
from fxpass.plan import Plan, decide
from fxpass.target import Target
from fxpass.target_errors import said

_EAGER, _DEFAULT, _EMULATED = "eager", "Inductor", "Inductor, casts emulated"
_REWRITTEN, _BOTH = "rewritten", "rewritten, casts emulated"
_COMPARED = (
    (_REWRITTEN, _EAGER),
    (_REWRITTEN, _DEFAULT),
    (_REWRITTEN, _EMULATED),
    (_BOTH, _EAGER),
    (_DEFAULT, _EAGER),
)
"""The last but one leaves out what Inductor does to the rest of the model, the last is only that
and what it does to the norms."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Change:
    """How far two results are apart."""

    elements: int
    differ: int
    ulps: int
    """Largest distance, in steps of the format."""

    def __str__(self) -> str:
        if not self.differ:
            return f"same bits ({self.elements} elements)"
        return f"{self.differ} of {self.elements} elements, up to {self.ulps} ulp"


@dataclass(frozen=True)
class SiteNumbers:
    """One rewritten norm against the nodes it replaces."""

    name: str
    location: str
    kernel: str
    label: str
    change: Change


@dataclass(frozen=True)
class Whole:
    """The outputs of two ways to run the model."""

    what: str
    change: Change
    top1: float | None
    """Share of rows whose largest element stands in the same place, over the first output."""
    first_output: int | None
    """Index of the first output that differs."""


@dataclass(frozen=True)
class Numbers:
    """Everything measured."""

    sites: tuple[SiteNumbers, ...]
    whole: tuple[Whole, ...]

    @property
    def first(self) -> SiteNumbers | None:
        """Where the first difference enters."""
        return next((site for site in self.sites if site.change.differ), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        first = None if self.first is None else self.sites.index(self.first)
        return {**dataclasses.asdict(self), "first_site": first}


def measure(target: Target, options: Options) -> Numbers:
    """Run the target's model on its own arguments, in every way. Raises FxpassError if it cannot.

    Every run gets a copy of the arguments and the same random numbers.
    """
    if target.model is None:
        raise FxpassError(f"numerics: {target.name} holds graphs without values, needs a model")
    try:
        with torch.no_grad():
            return Numbers(tuple(_sites(target, options)), tuple(_wholes(target, options)))
    except FxpassError:
        raise
    except Exception as error:
        raise FxpassError(f"numerics: {target.name}: {said(error, 'the model')}") from error
    finally:
        torch.compiler.reset()


def change(old: torch.Tensor, new: torch.Tensor) -> Change:
    """Elements whose bits differ (NaN is NaN, 0.0 is -0.0) and the largest distance."""
    differ = (old != new) & ~((old != old) & (new != new))
    count = int(differ.sum())
    if not count or not old.dtype.is_floating_point:
        return Change(old.numel(), count, 0)
    apart = (_ordered(old[differ]) - _ordered(new[differ])).abs()
    return Change(old.numel(), count, int(apart.max()))


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Integers that count the floats in order, from the sign and magnitude of their bits."""
    bits = values.contiguous().view(_BITS[values.element_size()])
    magnitude = bits.long() & torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, -magnitude, magnitude)


def _run(target: Target, model: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    args, kwargs = copy.deepcopy((target.args, target.kwargs))
    return model(*args, **kwargs)


def _sites(target: Target, options: Options) -> list[SiteNumbers]:
    """Runs the original graphs, then each site's kernel on what reached the site."""
    found: list[SiteNumbers] = []

    def watched(graph_module: fx.GraphModule) -> Callable[..., Any]:
        for body in torch_private.graph_and_bodies(graph_module)[1:]:
            body.forward = watch(body)
        return watch(graph_module)

    def watch(graph_module: fx.GraphModule) -> Callable[..., Any]:
        with torch_private.inside_inductor():
            plans = decide(matching.find(graph_module.graph), options).plans
        return lambda *args: _Recorder(graph_module, plans, found).run(*args)

    assert target.model is not None
    _run(target, torch_private.through_post_grad(target.model, lambda graph: None, watched))
    return found


class _Recorder(fx.Interpreter):
    """Runs a graph, keeps what goes into the sites, and compares each once it is computed."""

    def __init__(
        self, graph_module: fx.GraphModule, plans: tuple[Plan, ...], found: list[SiteNumbers]
    ) -> None:
        super().__init__(graph_module)
        self._found = found
        self._kept: dict[fx.Node, Any] = {}
        self._wanted = {node for plan in plans for node in (*plan.site.inputs, *_outputs(plan))}
        self._complete: dict[fx.Node, list[Plan]] = {}
        for plan in plans:
            self._complete.setdefault(max(_outputs(plan)), []).append(plan)

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; copies, because an input of the graph may be written to at its end."""
        result = super().run_node(n)
        if n in self._wanted:
            self._kept[n] = result.clone()
        self._found.extend(_site(plan, self._kept) for plan in self._complete.get(n, ()))
        return result


def _outputs(plan: Plan) -> tuple[fx.Node, ...]:
    site = plan.site
    return tuple(nodes[0] for nodes in (site.out_nodes, site.sum_nodes, site.row_nodes) if nodes)


def _site(plan: Plan, values: dict[fx.Node, Any]) -> SiteNumbers:
    site, kernel = plan.site, plan.choice.kernel
    assert kernel is not None
    made = sampling.run_kernel(plan, values)
    old = {"out": site.out_nodes, "sum": site.sum_nodes, "row": site.row_nodes}
    changes = [
        change(values[old[name][0]], result.reshape(values[old[name][0]].shape))
        for name, result in made.items()
    ]
    name = site.module or f"%{site.anchor.name}"
    return SiteNumbers(name, site.location, kernel.name, plan.choice.label, _added(changes))


def _added(changes: list[Change]) -> Change:
    return Change(
        sum(one.elements for one in changes),
        sum(one.differ for one in changes),
        max((one.ulps for one in changes), default=0),
    )


def _wholes(target: Target, options: Options) -> list[Whole]:
    """The rewritten model against three ways to run the original; and Inductor's own drift."""
    ways: dict[str, dict[str, Any] | None] = {
        _EAGER: None,
        _DEFAULT: {},
        _EMULATED: {"options": {"emulate_precision_casts": True}},
        _REWRITTEN: _rewriting(options),
        _BOTH: _rewriting(dataclasses.replace(options, numerics="eager")),
    }
    outputs = {name: _outputs_of(target, how) for name, how in ways.items()}
    return [_whole(f"{new} / {old}", outputs[old], outputs[new]) for new, old in _COMPARED]


def _rewriting(options: Options) -> dict[str, Any]:
    return {"backend": rmsnorm_backend, "options": dataclasses.asdict(options)}


def _outputs_of(target: Target, how: dict[str, Any] | None) -> list[torch.Tensor]:
    assert target.model is not None
    torch.compiler.reset()
    model = target.model if how is None else torch.compile(target.model, **how)
    leaves = torch_private.leaves(_run(target, model))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _whole(what: str, old: list[torch.Tensor], new: list[torch.Tensor]) -> Whole:
    changes = [change(a, b) for a, b in zip(old, new, strict=True)]
    first = next((index for index, one in enumerate(changes) if one.differ), None)
    return Whole(what, _added(changes), _top1(old, new), first)


def _top1(old: list[torch.Tensor], new: list[torch.Tensor]) -> float | None:
    for a, b in zip(old, new, strict=True):
        if a.dtype.is_floating_point and a.ndim and a.shape[-1] > 1 and a.numel():
            return (a.argmax(-1) == b.argmax(-1)).double().mean().item()
    return None


def text(numbers: Numbers) -> str:
    """Two tables, and the site where the first difference enters."""
    from tabulate import tabulate

    sites = [
        (s.name, s.kernel, s.label, s.change.elements, s.change.differ, s.change.ulps)
        for s in numbers.sites
    ]
    head = ("norm", "kernel", "numerics", "elements", "differ", "most ulp")
    first = numbers.first
    entry = (
        f"the first difference enters at {first.name} ({first.location}): {first.change}"
        if first
        else "no norm differs; what differs below comes from Inductor's code between them"
    )
    rows = [
        (w.what, w.change.differ, w.change.ulps, _percent(w.top1), _number(w.first_output))
        for w in numbers.whole
    ]
    return "\n\n".join(
        [
            "# numerics: each norm on the values that reach it in the original",
            tabulate(sites, headers=head),
            entry,
            tabulate(rows, headers=("model", "differ", "most ulp", "top-1", "first output")),
        ]
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _number(index: int | None) -> str:
    return "-" if index is None else str(index)
