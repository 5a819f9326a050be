"""What NCCL reads from the environment, set so that sums over ranks keep one order at every size.

The settings are those vLLM's batch-invariant mode uses. A collective still adds in an order that
follows an element's place where a rank's share is no multiple of 16 bytes, and a reduce-scatter
does at every size: use all-to-all and a sum in a fixed order there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

import torch

from fxpass.errors import FxpassError

SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "NCCL_ALGO": "allreduce:tree",
        "NCCL_PROTO": "Simple",
        "NCCL_MIN_NCHANNELS": "1",
        "NCCL_MAX_NCHANNELS": "1",
        "NCCL_NTHREADS": "1",
        "NCCL_SOCKET_NTHREADS": "1",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_COLLNET_ENABLE": "0",
        "NCCL_P2P_NET_DISABLE": "1",
        "NCCL_LAUNCH_MODE": "GROUP",
    }
)
"""Algorithm and protocol, which NCCL picks by size; channels and threads, which share out the
elements; and no sums inside the network or the switch."""


def missing() -> dict[str, str]:
    """The settings the environment does not have yet."""
    return {name: value for name, value in SETTINGS.items() if os.environ.get(name) != value}


def pin(overwrite: bool = False) -> dict[str, str]:
    """Set what is missing for this process and its children; returns what was set.

    NCCL reads its environment when a process group is made. Raises FxpassError if there is one
    already, or if a variable has another value and `overwrite` is not set.
    """
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        raise FxpassError(
            "collectives.pin: the process group exists already; call it before init_process_group"
        )
    needed = missing()
    taken = {name: os.environ[name] for name in needed if name in os.environ}
    if taken and not overwrite:
        found = ", ".join(f"{name}={value}" for name, value in taken.items())
        raise FxpassError(f"collectives.pin: the environment has {found}; use overwrite=True")
    os.environ.update(needed)
    return needed
