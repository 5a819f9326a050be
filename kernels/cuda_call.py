"""A callable for the CUDA row kernel of one spec: tensors in, tensors out.

Host time matters at decode sizes, where a kernel runs for 1 us: all that follows from shapes and
strides is worked out once and kept, a call only looks it up, fills in pointers and launches.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

from fxpass.kernels import cuda_build, cuda_driver, cuda_source, gpu_rows, steps
from fxpass.kernels.build_cache import Once
from fxpass.kernels.cuda_launch import Prepared, empty_strided
from fxpass.kernels.cuda_source import Schedule
from fxpass.kernels.gpu_call import ROWS_MOST, addressed, check, keep
from fxpass.spec import NormSpec

Tensor = torch.Tensor

_ARGUMENTS = struct.Struct("7Q2q7If2q4I")
"""FxArgs of cuda_row.h, one parameter: seven pointers, then what follows from the shapes."""
_WIDE = 16  # bytes of one access
_BEFORE_CLUSTERS = (8, 0)


class RowKernel:
    """The kernel of one spec and hidden on one device."""

    def __init__(
        self,
        spec: NormSpec,
        hidden: int,
        device: int,
        schedule: Callable[[NormSpec, int, int, tuple[int, int]], Schedule],
    ) -> None:
        self._spec, self._hidden, self._device = spec, hidden, device
        self._schedule = schedule
        self._capability = torch.cuda.get_device_capability(device)
        self._kernels: Once[Prepared] = Once()
        self._plans: dict[Any, _Plan] = {}
        dtypes = {"out": spec.out, "sum": spec.normed, "row": spec.row_dtype}
        self._dtypes = [dtypes[name] if name in spec.outputs else None for name in dtypes]
        order = [name for name in dtypes if name in spec.outputs]
        self._places = [order.index(name) if name in order else None for name in dtypes]

    def prepare(self, rows: Sequence[int]) -> None:
        """Build the schedules for these numbers of rows, on all cores. Raises BuildError."""
        self._build(map(self._scheduled, rows))
        apart = [n for n in rows if not self._fits(self._scheduled(n))]
        self._build(self._scheduled(n, _BEFORE_CLUSTERS) for n in apart)

    def _build(self, every: Iterable[Schedule]) -> None:
        schedules = list(dict.fromkeys(every))
        if not schedules:
            return
        with ThreadPoolExecutor(min(len(schedules), os.cpu_count() or 1)) as pool:
            list(pool.map(self._cubin, schedules))  # NVRTC runs without Python's lock
        for schedule in schedules:
            self.kernel(schedule)

    def _fits(self, schedule: Schedule) -> bool:
        """Whether the device has room for the blocks of a row next to each other."""
        return schedule.blocks == 1 or self.kernel(schedule).fits(schedule.blocks)

    def kernel(self, schedule: Schedule) -> Prepared:
        """The loaded kernel of a schedule. Raises BuildError."""

        def make() -> Prepared:
            found = cuda_driver.load(self._cubin(schedule), "fxpass_run").value
            assert found is not None
            overlap = self._capability >= (9, 0)
            threads = schedule.threads * schedule.rows
            return Prepared(found, threads, _ARGUMENTS, (0,), overlap=overlap)

        return self._kernels.get(schedule, make)

    def _cubin(self, schedule: Schedule) -> bytes:
        text = cuda_source.source(self._spec, self._hidden, schedule)
        return cuda_build.cubin(text, self._capability)

    def _scheduled(self, rows: int, capability: tuple[int, int] | None = None) -> Schedule:
        return self._schedule(self._spec, self._hidden, rows, capability or self._capability)

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        over: bool = False,
    ) -> Any:
        """(..., hidden) -> the outputs of the spec, contiguous; a tensor if there is only one.

        over: write them over x and residual, which are contiguous. The kernel reads an element of
        either in no thread but the one that writes it, and not after.
        """
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
        made = (
            [x, residual]
            if over and residual is not None
            else [empty_strided(self._device, *output) for output in plan.outputs]
        )
        if plan.launch is not None:
            weight = None if weight is None else weight.contiguous()
            bias = None if bias is None else bias.contiguous()
            inputs = [0 if t is None else t.data_ptr() for t in (x, residual, weight, bias)]
            written = [tensor.data_ptr() for tensor in made]
            bits = inputs[0] | inputs[1] | inputs[2] | inputs[3]
            last = plan.narrow if bits % _WIDE else plan.wide
            outputs = [0 if place is None else written[place] for place in self._places]
            plan.launch(self._device, plan.grid, [*inputs, *outputs], last)
        return made[0] if len(made) == 1 else tuple(made)

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
        misaligned = 0
        for outer, step, itemsize in zip(rows.outer, rows.step, itemsizes, strict=False):
            misaligned |= (outer | step) * itemsize
        counts = [
            rows.inner,
            *(1 if t is None else t.numel() // self._hidden for t in (weight, bias)),
        ]
        arguments = functools.partial(_arguments, rows, counts, steps.single(eps))
        schedule = self._scheduled(rows.count)
        if rows.count and not self._fits(schedule):
            schedule = self._scheduled(rows.count, _BEFORE_CLUSTERS)
        kernel = self.kernel(schedule) if rows.count else None
        plan = _Plan(
            kernel,
            (-(-rows.count // schedule.rows) * schedule.blocks, 1, 1),
            arguments(wide=False),
            arguments(wide=misaligned % _WIDE == 0),
            copies,
            [
                (size, gpu_rows.dense(size), dtype)
                for size, dtype in zip(_sizes(x.shape), self._dtypes, strict=True)
                if dtype is not None
            ],
        )
        return keep(self._plans, key, plan)


def _arguments(rows: gpu_rows.Rows, counts: list[int], eps: float, wide: bool) -> tuple[Any, ...]:
    """Of FxArgs, what follows the pointers. counts: inner, and rows of weight and bias."""
    (inner, *how_inner), *others = map(divisor, counts)
    strides = []
    for outer, step in zip(rows.outer, rows.step, strict=True):
        strides += [outer, 0] if inner == 1 else [step, outer - inner * step]
    strides += [0] * (4 - len(strides))
    turns = [n for n, *_ in others]
    how = [number for _, *pair in others for number in pair]
    return (*strides[:2], rows.count, wide, *how_inner, inner, *turns, eps, *strides[2:], *how)


def divisor(n: int) -> tuple[int, int, int]:
    """n, factor and shift: r // n == (r * factor >> 32) >> shift for every r below 2**31.

    Of an n of 1, by which nothing is divided, only itself.

    Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994, theorem 4.2.
    """
    if n == 1:
        return n, 0, 0
    n = min(n, ROWS_MOST)  # no r reaches it
    length = (n - 1).bit_length()
    return n, -(-(1 << (31 + length)) // n), length - 1


class _Plan(NamedTuple):
    """What follows from the shapes and strides of tensors."""

    launch: Prepared | None
    """None if there are no rows."""
    grid: tuple[int, int, int]
    narrow: tuple[Any, ...]
    """Of FxArgs, what follows the pointers."""
    wide: tuple[Any, ...]
    """The same where all addresses are multiples of _WIDE."""
    copies: bool
    """Whether x and residual have to be made contiguous."""
    outputs: list[tuple[Any, ...]]
    """Size, stride and dtype of each."""


def _sizes(shape: Any) -> tuple[tuple[int, ...], ...]:
    """Of out, sum and row."""
    full, single = tuple(shape), (*shape[:-1], 1)
    return full, full, single
