"""One product, complete but for its tensors: what is checked, picked and launched.

Triton finds the compiled kernel for each call's arguments again, by their types, alignment and
values; the first launch of a plan is made like that, and what it returns is launched directly from
then on, with addresses for tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from fxpass.kernels.invariant.chunks import mm_chunk
from fxpass.kernels.invariant.mm_schedule import Device, Problem, Schedule, pick

Tensor = torch.Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNED = 16  # bytes: what Triton compiles pointers for, and what descriptors need
_FAR = 2**31
_FINISH_BLOCK = 1024


def planned(
    a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, tf32: bool
) -> Plan:
    """Check the operands and work out the launches for all others like them."""
    out_dtype = out_dtype or a.dtype
    shape = _checked(a, b, bias, out_dtype)
    if bias is not None:
        try:
            bias = bias.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"bias's shape {tuple(bias.shape)} does not broadcast to {tuple(shape)}"
            ) from None
    if not shape.numel() or not a.shape[-1]:
        return _Trivial(shape, out_dtype, a.device)
    problem = _problem(a, b, out_dtype, tf32)
    schedule = pick(device_of(a.get_device()), problem)
    return _Launched(a, b, bias, out_dtype, problem, schedule, tf32)


class Plan:
    """(a, b, bias, alpha, beta) -> the product, for operands like those it was made from."""

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        """See `mm_gpu.matmul`."""
        raise NotImplementedError


class _Trivial(Plan):
    """No elements, or no sums."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        if bias is None:
            return torch.zeros(self._shape, dtype=self._dtype, device=self._device)
        made = (bias.float() * beta).to(self._dtype)
        return made.expand(self._shape).clone(memory_format=torch.contiguous_format)


