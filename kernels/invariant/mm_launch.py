"""Plans: a product's launches, complete but for the tensors.

A plan is only for operands whose shapes, strides, dtypes and alignment are those of the operands it
was made from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxpass.kernels.cuda_launch import empty_strided, on_device
from fxpass.kernels.gpu_rows import dense
from fxpass.kernels.invariant.mm_schedule import Problem, Schedule
from fxpass.kernels.invariant.tensor_map import MatrixMaps
from fxpass.kernels.triton_launch import Launch

Tensor = torch.Tensor

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


class _Launched(Plan):
    """What plans with kernels share."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, index: int) -> None:
        self._device = index
        self._out = (index, tuple(shape), dense(shape), dtype)


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

        super().__init__(shape, dtype, index)
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
        self._first = Launch(
            mm_triton.product, (programs,), integers, constants, options, aligned=aligned
        )
        self._copies = copies
        sums = (problem.batch, chunks, problem.m, problem.n)
        self._sums = (index, sums, dense(sums), torch.float32) if split else None
        if split:
            block = min(_FINISH_BLOCK, 1 << max(5, (problem.n - 1).bit_length()))
            constants = {"CHUNKS": chunks, "BLOCK": block, "HAS_BIAS": biased, "PDL": pdl}
            self._second = Launch(
                mm_triton.finish,
                (problem.batch * problem.m * -(-problem.n // block),),
                (problem.m, problem.n, *bias_steps),
                constants,
                {"num_warps": 4, **({"launch_pdl": True} if pdl else {})},
                aligned=aligned,
            )

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        """Allocates the result, and the chunks' sums if need be."""
        if self._copies:
            b = b.contiguous()
        with on_device(self._device):
            out = empty_strided(*self._out)
            shared = out if bias is None else bias  # not read without a bias
            if self._sums is None:
                self._first(self._device, (a, b, shared, out), alpha, beta)
            else:
                sums = empty_strided(*self._sums)
                self._first(self._device, (a, b, shared, sums), alpha, beta)
                self._second(self._device, (sums, shared, out), alpha, beta)
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

        super().__init__(shape, dtype, index)
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
        self._launch = Launch(
            mm_triton.product_tma, (programs,), integers, constants, options, aligned=True
        )
        a, b = (m.mT if turned else m for m, turned in zip(operands, transposed, strict=True))
        self._views = [
            (tuple(view.shape), tuple(view.stride()), block)
            for view, block in zip((a, b), blocks(schedule, transposed), strict=False)
        ]
        self._views.append((tuple(shape), (problem.n, 1), (schedule.block_m, schedule.block_n)))
        self._dtypes = (a.dtype, b.dtype, dtype)
        self._rest = [(*shape, *strides) for shape, strides, _ in self._views]
        self._maps: list[MatrixMaps] | None = None

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        """Allocates the result."""
        with on_device(self._device):
            out = empty_strided(*self._out)
            given, added = (a, b, out), out if bias is None else bias
            if self._maps is None and not self._find_maps((*given, added), alpha, beta):
                self._with_descriptors(given, added, alpha, beta)
                return out
            leading: list[Any] = []
            for tensor, make, rest in zip(given, self._maps or (), self._rest, strict=True):
                leading += (make(tensor.data_ptr()), *rest)
            again = self._launch.again
            assert again is not None
            again(self._device, [*leading, added.data_ptr(), alpha, beta])
        return out

    def _find_maps(self, tensors: Sequence[Tensor], alpha: float, beta: float) -> bool:
        """Whether the kernel is known, and can be launched with maps that are made here."""
        if self._launch.again is not None and not self._launch.is_direct:
            return False  # Triton makes them
        # Another thread may be between the launch and its maps: it is asked for again.
        found = self._launch.known(self._device, tensors, alpha, beta)
        if found is None or not self._launch.is_direct:
            return False
        self._maps = self._made_maps(found.compiled.metadata.tensordesc_meta)
        return True

    def _with_descriptors(
        self, tensors: tuple[Tensor, ...], added: Tensor, alpha: float, beta: float
    ) -> None:
        """By Triton, which makes maps of them; every launch is, if the driver is too old.

        Making and checking descriptors then costs the host 20 us more.
        """
        from fxpass.kernels.invariant.mm_triton import DESCRIPTOR

        made = [
            DESCRIPTOR(tensor, *map(list, view))
            for tensor, view in zip(tensors, self._views, strict=True)
        ]
        again = self._launch.again
        if again is None or self._launch.is_direct:
            self._launch.first(self._device, (*made, added), alpha, beta)
        else:
            again(self._device, [*made, added.data_ptr(), alpha, beta])

    def _made_maps(self, told: Sequence[Any]) -> list[MatrixMaps]:
        """What the compiled kernel reads and writes matrices by."""
        return [
            MatrixMaps(dtype, shape, strides[0], one["block_size"], one["swizzle"])
            for dtype, (shape, strides, _), one in zip(self._dtypes, self._views, told, strict=True)
        ]


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
