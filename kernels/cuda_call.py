"""A callable for the CUDA row kernel of one spec and hidden: tensors in, tensors out."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from fxpass.kernels import c_struct, cuda_build, cuda_driver, cuda_source, gpu_rows
from fxpass.kernels.build_cache import Once
from fxpass.kernels.cuda_source import Schedule
from fxpass.spec import NormSpec

_PACK = struct.Struct("7Q8qfI")  # FxArgs of cuda_row.h
_WIDE = 16  # bytes of one access


class RowKernel:
    """The kernel of one spec and hidden on one device, in any schedule."""

    def __init__(
        self,
        spec: NormSpec,
        hidden: int,
        device: int,
        schedule: Callable[[int, int], Schedule],
    ) -> None:
        self._spec, self._hidden, self._device = spec, hidden, device
        self._schedule = schedule
        self._capability = torch.cuda.get_device_capability(device)
        self._launchers: Once[_Launcher] = Once()
        self._dtypes = tuple(
            {"out": spec.out, "sum": spec.normed, "row": spec.row_dtype}[name]
            for name in spec.outputs
        )
        self._bytes = (spec.x.itemsize, 0 if spec.residual is None else spec.residual.itemsize)

    def prepare(self) -> None:
        """Build the schedules for few and for many rows. Raises BuildError."""
        for rows in (1, 1 << 20):
            self._launcher(self._schedule(self._hidden, rows))

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> Any:
        """(..., hidden) -> the outputs of the spec, contiguous; a tensor if there is only one."""
        shape = x.shape
        made = {
            name: torch.empty(
                (*shape[:-1], 1) if name == "row" else shape, dtype=dtype, device=x.device
            )
            for name, dtype in zip(self._spec.outputs, self._dtypes, strict=True)
        }
        self._run(x, residual, weight, bias, eps, made)
        return made["out"] if len(made) == 1 else tuple(made.values())

    def _run(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        made: dict[str, torch.Tensor],
    ) -> None:
        x, residual, rows = _addressed(x, residual)
        if not rows.count:
            return
        weight, weight_rows = _rows_of(weight, self._hidden)
        bias, bias_rows = _rows_of(bias, self._hidden)
        pointers = [
            0 if tensor is None else tensor.data_ptr()
            for tensor in (x, residual, weight, bias, *map(made.get, c_struct.OUTPUTS))
        ]
        steps = [rows.outer[0], rows.step[0], *(0, 0)]
        if residual is not None:
            steps[2:] = rows.outer[1], rows.step[1]
        aligned = pointers[0] | pointers[1] | pointers[2] | pointers[3]
        for index, size in enumerate(self._bytes):
            aligned |= (steps[2 * index] | steps[2 * index + 1]) * size
        packed = _PACK.pack(
            *pointers, rows.count, rows.inner, *steps, weight_rows, bias_rows, eps,
            aligned % _WIDE == 0,
        )  # fmt: skip
        launcher = self._launcher(self._schedule(self._hidden, rows.count))
        launcher.launch(rows.count, packed, torch._C._cuda_getCurrentRawStream(self._device))

    def _launcher(self, schedule: Schedule) -> _Launcher:
        def make() -> _Launcher:
            text = cuda_source.source(self._spec, self._hidden, schedule)
            return _Launcher(cuda_build.cubin(text, self._capability), schedule, self._capability)

        return self._launchers.get(schedule, make)


class _Launcher:
    """One loaded kernel."""

    def __init__(self, cubin: bytes, schedule: Schedule, capability: tuple[int, int]) -> None:
        self._rows = schedule.rows
        self._kernel = cuda_driver.load(cubin, "fxpass_run")
        self._config = cuda_driver.config(
            schedule.threads * schedule.rows, overlap=capability >= (9, 0)
        )
        self._reference = ctypes.byref(self._config)
        self._arguments = ctypes.create_string_buffer(_PACK.size)
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self._arguments))
        self._lock = threading.Lock()
        self._go = cuda_driver.driver().cuLaunchKernelEx

    def launch(self, rows: int, packed: bytes, stream: int) -> None:
        with self._lock:  # the buffer and the configuration are this launcher's, not the call's
            self._arguments[:] = packed
            self._config.grid_x = -(-rows // self._rows)
            self._config.stream = stream
            status = self._go(self._reference, self._kernel, self._pointers, None)
        if status:
            cuda_driver.check(status, "cuLaunchKernelEx")


def _addressed(
    x: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, gpu_rows.Rows]:
    """The inputs with the way to their rows; copied if it takes more than two strides."""
    given = [x] if residual is None else [x, residual]
    rows = gpu_rows.address(x.shape, [tensor.stride() for tensor in given])
    if rows is None:
        given = [tensor.contiguous() for tensor in given]
        rows = gpu_rows.address(x.shape, [tensor.stride() for tensor in given])
        assert rows is not None
    return given[0], None if residual is None else given[1], rows


def _rows_of(factor: torch.Tensor | None, hidden: int) -> tuple[torch.Tensor | None, int]:
    if factor is None:
        return None, 1
    return factor.contiguous(), factor.numel() // hidden
