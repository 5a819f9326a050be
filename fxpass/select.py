"""Spec + facts + options -> a kernel, keeping every refusal with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxpass import copies, facts, fusable, platforms, torch_inductor
from fxpass.errors import OptionsError
from fxpass.kernels import Kernel, kernels, measured
from fxpass.kernels.inductor import KERNEL as FUSED
from fxpass.layout import LayoutError, LayoutPlan, uncopied
from fxpass.layout import plan as plan_layout
from fxpass.options import Options, unknown_name
from fxpass.platforms import Platform
from fxpass.sites import Site
from fxpass.spec import NormSpec, Rounding, is_narrow
from fxpass.torch_private import is_inside_inductor

KEPT = "same roundings, reduction order may differ"
_APART = ("cuda", "triton")
"""Providers of GPU kernels that nothing is fused with."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The kernel for a site with its layout, the spec it will run, and who said no before it."""

    kernel: Kernel | None
    spec: NormSpec
    refusals: tuple[str, ...]
    layout: LayoutPlan
    label: str = KEPT
    """What the rewrite does to the numbers."""


def choose(site: Site, options: Options, build: bool, taken: Container[fx.Node] = ()) -> Choice:
    """The first kernel, in order of preference, whose contract the site keeps.

    With `build` the kernel is made ready to launch; without, it is only asked whether it could be.
    Planning for another machine, neither. `taken` are the nodes that the kernels of all sites take
    over.
    """
    place = platforms.of(site, options)
    asked = _Asked(site, *_with_rounding(site.spec, options.rounding), place, options, taken)
    refusals: list[str] = []
    for kernel in _in_order(asked):
        found = _layout_or_refusal(kernel, asked)
        reason = found if isinstance(found, str) else _unready(kernel, asked, build)
        if isinstance(found, LayoutPlan) and reason is None:
            label = asked.label_with(kernel.inexact(asked.spec, place.arch))
            return Choice(kernel, asked.spec, tuple(refusals), found, label)
        refusals.append(f"refused {kernel.name}: {reason}")
    if not refusals:
        refusals.append(f"no kernel for platform {place.kind}; name one in options.providers")
    return Choice(None, asked.spec, tuple(refusals), LayoutPlan({}, {}), asked.label)


def prepare(sites: Iterable[Site], options: Options, taken: Container[fx.Node] = ()) -> None:
    """Build the kernels of several sites side by side, where a kernel offers that."""
    wanted: dict[Kernel, dict[NormSpec, None]] = {}
    for site in sites:
        place = platforms.of(site, options)
        if place.foreign:
            continue
        asked = _Asked(site, *_with_rounding(site.spec, options.rounding), place, options, taken)
        for kernel in _in_order(asked):
            if isinstance(_layout_or_refusal(kernel, asked), LayoutPlan):
                wanted.setdefault(kernel, {})[asked.spec] = None
                break
    for kernel, specs in wanted.items():
        if kernel.prepare_all is not None and len(specs) > 1:
            kernel.prepare_all(specs)


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a kernel is asked for."""

    site: Site
    spec: NormSpec
    label: str
    place: Platform
    options: Options
    taken: Container[fx.Node]

    def label_with(self, inexact: str | None) -> str:
        """The label of a kernel that may be inexact."""
        kept = [] if self.label == KEPT else [self.label]
        return "; ".join(kept + ([inexact] if inexact else [])) or KEPT


def _in_order(asked: _Asked) -> list[Kernel]:
    """Candidates as the options list them; under `auto` what was measured leads."""
    found = candidates(asked.options, asked.place.kind)
    if asked.options.providers != ("auto",):
        return found
    return measured.ordered(found, asked.place.kind, asked.spec, facts.static(asked.site.hidden))


def _layout_or_refusal(kernel: Kernel, asked: _Asked) -> LayoutPlan | str:
    """Why a kernel is not for a site, before anything is built: meaning, then place, then cost."""
    site, hidden = asked.site, facts.static(asked.site.hidden)
    reason = (
        kernel.refusal(asked.spec, asked.place.kind, hidden)
        or kernel.contract.arch_refusal(asked.place.arch)
        or _repeats_weights(kernel, site)
        or _varies(kernel, asked)
        or _inexact(kernel, asked)
        or _drops_roundings(kernel, asked)
        or _cannot_inline(kernel, asked)
        or _breaks_a_fusion(kernel, asked)
    )
    if reason is not None:
        return reason
    try:
        layout = plan_layout(site, kernel.contract.layout)
    except LayoutError as error:
        return f"layout: {error}"
    if kernel is FUSED and is_inside_inductor():
        return uncopied(layout)
    return _costs_more(kernel, asked, layout) or layout


def _unready(kernel: Kernel, asked: _Asked, build: bool) -> str | None:
    """Why this machine cannot run a kernel, if it is this machine that will."""
    if asked.place.foreign:
        return None
    with platforms.device_of(asked.site):
        if build:
            return kernel.prepare(asked.spec, facts.static(asked.site.hidden))
        return kernel.unavailable()


def _repeats_weights(kernel: Kernel, site: Site) -> str | None:
    if kernel.contract.weight_rows:
        return None
    for role, node in (("weight", site.weight), ("bias", site.bias)):
        found = None if node is None else facts.of(node)
        if found is not None and not facts.same(facts.numel(found.shape), site.hidden):
            return f"{role} has several rows"
    return None


def _varies(kernel: Kernel, asked: _Asked) -> str | None:
    """Why a kernel's rows may depend on other rows, where they must not, or None."""
    if not asked.options.batch_invariant or kernel.contract.batch_invariant:
        return None
    return "not batch-invariant"


