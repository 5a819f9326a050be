"""A callable for the CUDA row kernel of one spec: tensors in, tensors out.

Host time matters at decode sizes, where a kernel runs for 1 us: all that follows from shapes and
strides is worked out once and kept, a call only looks it up, fills in pointers and launches.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Any

import torch

from fxpass.kernels import cuda_build, cuda_driver, cuda_source, gpu_rows, steps
from fxpass.kernels.build_cache import Once
from fxpass.kernels.cuda_launch import Prepared, empty_strided
from fxpass.kernels.cuda_source import Schedule
from fxpass.kernels.gpu_call import PLANS_MOST, addressed, check
from fxpass.spec import NormSpec

Tensor = torch.Tensor

_ARGUMENTS = struct.Struct("7Q8qfI")
"""FxArgs of cuda_row.h, one parameter: seven pointers, then what follows from the shapes."""
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
            None if dtype is None else empty_strided(self._device, *plan.outputs[index], dtype)
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
        narrow, wide = (self._launch(arguments, wide and misaligned % _WIDE == 0)
                        for wide in (False, True))  # fmt: skip
        plan = _Plan(narrow, wide, rows.count, copies, _outputs(x.shape))
        if len(self._plans) >= PLANS_MOST:
            self._plans.clear()
        self._plans[key] = plan
        return plan

    def _launch(self, arguments: tuple[Any, ...], wide: bool) -> Prepared:
        """With `arguments` after the pointers; wide: whether to read _WIDE bytes at a time."""
        schedule = self._schedule(self._spec, self._hidden, arguments[0])
        kernel = self.kernel(schedule).value
        assert kernel is not None
        return Prepared(
            kernel,
            (-(-arguments[0] // schedule.rows), 1, 1),
            schedule.threads * schedule.rows,
            _ARGUMENTS,
            (0,),
            (*arguments, wide),
            overlap=self._capability >= (9, 0),
        )


class _Plan:
    """The launches for tensors whose addresses are multiples of _WIDE, and for others."""

    def __init__(
        self,
        narrow: Prepared,
        wide: Prepared,
        rows: int,
        copies: bool,
        outputs: tuple[tuple[Any, Any], ...],
    ) -> None:
        """outputs: size and stride of out, sum and row."""
        self._narrow, self._wide = narrow, wide
        self.rows, self.copies, self.outputs = rows, copies, outputs

    def launch(self, tensors: tuple[Tensor | None, ...], device: int) -> None:
        """x, residual, weight, bias, out, sum, row; on the device's current stream."""
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        bits = pointers[0] | pointers[1] | pointers[2] | pointers[3]
        (self._narrow if bits % _WIDE else self._wide)(device, *pointers)


def _outputs(shape: Any) -> tuple[tuple[Any, Any], ...]:
    full, single = tuple(shape), (*shape[:-1], 1)
    return (
        (full, gpu_rows.dense(full)),
        (full, gpu_rows.dense(full)),
        (single, gpu_rows.dense(single)),
    )
