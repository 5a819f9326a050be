"""From the operands of a product to a plan: what is checked, and what a schedule is picked by."""

from __future__ import annotations

from functools import cache

import torch

from fxpass.kernels.invariant.chunks import mm_chunk
from fxpass.kernels.invariant.mm_launch import Descriptors, Plan, Pointers, Trivial
from fxpass.kernels.invariant.mm_schedule import MOST_ROWS_IN_PLACE, Device, Problem, pick
from fxpass.kernels.triton_launch import ALIGNED

Tensor = torch.Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FAR = 2**31


def planned(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
    tf32: bool,
    aligned: bool,
) -> Plan:
    """Check the operands and work out the launches for all others like them.

    Args:
        a: as in `mm_gpu.matmul`, like the next four.
        b: see there.
        bias: see there.
        out_dtype: see there.
        tf32: see there.
        aligned: whether all tensors start at a multiple of ALIGNED bytes.

    Raises:
        TypeError: see there.
        ValueError: see there.
    """
    out_dtype = out_dtype or a.dtype
    shape = _checked(a, b, bias, out_dtype)
    bias_steps = None if bias is None else _bias_steps(bias, shape)
    if not shape.numel() or not a.shape[-1]:
        return Trivial(shape, out_dtype)
    tf32 = tf32 and torch.version.hip is None  # not all AMD GPUs have it; exact is allowed
    full_bias = bias_steps is not None and bias_steps[1] != 0
    problem = _problem(a, b, out_dtype, tf32, aligned, full_bias)
    index = a.get_device()
    device = device_of(index)
    schedule = pick(device, problem)
    if schedule.kind == "tma":
        steps = None if bias_steps is None else (bias_steps[1], bias_steps[2])
        return Descriptors(
            problem, schedule, shape, out_dtype, index, (a, b), steps, device.processors
        )
    copies = problem.exact and problem.m > MOST_ROWS_IN_PLACE and _has_columns(b)
    if copies:
        b = torch.empty(b.shape, dtype=b.dtype, device="meta")
    return Pointers(
        problem,
        schedule,
        shape,
        out_dtype,
        index,
        (_three(a), _three(b), bias_steps),
        copies=copies,
        tf32=tf32,
        wide=_is_far(a) or _is_far(b) or 128 * problem.n >= _FAR,
        pdl=device.family == "nvidia" and device.major >= 9,
        aligned=aligned,
    )


@cache
def device_of(index: int) -> Device:
    """What schedules need to know about a device; -1 is the host, where Triton interprets."""
    if index < 0:
        return Device("nvidia", 0, 4, 1 << 20)
    found = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Device("amd", found.major, found.multi_processor_count, 64 << 10)
    shared = int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))
    return Device("nvidia", found.major, found.multi_processor_count, shared)


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


def _bias_steps(bias: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Strides of batch, row and column; 0 where it is repeated."""
    try:
        return _three(bias.expand(shape))
    except RuntimeError:
        found = f"bias's shape {tuple(bias.shape)}"
        raise ValueError(f"{found} does not broadcast to {tuple(shape)}") from None


def _problem(
    a: Tensor, b: Tensor, out_dtype: torch.dtype, tf32: bool, aligned: bool, full_bias: bool
) -> Problem:
    n, k, batched = b.shape[-1], a.shape[-1], a.dim() == 3
    bits = 8 * a.dtype.itemsize
    tma = aligned and not batched and bits == 16 and n * out_dtype.itemsize % ALIGNED == 0
    return Problem(
        m=a.shape[-2],
        n=n,
        k=k,
        batch=a.shape[0] if batched else 1,
        chunk=mm_chunk(k, n, a.dtype, batched=batched),
        bits=bits,
        out_bits=8 * out_dtype.itemsize,
        exact=bits == 32 and not tf32,
        tma=tma and _describable(a) and _describable(b),
        full_bias=full_bias,
    )


def _describable(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can be made of a matrix or of its transpose."""
    row, col = matrix.stride()
    outer = row if col == 1 else col
    return 1 in (row, col) and outer > 1 and outer * matrix.element_size() % ALIGNED == 0


def _has_columns(matrix: Tensor) -> bool:
    """Whether columns are contiguous and rows are not."""
    return matrix.stride(-2) == 1 and matrix.stride(-1) != 1


def _three(tensor: Tensor) -> tuple[int, ...]:
    """Strides of batch, row and column."""
    return (0, *tensor.stride()) if tensor.dim() == 2 else tensor.stride()


def _is_far(matrix: Tensor) -> bool:
    """Whether offsets inside a matrix, or a little past its end, need 64 bits."""
    sizes, steps = matrix.shape[-2:], matrix.stride()[-2:]
    return sum((size + 512) * step for size, step in zip(sizes, steps, strict=True)) >= _FAR
