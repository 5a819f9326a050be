"""What on this machine decides whether norms are rewritten, and what would silently differ.

Each check returns findings; a finding is a line of facts, and a warning if it needs attention.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fxpass import capture, pipeline, torch_dispatcher, torch_private
from fxpass.dtypes import short
from fxpass.hooks import HOOK
from fxpass.kernels import kernels
from fxpass.kernels.build_cache import cache_dir
from fxpass.options import Options

PACKAGES = ("triton", "transformers", "diffusers", "vllm", "sglang", "flashinfer-python")
HOOKS = (
    "pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass",
    "post_grad_custom_pre_pass", "post_grad_custom_post_pass",
)  # fmt: skip
GENERATED = (
    "rms_norm", "_fused_rms_norm", "native_layer_norm", "mean.dim", "sum.dim_IntList",
    "_softmax", "softmax.int", "_log_softmax", "log_softmax.int",
)  # fmt: skip
"""Inductor writes its own code for these: no override is ever called."""
CALLED_BY_OUT = ("mm", "addmm", "bmm")
"""Inductor calls the `.out` overload of these, so an override of the plain one is not reached."""


_LITERALS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "+ 1e-06": lambda x: x + 1e-6,
    "* 0.1": lambda x: x * 0.1,
    "/ 3.3": lambda x: x / 3.3,
    "* 0.3333333333333333": lambda x: x * (1 / 3),
}
_REFERENCE = Options(providers=("reference",), strict=True)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    text: str
    warning: bool = False


def examine() -> list[Finding]:
    """All checks, in order; one that fails says so instead of hiding the others."""
    checks = (versions, providers, caches, hooks, overrides, eps_drift, literal_drift)
    return [finding for check in checks for finding in _guarded(check)]


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        return [Finding(check.__name__, f"the check itself failed: {said}", warning=True)]


def versions() -> Iterator[Finding]:
    """Python, the packages that matter, and the device."""
    yield Finding("versions", f"python {platform.python_version()} on {platform.platform()}")
    yield Finding("versions", f"torch {torch.__version__}")  # which build, its metadata may not say
    for name in ("fxpass", *PACKAGES):
        try:
            yield Finding("versions", f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    kind = "rocm" if torch.version.hip else "cuda"
    if torch.cuda.is_available():
        yield Finding("versions", f"{kind}: {torch.cuda.get_device_name()}")
    else:
        yield Finding("versions", "no GPU that torch can see; plans are for the CPU")


def providers() -> Iterator[Finding]:
    """Which kernels can run here, and why the others cannot."""
    for kernel in kernels():
        why_not = kernel.unavailable()
        yield Finding("providers", f"{kernel.name}: {why_not or 'can run here'}")


def caches() -> Iterator[Finding]:
    """Where built kernels and compiled graphs are kept, and whether that can be written."""
    places = {"kernels": cache_dir(), "Inductor": Path(torch_private.inductor_cache_dir())}
    for what, folder in places.items():
        fault = _unwritable(folder)
        yield Finding("caches", f"{what}: {folder}{fault}", warning=bool(fault))


def _unwritable(folder: Path) -> str:
    """Why nothing can be kept there, by looking only."""
    import os

    nearest = next(p for p in (folder, *folder.parents) if p.exists())
    if not nearest.is_dir():
        return f" ({nearest} is a file; kernels are built anew in every process)"
    if not os.access(nearest, os.W_OK):
        return f" ({nearest} is not writable; kernels are built anew in every process)"
    return ""


def hooks() -> Iterator[Finding]:
    """Passes that others have put into Inductor's config."""
    config = torch_private.inductor_config()
    found = {name: getattr(config, name, None) for name in HOOKS}
    for name, step in found.items():
        if step is None:
            continue
        kept = "; fxpass runs after it" if name == HOOK else ""
        yield Finding("hooks", f"{name}: {step!r:.120}{kept}", warning=name != HOOK)
    if not any(found.values()):
        yield Finding("hooks", "no passes in Inductor's config")