def _inexact(kernel: Kernel, asked: _Asked) -> str | None:
    """Why a kernel with other roundings is not for a user who did not ask for it, or None."""
    reason = kernel.inexact(asked.spec, asked.place.arch)
    if reason is None or _named(kernel, asked.options):
        return None
    return f"{reason}; name {kernel.provider} in options.providers to have it all the same"


def _drops_roundings(kernel: Kernel, asked: _Asked) -> str | None:
    """Why Inductor's code would not have the roundings that are written into it, or None."""
    if kernel is not FUSED or inlines(kernel, asked.place.kind):
        return None
    return "the C++ of this torch's Inductor drops roundings, needs torch 2.13"


def _costs_more(kernel: Kernel, asked: _Asked, layout: LayoutPlan) -> str | None:
    """Why Inductor's own code moves fewer bytes than the copies and the kernel, or None."""
    alone = not is_inside_inductor()  # the alternative is eager: a pass for each operator
    if alone or kernel is FUSED or kernel.provider == "cpu" or _named(kernel, asked.options):
        return None
    if asked.options.batch_invariant:
        return None  # the alternative is another kernel for the mean, and its passes
    return copies.refusal(asked.site, layout, asked.taken)


def inlines(kernel: Kernel, platform: str) -> bool:
    """Whether compiled code can hold the kernel with all its roundings, not only a call of it."""
    if kernel is FUSED:
        return platform != "cpu" or torch_inductor.CPP_KEEPS_ROUNDINGS
    return kernel.inline is not None and platform != "cpu"


def _cannot_inline(kernel: Kernel, asked: _Asked) -> str | None:
    """Why compiled code cannot hold a kernel, where it has to, or None."""
    ahead = torch_inductor.compiling_ahead_of_time()
    if not inlines(kernel, asked.place.kind):
        return "opaque: an AOTInductor package must run without fxpass" if ahead else None
    if not ahead and kernel is not FUSED:
        return None
    if asked.site.eps_node is not None:
        return "eps is a tensor of the graph"
    if facts.static(asked.site.hidden) is None:
        return "hidden is known only at run time"
    if kernel is FUSED and not _named(kernel, asked.options) and not is_inside_inductor():
        return "no Inductor to generate the code"
    return None


def _named(kernel: Kernel, options: Options) -> bool:
    return kernel.name in options.providers or kernel.provider in options.providers


def _breaks_a_fusion(kernel: Kernel, asked: _Asked) -> str | None:
    """Why Inductor's own code moves fewer bytes than a kernel apart, or None."""
    if kernel.provider not in _APART or "auto" not in asked.options.providers:
        return None
    if asked.options.batch_invariant:
        return None  # Inductor's own code is no choice
    hidden = facts.static(asked.site.hidden)
    fits = FUSED.refusal(asked.spec, asked.place.kind, hidden) is None
    if not fits or _cannot_inline(FUSED, asked) is not None:
        return None
    return fusable.lost(asked.site, asked.taken)


def candidates(options: Options, platform: str) -> list[Kernel]:
    """Kernels in the order the options ask for.

    `auto` is every kernel in registration order, but the reference only on the CPU: elsewhere
    the compiler's own code for the unrewritten norm is faster than eager operators.
    """
    found = []
    for provider in options.providers:
        if provider == "auto":
            usable = [k for k in kernels() if k.provider != "reference" or platform == "cpu"]
        else:
            usable = [k for k in kernels() if provider in (k.provider, k.name)]
            if not usable:
                known = sorted({name for k in kernels() for name in (k.provider, k.name)})
                raise OptionsError(unknown_name("provider", provider, ("auto", *known)))
        found += [kernel for kernel in usable if kernel not in found]
    return found


def check_providers(options: Options) -> None:
    """Raises OptionsError if a provider is unknown."""
    candidates(options, "cpu")


def _with_rounding(spec: NormSpec, rounding: str) -> tuple[NormSpec, str]:
    """The spec in the rounding order asked for, and the label that says so."""
    source = spec.rounding.value
    if rounding in ("source", source):
        return spec, KEPT
    changed = _reordered(spec, Rounding(rounding))
    if changed == spec:
        return spec, KEPT
    return changed, f"rounding changed by request: {source} -> {rounding}"


def _reordered(spec: NormSpec, rounding: Rounding) -> NormSpec:
    """Moves the cast before or after the weight multiply.

    Other programs are left alone, and so are results whose dtype would change with the order.
    """
    ops = [step.op for step in spec.element]
    apply = spec.element[0]
    narrow = [step.dtype for step in spec.element if is_narrow(step.dtype)]
    if sorted(ops) != sorted([apply.op, "cast", "mul_weight"]) or is_narrow(apply.dtype):
        return spec
    cast = next(step for step in spec.element if step.op == "cast")
    scale = next(step for step in spec.element if step.op == "mul_weight")
    if rounding is Rounding.CAST_THEN_SCALE:
        moved = (apply, cast, dataclasses.replace(scale, dtype=narrow[-1]))
    else:
        moved = (apply, dataclasses.replace(scale, dtype=torch.float32), cast)
    changed = dataclasses.replace(spec, element=moved)
    return changed if changed.out == spec.out else spec
