"""Launches of a CUDA kernel: a call packs the parameters and goes to the driver.

Costs 3 us of host time where Triton's own launch costs 9 (H200 host, Python 3.12, 20 parameters).
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fxpass.kernels import cuda_driver

Tensor = torch.Tensor

_ALIGNED = 128  # bytes: what a tensor map among the parameters needs, and more than all others


class Prepared:
    """A kernel and how its parameters lie in memory. Usable from every thread."""

    def __init__(
        self,
        kernel: int,
        threads: int,
        layout: struct.Struct,
        offsets: Sequence[int],
        *,
        shared: int = 0,
        overlap: bool = False,
    ) -> None:
        """Of the arguments that explain themselves least.

        Args:
            kernel: CUkernel or CUfunction.
            threads: of a block.
            layout: of all parameters in one piece of memory.
            offsets: in bytes, of each parameter in it.
            shared: bytes of dynamic shared memory.
            overlap: whether the kernel may start while the one before it still runs
                (programmatic dependent launch, compute capability 9.0).
        """
        self._kernel, self._pack = kernel, layout.pack_into
        self._grid: tuple[int, int, int] = (1, 1, 1)
        self._config = cuda_driver.Config(*self._grid, threads, 1, 1, shared)
        if overlap:
            cuda_driver.overlap(self._config)
        self._memory = ctypes.create_string_buffer(layout.size + _ALIGNED)
        base = ctypes.addressof(self._memory)
        self._start = -base % _ALIGNED
        places = [base + self._start + offset for offset in offsets]
        self._parameters = (ctypes.c_void_p * len(places))(*places)
        self._addresses = ctypes.addressof(self._config), ctypes.addressof(self._parameters)
        self._lock = threading.Lock()
        self._go = cuda_driver.launcher()

    def fits(self, blocks: int) -> bool:
        """Whether the current device can run clusters of so many blocks."""
        with self._lock:
            self._config.grid_x, self._config.grid_y, self._config.grid_z = self._grid = (
                blocks,
                1,
                1,
            )
            return cuda_driver.clusters_fit(self._kernel, self._config)

    def __call__(
        self,
        device: int,
        grid: tuple[int, int, int],
        head: Sequence[Any],
        tail: Sequence[Any] = (),
    ) -> None:
        """Launch on the current stream of the current device, which is `device`.

        head and tail: the values of the layout.

        Raises LaunchError with the driver's word if it refuses.
        """
        config, parameters = self._addresses
        with self._lock:  # the memory and the configuration belong to every thread's calls
            self._pack(self._memory, self._start, *head, *tail)
            if grid != self._grid:
                self._config.grid_x, self._config.grid_y, self._config.grid_z = self._grid = grid
            self._config.stream = stream(device)
            status = self._go(config, self._kernel, parameters, None)
            if status == cuda_driver.INVALID_CONTEXT:
                cuda_driver.make_current(device)
                status = self._go(config, self._kernel, parameters, None)
        if status:
            cuda_driver.check(status, "cuLaunchKernelEx", cuda_driver.LaunchError)


def stream(device: int) -> int:
    """The device's current stream, as Inductor gets it (1 us less than in public)."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def is_current(device: int) -> bool:
    """Whether a launch goes to this device; -1 is the host."""
    return device < 0 or torch._C._cuda_getDevice() == device


def on_device(index: int) -> AbstractContextManager[Any]:
    """Makes a device current if it is not; -1 is the host."""
    return nullcontext() if is_current(index) else torch.cuda.device(index)


def empty_strided(
    device: int, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Memory on the current device, which is `device` (-1: the host). As Inductor's: 1 us."""
    if device < 0 or _EMPTY is None:
        where = "cpu" if device < 0 else f"cuda:{device}"
        return torch.empty_strided(size, stride, dtype=dtype, device=where)
    made: Tensor = _EMPTY(size, stride, dtype)
    return made


try:
    from torch._C._dynamo.guards import _empty_strided_cuda as _EMPTY  # type: ignore
except ImportError:
    _EMPTY = None
