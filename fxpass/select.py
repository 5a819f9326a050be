"""Spec + facts + options -> a kernel, keeping every refusal with its reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fxpass import facts
from fxpass.errors import OptionsError
from fxpass.kernels import Kernel, kernels
from fxpass.options import Options, unknown_name
from fxpass.sites import Site
from fxpass.spec import NormSpec, Rounding, is_narrow

KEPT = "same roundings, reduction order may differ"


@dataclass(frozen=True, eq=False)
class Choice:
    """The kernel for a site, the spec it will run, and who said no before it."""

    kernel: Kernel | None
    spec: NormSpec
    refusals: tuple[str, ...]
    label: str = KEPT
    """What the rewrite does to the numbers."""


def choose(site: Site, options: Options, build: bool) -> Choice:
    """The first kernel, in order of preference, whose contract the site keeps.

    With `build` the kernel is made ready to launch; without, it is only asked whether it could be.
    """
    spec, label = _with_rounding(site.spec, options.rounding)
    platform = platform_of(site)
    hidden = facts.static(site.hidden)
    refusals: list[str] = []
    for kernel in candidates(options, platform):
        reason = kernel.refusal(spec, platform, hidden)
        if reason is None:
            reason = kernel.prepare(spec, hidden) if build else kernel.unavailable()
        if reason is None:
            return Choice(kernel, spec, tuple(refusals), label)
        refusals.append(f"refused {kernel.name}: {reason}")
    if not refusals:
        refusals.append(f"no kernel for platform {platform}; name one in options.providers")
    return Choice(None, spec, tuple(refusals), label)


def prepare(sites: Iterable[Site], options: Options) -> None:
    """Build the kernels of several sites side by side, where a kernel offers that."""
    wanted: dict[Kernel, dict[NormSpec, None]] = {}
    for site in sites:
        spec, _ = _with_rounding(site.spec, options.rounding)
        platform, hidden = platform_of(site), facts.static(site.hidden)
        for kernel in candidates(options, platform):
            if kernel.refusal(spec, platform, hidden) is None:
                wanted.setdefault(kernel, {})[spec] = None
                break
    for kernel, specs in wanted.items():
        if kernel.prepare_all is not None and len(specs) > 1:
            kernel.prepare_all(specs)


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