class _Launched(Plan):
    """One kernel, or two if the chunks are split over programs."""

    def __init__(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        problem: Problem,
        schedule: Schedule,
        tf32: bool,
    ) -> None:
        from fxpass.kernels.invariant import mm_triton

        self._dtype, self._device = out_dtype, a.get_device()
        self._shape = (*a.shape[:-1], problem.n)
        self._sums = schedule.kind == "split"
        self._sums_shape = (problem.batch, problem.chunks, problem.m, problem.n)
        self._tma = _descriptors(a, b, schedule) if schedule.kind == "tma" else None
        tiles = -(-problem.m // schedule.block_m) * -(-problem.n // schedule.block_n)
        precision = "tf32" if tf32 else "ieee"
        bias_steps = (0, 0, 0) if bias is None else _three(bias)
        sizes = (problem.m, problem.n, problem.k)
        common = {
            # With one chunk one kernel does for all K.
            "CHUNK": problem.chunk if problem.chunks > 1 or self._sums else 0,
            "BLOCK_M": schedule.block_m,
            "BLOCK_N": schedule.block_n,
            "BLOCK_K": schedule.block_k,
            "GROUP": schedule.group,
        }
        options: dict[str, Any] = {"num_warps": schedule.warps, "num_stages": schedule.stages}
        if torch.version.hip is not None:
            options["matrix_instr_nonkdim"] = 16
        if self._tma is not None:
            constants = {
                **common,
                "SINGLE": problem.chunks == 1,
                "A_TRANSPOSED": self._tma[0],
                "B_TRANSPOSED": self._tma[1],
                "HAS_BIAS": bias is not None,
                "PRECISION": precision,
            }
            programs = min(tiles, schedule.programs * device_of(self._device).processors)
            self._first = _Launch(
                mm_triton.product_tma, programs, (*sizes, *bias_steps[1:]), constants, options
            )
            self._blocks = _blocks(schedule, self._tma)
            return
        constants = {
            **common,
            "SPLIT": self._sums,
            "SINGLE": problem.chunks == 1,
            "EVEN_K": problem.k % schedule.block_k == 0,
            "WIDE": _is_far(a, b),
            "HAS_BIAS": bias is not None and not self._sums,
            "PRECISION": precision,
            "PDL": self._sums and _has_pdl(self._device),
        }
        programs = tiles * problem.batch * (problem.chunks if self._sums else 1)
        integers = (*sizes, *_three(a), *_three(b), *bias_steps)
        self._first = _Launch(mm_triton.product, programs, integers, constants, options)
        if self._sums:
            pdl = _has_pdl(self._device)
            block = min(_FINISH_BLOCK, 1 << max(5, (problem.n - 1).bit_length()))
            constants = {"CHUNKS": problem.chunks, "BLOCK": block}
            constants |= {"HAS_BIAS": bias is not None, "PDL": pdl}
            programs = problem.batch * problem.m * -(-problem.n // block)
            options = {"num_warps": 4, **({"launch_pdl": True} if pdl else {})}
            self._second = _Launch(
                mm_triton.finish,
                programs,
                (problem.m, problem.n, *bias_steps),
                constants,
                options,
            )

    def __call__(
        self, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float
    ) -> Tensor:
        out = a.new_empty(self._shape, dtype=self._dtype)
        shared = out if bias is None else bias  # never read without a bias
        here = self._device < 0 or torch.cuda.current_device() == self._device
        with nullcontext() if here else torch.cuda.device(self._device):
            if self._tma is not None:
                self._by_tma(a, b, out, shared, alpha, beta)
            elif self._sums:
                sums = a.new_empty(self._sums_shape, dtype=torch.float32)
                self._first((a, b, shared, sums), (alpha, beta))
                self._second((sums, shared, out), (alpha, beta))
            else:
                self._first((a, b, shared, out), (alpha, beta))
        return out

    def _by_tma(
        self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor, alpha: float, beta: float
    ) -> None:
        from triton.tools.tensor_descriptor import TensorDescriptor

        assert self._tma is not None
        if (a.data_ptr() | b.data_ptr()) % _ALIGNED:
            # Rare enough: operands like these, but at an odd address. The same bits.
            a = a.clone() if a.data_ptr() % _ALIGNED else a
            b = b.clone() if b.data_ptr() % _ALIGNED else b
        views = (a.mT if self._tma[0] else a, b.mT if self._tma[1] else b, out)
        made = [
            TensorDescriptor(view, list(view.shape), list(view.stride()), list(block))
            for view, block in zip(views, self._blocks, strict=True)
        ]
        self._first((*made, bias), (alpha, beta))


class _Launch:
    """One kernel with its grid, integers and constants."""

    def __init__(
        self,
        kernel: Any,
        programs: int,
        integers: tuple[int, ...],
        constants: dict[str, Any],
        options: dict[str, Any],
    ) -> None:
        self._kernel, self._grid = kernel, (programs, 1, 1)
        self._integers, self._constants, self._options = integers, constants, options
        names = kernel.arg_names[-len(constants) :]
        self._last = (*integers, *(constants[name] for name in names))
        self._again: Callable[..., Any] | None = None
        self._reusable = torch.version.hip is None  # there Triton looks at the size of memory, too

    def __call__(self, tensors: Sequence[Any], floats: tuple[float, ...]) -> None:
        """On the current stream of the current device."""
        if not self._reusable:
            self._by_triton(tensors, floats)
            return
        pointers = [t.data_ptr() if isinstance(t, Tensor) else t for t in tensors]
        if any(type(p) is int and p % _ALIGNED for p in pointers):
            self._by_triton(tensors, floats)
        elif self._again is not None:
            self._again(*pointers, *floats, *self._last)
        else:
            compiled = self._by_triton(tensors, floats)
            if hasattr(compiled, "__getitem__"):
                self._again = compiled[self._grid]

    def _by_triton(self, tensors: Sequence[Any], floats: tuple[float, ...]) -> Any:
        kernel = self._kernel[self._grid]
        return kernel(*tensors, *floats, *self._integers, **self._constants, **self._options)


# ---- What a plan is made from --------------------------------------------------------------------


def _checked(a: Tensor, b: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> torch.Size:
    """The shape of the result. Raises TypeError or ValueError, in one line."""
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {tensor.dtype}, needs bfloat16, float16 or float32")
    if a.dtype != b.dtype or a.device != b.device:
        raise TypeError(f"b is {b.dtype} on {b.device}, needs {a.dtype} on {a.device}")
    if out_dtype not in DTYPES:
        raise TypeError(f"out_dtype is {out_dtype}, needs bfloat16, float16 or float32")
    if bias is not None and (bias.dtype not in DTYPES or bias.device != a.device):
        raise TypeError(f"bias is {bias.dtype} on {bias.device}, needs up to float32 on {a.device}")
    fits = a.dim() == b.dim() and a.dim() in (2, 3) and a.shape[:-2] == b.shape[:-2]
    if not fits or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not fit")
    return torch.Size((*a.shape[:-1], b.shape[-1]))


def _problem(a: Tensor, b: Tensor, out_dtype: torch.dtype, tf32: bool) -> Problem:
    n, k, batched = b.shape[-1], a.shape[-1], a.dim() == 3
    bits = 8 * a.dtype.itemsize
    ours = a.dim() == 2 and bits == 16 and n * out_dtype.itemsize % _ALIGNED == 0
    return Problem(
        m=a.shape[-2],
        n=n,
        k=k,
        batch=a.shape[0] if batched else 1,
        chunk=mm_chunk(k, n, a.dtype, batched=batched),
        bits=bits,
        exact=bits == 32 and not tf32,
        tma=ours and _describable(a) and _describable(b),
    )


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can be made of a matrix or of its transpose."""
    row, col = matrix.stride()
    outer = row if col == 1 else col
    return 1 in (row, col) and outer > 1 and outer * matrix.element_size() % _ALIGNED == 0


def _descriptors(a: Tensor, b: Tensor, schedule: Schedule) -> tuple[bool, bool]:
    """Whether the descriptors of a and b are those of their transposes."""
    return a.stride(1) != 1, b.stride(1) != 1


def _blocks(schedule: Schedule, transposed: tuple[bool, bool]) -> list[tuple[int, int]]:
    _, block_m, block_n, block_k, *_ = schedule
    return [
        (block_k, block_m) if transposed[0] else (block_m, block_k),
        (block_n, block_k) if transposed[1] else (block_k, block_n),
        (block_m, block_n),
    ]


def _three(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, row and column."""
    return (0, *tensor.stride()) if tensor.dim() == 2 else tensor.stride()


def _is_far(*tensors: Tensor) -> bool:
    """Whether offsets inside a matrix, or a little past its end, need 64 bits."""
    return any(
        sum((size + 512) * step for size, step in zip(t.shape[-2:], t.stride()[-2:], strict=True))
        >= _FAR
        for t in tensors
    )


@cache
def device_of(index: int) -> Device:
    """What schedules need to know about a device."""
    if index < 0:  # Triton's interpreter
        return Device("nvidia", 0, 4)
    found = torch.cuda.get_device_properties(index)
    family = "nvidia" if torch.version.hip is None else "amd"
    return Device(family, found.major, found.multi_processor_count)


def _has_pdl(index: int) -> bool:
    return torch.version.hip is None and device_of(index).major >= 9
