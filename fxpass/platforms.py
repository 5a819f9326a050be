"""Where a norm runs: the platform and architecture that kernels are chosen for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fxpass import facts
from fxpass.kernels.contract import arch_of
from fxpass.options import Options
from fxpass.sites import Site


@dataclass(frozen=True)
class Platform:
    """`str` and `options.platform` are the same words: `rocm:gfx942`, `cuda:sm_90`, `cpu`."""

    kind: str
    """`cpu`, `cuda` (NVIDIA) or `rocm` (AMD; torch calls both GPUs cuda), or a device type."""
    arch: str = ""
    """Empty if nobody knows it."""
    foreign: bool = False
    """Asked for by `options.platform`: what this machine has says nothing about it."""

    def __str__(self) -> str:
        return f"{self.kind}:{self.arch}" if self.arch else self.kind


def of(site: Site, options: Options) -> Platform:
    """The platform that the options name, or the one of the site's tensors."""
    if options.platform is not None:
        return named(options.platform)
    found = facts.of(site.x)
    kind = "cpu" if found is None else found.device.type
    if found is None or kind != "cuda":
        return Platform(kind)
    return Platform("rocm" if torch.version.hip else "cuda", _arch(found.device))


def device_of(site: Site) -> AbstractContextManager[Any]:
    """Makes the GPU of the site's tensors current, which kernels are built for and loaded on."""
    found = facts.of(site.x)
    index = None if found is None or found.device.type != "cuda" else found.device.index
    if index is None or torch.cuda.device_count() < 2 or index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(index)


def named(text: str) -> Platform:
    """The platform behind a valid `options.platform`."""
    kind, _, arch = text.partition(":")
    return Platform(kind, arch, foreign=True)


def _arch(device: torch.device) -> str:
    """`sm_90` or `gfx942`; empty for fake tensors on a machine without a GPU."""
    if not torch.cuda.is_available():
        return ""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return arch_of((properties.major, properties.minor))
