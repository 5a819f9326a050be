"""What will be done to a graph, decided in full before anything is changed."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import fx

from fxpass import traffic
from fxpass.layout import LayoutNode, LayoutPlan
from fxpass.options import Options
from fxpass.select import Choice, choose, prepare
from fxpass.sites import Decline, Found, Site
from fxpass.traffic import Traffic


@dataclass(frozen=True, eq=False)
class Plan:
    """One site with its kernel and layout nodes."""

    site: Site
    choice: Choice
    layout: LayoutPlan
    before: Traffic
    after: Traffic

    @property
    def layout_nodes(self) -> tuple[LayoutNode, ...]:
        """Layout nodes in graph order."""
        return self.layout.nodes


@dataclass(frozen=True)
class Decisions:
    """The plans for a graph, and the sites without one."""

    plans: tuple[Plan, ...]
    declined: tuple[Decline, ...]


def decide(found: Found, options: Options, build: bool = True) -> Decisions:
    """Pick a kernel and a layout for every site; `build` makes the kernels ready to launch."""
    taken = frozenset(node for site in found.sites for node in site.interior)
    if build:
        prepare(found.sites, options, taken)
    plans: list[Plan] = []
    declined = list(found.declined)
    for site in found.sites:
        if options.fuel is not None and len(plans) >= options.fuel:
            declined.append(decline(site, f"out of fuel ({options.fuel})"))
            continue
        made = _plan(site, options, build, taken)
        if isinstance(made, Plan):
            plans.append(made)
        else:
            declined.append(decline(site, made))
    return Decisions(tuple(plans), tuple(declined))


def _plan(site: Site, options: Options, build: bool, taken: Container[fx.Node]) -> Plan | str:
    choice = choose(site, options, build, taken)
    if choice.kernel is None:
        return "no kernel fits: " + "; ".join(choice.refusals)
    before = traffic.before(site)
    after = traffic.after(site, choice.kernel.name, choice.spec.outputs, choice.layout)
    return Plan(site, choice, choice.layout, before, after)


def without(decisions: Decisions, dropped: Mapping[Plan, str]) -> Decisions:
    """Move some plans to the declined ones, each with its reason."""
    kept = tuple(plan for plan in decisions.plans if plan not in dropped)
    more = tuple(decline(plan.site, reason) for plan, reason in dropped.items())
    return Decisions(kept, (*decisions.declined, *more))


def decline(site: Site, reason: str) -> Decline:
    """A site that is not rewritten."""
    return Decline(site.anchor.name, reason, site.location, site.source, site.module)
