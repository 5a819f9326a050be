"""A callable for the CUDA row kernel of one spec: tensors in, tensors out.

Host time matters at decode sizes, where a kernel runs for 1 us: all that follows from shapes and
strides is worked out once and kept, a call only looks it up, fills in pointers and launches.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch

from fxpass.kernels import cuda_build, cuda_driver, cuda_source, gpu_rows, steps
from fxpass.kernels.build_cache import Once
from fxpass.kernels.cuda_source import Schedule
from fxpass.kernels.gpu_call import PLANS_MOST, addressed, check
from fxpass.spec import NormSpec

Tensor = torch.Tensor

_POINTERS = struct.Struct("7Q")  # FxArgs of cuda_row.h: pointers, then the rest
_REST = struct.Struct("8qfI")
_WIDE = 16  # bytes of one access


class RowKernel:
    """The kernel of one spec and hidden on one device."""

    def __init__(
        self,
        spec: NormSpec,
        hidden: int,
        device: int,
        schedule: Callable[[NormSpec, int, int], Schedule],
    ) -> None:
        self._spec, self._hidden, self._device = spec, hidden, device
        self._schedule = schedule
        self._capability = torch.cuda.get_device_capability(device)
        self._kernels: Once[ctypes.c_void_p] = Once()
        self._plans: dict[Any, _Plan] = {}
        dtypes = {"out": spec.out, "sum": spec.normed, "row": spec.row_dtype}
        self._made = [dtypes.get(name) if name in spec.outputs else None for name in dtypes]
        self._empty = _allocator(device)

    def prepare(self) -> None:
        """Build the schedules for one, few, some and many rows. Raises BuildError."""
        for rows in (1, 512, 2048, 1 << 20):
            self.kernel(self._schedule(self._spec, self._hidden, rows))

    def kernel(self, schedule: Schedule) -> ctypes.c_void_p:
        """The loaded kernel of a schedule. Raises BuildError."""

        def make() -> ctypes.c_void_p:
            text = cuda_source.source(self._spec, self._hidden, schedule)
            return cuda_driver.load(cuda_build.cubin(text, self._capability), "fxpass_run")

        return self._kernels.get(schedule, make)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> Any:
        """(..., hidden) -> the outputs of the spec, contiguous; a tensor if there is only one."""
        # All that `check` looks at, so that only a new plan has to be checked.
        key = (
            x.shape,
            x.stride(),
            x.dtype,
            eps,
            None if residual is None else residual.shape,
            None if residual is None else residual.stride(),
            None if residual is None else residual.dtype,
            None if residual is None else residual.get_device(),
            None if weight is None else weight.shape,
            None if weight is None else weight.dtype,
            None if weight is None else weight.get_device(),
            None if bias is None else (bias.shape, bias.dtype, bias.get_device()),
        )
        plan = self._plans.get(key)
        if plan is None:
            plan = self._planned(key, x, residual, weight, bias, eps)
        if plan.copies:
            x = x.contiguous()
            residual = None if residual is None else residual.contiguous()
        made = [
            None if dtype is None else self._empty(*plan.outputs[index], dtype)
            for index, dtype in enumerate(self._made)
        ]
        if plan.rows:
            weight = None if weight is None else weight.contiguous()
            bias = None if bias is None else bias.contiguous()
            plan.launch((x, residual, weight, bias, *made), self._device)
        found = [tensor for tensor in made if tensor is not None]
        return found[0] if len(found) == 1 else tuple(found)

    def _planned(
        self,
        key: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> _Plan:
        """Work out the launch for tensors like these, and keep it."""
        check(self._spec, self._hidden, f"cuda:{self._device}", x, residual, weight, bias)
        rows, copies = addressed(x, residual)
        itemsizes = [x.itemsize, 0 if residual is None else residual.itemsize]
        strided = [step for pair in zip(rows.outer, rows.step, strict=True) for step in pair]
        strided += [0] * (4 - len(strided))
        misaligned = 0
        for index, step in enumerate(strided):
            misaligned |= step * itemsizes[index // 2]
        factor_rows = [1 if t is None else t.numel() // self._hidden for t in (weight, bias)]
        arguments = (rows.count, rows.inner, *strided, *factor_rows, steps.single(eps))
        schedule = self._schedule(self._spec, self._hidden, rows.count)
        plan = _Plan(self.kernel(schedule), schedule, arguments, misaligned % _WIDE == 0)
        plan.copies, plan.rows = copies, rows.count
        plan.outputs = _outputs(x.shape)
        if self._capability >= (9, 0):
            plan.overlap()
        if len(self._plans) >= PLANS_MOST:
            self._plans.clear()
        self._plans[key] = plan
        return plan


class _Plan:
    """One launch, complete but for its pointers and stream."""

    copies = False
    rows = 0
    outputs: tuple[tuple[Any, Any], ...] = ()
    """Size and stride of out, sum and row."""

    def __init__(
        self,
        kernel: ctypes.c_void_p,
        schedule: Schedule,
        arguments: tuple[Any, ...],
        aligned: bool,
    ) -> None:
        self._kernel = kernel.value
        self._rest = {wide: _REST.pack(*arguments, wide) for wide in (False, True)}
        self._aligned = aligned
        self._config = cuda_driver.Config(
            grid_x=-(-arguments[0] // schedule.rows), grid_y=1, grid_z=1,
            block_x=schedule.threads * schedule.rows, block_y=1, block_z=1,
        )  # fmt: skip
        self._buffer = ctypes.create_string_buffer(_POINTERS.size + _REST.size)
        self._rest_address = ctypes.addressof(self._buffer) + _POINTERS.size
        self._wide: bool | None = None
        self._parameters = (ctypes.c_void_p * 1)(ctypes.addressof(self._buffer))
        self._addresses = (ctypes.addressof(self._config), ctypes.addressof(self._parameters))
        self._lock = threading.Lock()
        self._go = cuda_driver.launcher()

    def overlap(self) -> None:
        """Let the kernel start while the one before it still runs."""
        cuda_driver.overlap(self._config)

    def launch(self, tensors: tuple[Tensor | None, ...], device: int) -> None:
        """x, residual, weight, bias, out, sum, row; on the device's current stream."""
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        bits = pointers[0] | pointers[1] | pointers[2] | pointers[3]
        wide = self._aligned and bits % _WIDE == 0
        config, parameters = self._addresses
        with self._lock:  # the buffer and the configuration belong to every thread's calls
            if wide is not self._wide:
                ctypes.memmove(self._rest_address, self._rest[wide], _REST.size)
                self._wide = wide
            _POINTERS.pack_into(self._buffer, 0, *pointers)
            self._config.stream = _stream(device)
            status = self._go(config, self._kernel, parameters, None)
            if status == cuda_driver.INVALID_CONTEXT:
                cuda_driver.make_current(device)
                status = self._go(config, self._kernel, parameters, None)
        if status:
            cuda_driver.check(status, "cuLaunchKernelEx")


def _stream(device: int) -> int:
    """The device's current stream, as Inductor gets it (1 us less than in public)."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def _outputs(shape: Any) -> tuple[tuple[Any, Any], ...]:
    full, single = tuple(shape), (*shape[:-1], 1)
    return (
        (full, gpu_rows.dense(full)),
        (full, gpu_rows.dense(full)),
        (single, gpu_rows.dense(single)),
    )


def _allocator(device: int) -> Callable[..., Tensor]:
    """(size, stride, dtype) -> tensor on the current device, which the caller has set."""
    try:
        from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
    except ImportError:
        return lambda size, stride, dtype: torch.empty_strided(
            size, stride, dtype=dtype, device=f"cuda:{device}"
        )
    fast: Callable[..., Tensor] = _empty_strided_cuda
    return fast
