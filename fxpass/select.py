"""Spec + facts + options -> a kernel, keeping every refusal with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from fxpass import facts, fusable, torch_inductor
from fxpass.errors import OptionsError
from fxpass.kernels import Kernel, kernels
from fxpass.kernels.inductor import KERNEL as FUSED
from fxpass.options import Options, unknown_name
from fxpass.sites import Site
from fxpass.spec import NormSpec, Rounding, is_narrow
from fxpass.torch_private import is_inside_inductor

KEPT = "same roundings, reduction order may differ"
_APART = ("cuda", "triton")
"""Providers of GPU kernels that nothing is fused with."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The kernel for a site, the spec it will run, and who said no before it."""

    kernel: Kernel | None
    spec: NormSpec
    refusals: tuple[str, ...]
    label: str = KEPT
    """What the rewrite does to the numbers."""


def choose(site: Site, options: Options, build: bool, taken: Container[fx.Node] = ()) -> Choice:
    """The first kernel, in order of preference, whose contract the site keeps.

    With `build` the kernel is made ready to launch; without, it is only asked whether it could be.
    `taken` are the nodes that the kernels of all sites take over.
    """
    spec, label = _with_rounding(site.spec, options.rounding)
    platform = platform_of(site)
    hidden = facts.static(site.hidden)
    refusals: list[str] = []
    for kernel in candidates(options, platform):
        reason = _refusal(kernel, site, spec, options, taken)
        if reason is None:
            reason = kernel.prepare(spec, hidden) if build else kernel.unavailable()
        if reason is None:
            return Choice(kernel, spec, tuple(refusals), label)
        refusals.append(f"refused {kernel.name}: {reason}")
    if not refusals:
        refusals.append(f"no kernel for platform {platform}; name one in options.providers")
    return Choice(None, spec, tuple(refusals), label)


def prepare(sites: Iterable[Site], options: Options, taken: Container[fx.Node] = ()) -> None:
    """Build the kernels of several sites side by side, where a kernel offers that."""
    wanted: dict[Kernel, dict[NormSpec, None]] = {}
    for site in sites:
        spec, _ = _with_rounding(site.spec, options.rounding)
        for kernel in candidates(options, platform_of(site)):
            if _refusal(kernel, site, spec, options, taken) is None:
                wanted.setdefault(kernel, {})[spec] = None
                break
    for kernel, specs in wanted.items():
        if kernel.prepare_all is not None and len(specs) > 1:
            kernel.prepare_all(specs)


def _refusal(
    kernel: Kernel, site: Site, spec: NormSpec, options: Options, taken: Container[fx.Node]
) -> str | None:
    """Why a kernel is not for a site, before anything is built: meaning, then place, then cost."""
    return (
        kernel.refusal(spec, platform_of(site), facts.static(site.hidden))
        or _cannot_inline(kernel, site, options)
        or _breaks_a_fusion(kernel, site, spec, options, taken)
    )


def inlines(kernel: Kernel, platform: str) -> bool:
    """Whether compiled code can hold the kernel itself, not only a call of it."""
    return kernel is FUSED or (kernel.inline is not None and platform != "cpu")


def _cannot_inline(kernel: Kernel, site: Site, options: Options) -> str | None:
    """Why compiled code cannot hold a kernel, where it has to, or None."""
    ahead = torch_inductor.compiling_ahead_of_time()
    if not inlines(kernel, platform_of(site)):
        return "opaque: an AOTInductor package must run without fxpass" if ahead else None
    if not ahead and kernel is not FUSED:
        return None
    if site.eps_node is not None:
        return "eps is a tensor of the graph"
    if facts.static(site.hidden) is None:
        return "hidden is known only at run time"
    if kernel is FUSED and not _named(kernel, options) and not is_inside_inductor():
        return "no Inductor to generate the code"
    return None


def _named(kernel: Kernel, options: Options) -> bool:
    return kernel.name in options.providers or kernel.provider in options.providers


def _breaks_a_fusion(
    kernel: Kernel, site: Site, spec: NormSpec, options: Options, taken: Container[fx.Node]
) -> str | None:
    """Why Inductor's own code moves fewer bytes than a kernel apart, or None."""
    platform = platform_of(site)
    if kernel.provider not in _APART or "auto" not in options.providers:
        return None
    fits = FUSED.refusal(spec, platform, facts.static(site.hidden)) is None
    if not fits or _cannot_inline(FUSED, site, options) is not None:
        return None
    return fusable.lost(site, taken)


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


def platform_of(site: Site) -> str:
    """`cpu`, `cuda` (NVIDIA), `rocm` (AMD), or the device type."""
    found = facts.of(site.x)
    kind = "cpu" if found is None else found.device.type
    return "rocm" if kind == "cuda" and torch.version.hip else kind


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
