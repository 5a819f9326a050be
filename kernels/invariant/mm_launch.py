"""Launches of a product's kernels, complete but for the tensors.

Triton finds the compiled kernel for each call's arguments again, by their types, alignment and
values; the first launch of a plan is made like that, and what it returns is launched directly from
then on, with addresses for tensors. A plan is only for operands whose shapes, strides, dtypes and
alignment are those of the operands it was made from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from fxpass.kernels.invariant.mm_schedule import Problem, Schedule

Tensor = torch.Tensor

ALIGNED = 16
"""Bytes: what Triton compiles pointers for, and what descriptors need."""
_FINISH_BLOCK = 1024


class Plan:
    """(a, b, bias, alpha, beta) -> the product, for operands like those it was made from."""

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        """See `mm_gpu.matmul`."""
        raise NotImplementedError


class Trivial(Plan):
    """No elements, or no sums."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        """The bias, or zeros."""
        made = a.new_zeros(self._shape, dtype=self._dtype)
        return made if bias is None else made.copy_(bias.float() * beta)


class Launch:
    """One kernel with its grid, integers and constants."""

    def __init__(
        self,
        kernel: Any,
        programs: int,
        integers: tuple[int, ...],
        constants: dict[str, Any],
        options: dict[str, Any],
        aligned: bool,
    ) -> None:
        self._kernel, self._grid = kernel, (programs, 1, 1)
        self._integers, self._constants, self._options = integers, constants, options
        names = kernel.arg_names[-len(constants) :]
        self._last = (*integers, *(constants[name] for name in names))
        self._again: Callable[..., Any] | None = None
        # For AMD GPUs Triton also looks at the size of the memory that a tensor is a view of.
        self._reusable = aligned and torch.version.hip is None

    def __call__(self, tensors: Sequence[Any], alpha: float, beta: float) -> None:
        """On the current stream of the current device; tensors or descriptors."""
        if self._again is not None:
            given = [t.data_ptr() if isinstance(t, Tensor) else t for t in tensors]
            self._again(*given, alpha, beta, *self._last)
            return
        compiled = self._kernel[self._grid](
            *tensors, alpha, beta, *self._integers, **self._constants, **self._options
        )
        if self._reusable and hasattr(compiled, "__getitem__"):
            self._again = compiled[self._grid]


class _Launched(Plan):
    """What plans with kernels share."""

    def __init__(self, problem: Problem, shape: torch.Size, dtype: torch.dtype, index: int) -> None:
        self._shape, self._dtype, self._device = shape, dtype, index

    def _empty(self, like: Tensor) -> Tensor:
        """Memory for the result; a dtype that has to be named costs 2 us."""
        if like.dtype == self._dtype:
            return like.new_empty(self._shape)
        return like.new_empty(self._shape, dtype=self._dtype)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Triton launches on the current device."""
        if self._device < 0 or torch.cuda.current_device() == self._device:
            return nullcontext()
        return torch.cuda.device(self._device)