def overrides() -> Iterator[Finding]:
    """ATen implementations set by Python packages that a compiled graph does not call."""
    count = 0
    for name in (*GENERATED, *CALLED_BY_OUT):
        for key, place in torch_dispatcher.python_overrides(f"aten::{name}").items():
            if name in CALLED_BY_OUT:
                if torch_dispatcher.python_overrides(f"aten::{name}.out"):
                    continue
                why = f"Inductor calls {name}.out, which is not overridden"
            else:
                why = "Inductor generates code for it"
            count += 1
            text = (
                f"aten::{name} ({key}) is overridden at {place}; compiled graphs bypass it: {why}"
            )
            yield Finding("overrides", text, warning=True)
    if not count:
        yield Finding("overrides", "no operator is overridden in a way that compiling would undo")


def eps_drift() -> Iterator[Finding]:
    """Whether eps means the same in eager and in the graph a compiler gets."""
    x = torch.full((1, 64), 1e-3, dtype=torch.bfloat16)
    for eps in (None, 1e-6):
        compiled = _compiled_eps(x, eps)
        said = f"F.rms_norm(eps={eps}) on bf16: compiled with {compiled}"
        if compiled is None:
            yield Finding("eps", f"F.rms_norm(eps={eps}) was not recognised", warning=True)
            continue
        if torch.equal(F.rms_norm(x, (64,), eps=eps), F.rms_norm(x, (64,), eps=compiled)):
            yield Finding("eps", f"{said}, eager agrees")
        else:
            yield Finding("eps", f"{said}, eager uses another value", warning=True)


def literal_drift() -> Iterator[Finding]:
    """Whether numbers written in a model reach the graph, and give eager's bits there."""
    drifts = 0
    for name, function in _LITERALS.items():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.linspace(-3, 3, 257).to(dtype)
            what = f"x {name} on {short(dtype)}"
            why = _drift(function, x, float(name.rpartition(" ")[2]))
            if why:
                drifts += 1
                yield Finding("literals", f"{what}: {why}", warning=True)
    if not drifts:
        shown = ", ".join(f"x {name}" for name in _LITERALS)
        yield Finding("literals", f"{shown}: in the graph as written, with eager's bits")
    yield Finding("literals", _dynamic_eps())


def _drift(function: Callable[..., Any], x: torch.Tensor, literal: float) -> str | None:
    """What became of a number on its way into the graph, or None."""
    with torch.no_grad():
        (graph_module,) = capture.graphs(function, (x,), {})
        (found,) = torch_private.leaves(graph_module(x))
    numbers = [arg for node in graph_module.graph.nodes for arg in node.args if type(arg) is float]
    if numbers != [literal]:
        return f"the graph has {', '.join(map(repr, numbers)) or 'no number'}"
    differ = int((found != function(x)).sum())
    return f"{differ} of {x.numel()} elements differ from eager" if differ else None


class _Norm(torch.nn.Module):
    """As models write it, with eps an attribute."""

    eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _dynamic_eps() -> str:
    """What becomes of `self.eps` where every size is dynamic."""
    with torch.no_grad(), torch_private.every_size_dynamic():
        found = capture.graphs(_Norm(), (torch.ones(4, 64),), {})
    reports = [pipeline.dry_run(one.graph, _REFERENCE) for one in found]
    values = [site.eps for report in reports for site in report.rewritten]
    kind = f"the number {values[0]}" if values and values[0] else "a tensor, read at run time"
    return f"self.eps = {_Norm.eps} of a norm: with dynamic=True {kind if values else 'not found'}"


def _compiled_eps(x: torch.Tensor, eps: float | None) -> float | None:
    def norm(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), eps=eps)

    with torch.no_grad():
        found = capture.graphs(norm, (x,), {})
    reports = [pipeline.dry_run(graph_module.graph, _REFERENCE) for graph_module in found]
    return next((site.eps for report in reports for site in report.rewritten), None)