class Pointers(_Launched):
    """`product`, and `finish` if the chunks are split over programs."""

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        shape: torch.Size,
        dtype: torch.dtype,
        index: int,
        steps: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None],
        *,
        copies: bool,
        tf32: bool,
        wide: bool,
        pdl: bool,
        aligned: bool,
    ) -> None:
        """Of the arguments that explain themselves least.

        Args:
            problem: what is computed.
            schedule: how.
            shape: of the result, like the next two.
            dtype: see there.
            index: of the device.
            steps: strides of batch, row and column of a, b and bias.
            copies: whether b has to be made contiguous; the strides are those of the copy.
            tf32: whether float32 operands may be rounded.
            wide: whether offsets need 64 bits.
            pdl: whether a kernel may be launched before the one it depends on has ended.
            aligned: whether all tensors start at a multiple of ALIGNED bytes.
        """
        from fxpass.kernels.invariant import mm_triton

        super().__init__(problem, shape, dtype, index)
        split = schedule.kind == "split"
        chunks = problem.chunks
        biased = steps[2] is not None
        bias_steps = steps[2] or (0, 0, 0)
        constants = {
            **_common(problem, schedule),
            "SPLIT": split,
            "SINGLE": chunks == 1,
            "EVEN_K": problem.k % schedule.block_k == 0,
            "WIDE": wide,
            "HAS_BIAS": biased and not split,
            "PRECISION": "tf32" if tf32 else "ieee",
            "PDL": split and pdl,
        }
        integers = (problem.m, problem.n, problem.k, *steps[0], *steps[1], *bias_steps)
        programs = _tiles(problem, schedule) * problem.batch * (chunks if split else 1)
        options = _options(schedule)
        self._first = Launch(mm_triton.product, programs, integers, constants, options, aligned)
        self._copies = copies
        self._sums = (problem.batch, chunks, problem.m, problem.n) if split else None
        if split:
            block = min(_FINISH_BLOCK, 1 << max(5, (problem.n - 1).bit_length()))
            constants = {"CHUNKS": chunks, "BLOCK": block, "HAS_BIAS": biased, "PDL": pdl}
            self._second = Launch(
                mm_triton.finish,
                problem.batch * problem.m * -(-problem.n // block),
                (problem.m, problem.n, *bias_steps),
                constants,
                {"num_warps": 4, **({"launch_pdl": True} if pdl else {})},
                aligned,
            )

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        """Allocates the result, and the chunks' sums if need be."""
        out = self._empty(a)
        shared = out if bias is None else bias  # not read without a bias
        if self._copies:
            b = b.contiguous()
        with self._on_device():
            if self._sums is None:
                self._first((a, b, shared, out), alpha, beta)
            else:
                sums = a.new_empty(self._sums, dtype=torch.float32)
                self._first((a, b, shared, sums), alpha, beta)
                self._second((sums, shared, out), alpha, beta)
        return out


class Descriptors(_Launched):
    """`product_tma`."""

    def __init__(
        self,
        problem: Problem,
        schedule: Schedule,
        shape: torch.Size,
        dtype: torch.dtype,
        index: int,
        operands: tuple[Tensor, Tensor],
        bias_steps: tuple[int, int] | None,
        processors: int,
    ) -> None:
        """bias_steps: strides of row and column."""
        from fxpass.kernels.invariant import mm_triton

        super().__init__(problem, shape, dtype, index)
        transposed = [matrix.stride(1) != 1 for matrix in operands]
        constants = {
            **_common(problem, schedule),
            "SINGLE": problem.chunks == 1,
            "A_TRANSPOSED": transposed[0],
            "B_TRANSPOSED": transposed[1],
            "HAS_BIAS": bias_steps is not None,
            "FULL_BIAS": problem.full_bias,
            "PRECISION": "ieee",
        }
        integers = (problem.m, problem.n, problem.k, *(bias_steps or (0, 0)))
        programs = min(_tiles(problem, schedule), schedule.programs * processors)
        options = _options(schedule)
        self._first = Launch(mm_triton.product_tma, programs, integers, constants, options, True)
        a, b = (m.mT if turned else m for m, turned in zip(operands, transposed, strict=True))
        self._views = [
            (tuple(view.shape), tuple(view.stride()), block)
            for view, block in zip((a, b), blocks(schedule, transposed), strict=False)
        ]
        self._views.append((tuple(shape), (problem.n, 1), (schedule.block_m, schedule.block_n)))
        self._kind = mm_triton.DESCRIPTOR
        self._fields: list[dict[str, Any]] | None = None

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        """Allocates the result."""
        out = self._empty(a)
        with self._on_device():
            made = self._described((a, b, out))
            self._first((*made, out if bias is None else bias), alpha, beta)
        return out

    def _described(self, tensors: tuple[Tensor, ...]) -> list[Any]:
        """A descriptor of each tensor. Triton checks the first ones."""
        kind = self._kind
        if self._fields is None:
            made = [
                kind(tensor, *map(list, view))
                for tensor, view in zip(tensors, self._views, strict=True)
            ]
            # Without the tensors: a plan keeps no memory alive.
            self._fields = [{**vars(descriptor), "base": None} for descriptor in made]
            return made
        made = []
        for tensor, fields in zip(tensors, self._fields, strict=True):
            descriptor = object.__new__(kind)
            vars(descriptor).update(fields)
            descriptor.base = tensor
            made.append(descriptor)
        return made


def blocks(schedule: Schedule, transposed: Sequence[bool]) -> list[tuple[int, int]]:
    """Shapes of the blocks of a, b and the result that descriptors move."""
    _, block_m, block_n, block_k, *_ = schedule
    return [
        (block_k, block_m) if transposed[0] else (block_m, block_k),
        (block_n, block_k) if transposed[1] else (block_k, block_n),
        (block_m, block_n),
    ]


def _common(problem: Problem, schedule: Schedule) -> dict[str, Any]:
    return {
        # With one chunk one kernel does for all K.
        "CHUNK": problem.chunk if problem.chunks > 1 or schedule.kind == "split" else 0,
        "BLOCK_M": schedule.block_m,
        "BLOCK_N": schedule.block_n,
        "BLOCK_K": schedule.block_k,
        "GROUP": schedule.group,
    }


def _options(schedule: Schedule) -> dict[str, Any]:
    options = {"num_warps": schedule.warps, "num_stages": schedule.stages}
    if torch.version.hip is not None:
        options["matrix_instr_nonkdim"] = 16  # one matrix instruction for all tiles
    return options


def _tiles(problem: Problem, schedule: Schedule) -> int:
    return -(-problem.m // schedule.block_m) * -(-problem.n // schedule.block_n)
