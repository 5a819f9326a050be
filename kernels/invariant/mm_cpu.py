"""The CPU product whose rows do not depend on other rows.

K is cut into chunks of 256. An output element is, within a chunk, one chain of fused multiply-adds
over k in order, and the chunks' sums are added in order, in float32 (float64 for float64). Tiles,
packing, threads and register width only decide when an element is computed: mm_cpu.h.
"""

from __future__ import annotations

import struct

import torch

from fxpass.dtypes import wide
from fxpass.kernels.invariant import cpu_library, mm_plain
from fxpass.kernels.invariant.cpu_library import TYPES

_FORMAT = struct.Struct("5P 5q 4q 4q 4q 4q 2d")  # FxProduct of mm_cpu.h
_FEW_COLUMNS = 4
"""Up to that many columns of b its rows fill no vector."""
_NO_STRIDES = (0, 0, 0, 0)
_MISSING = ((0, 0), (0,), ())  # strides of the batch dims that are not there, by how many are
_ONES = ((1, 1), (1,), ())  # and their sizes


def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> torch.Tensor:
    """The product alpha * a @ b + beta * bias, rounded once. Not differentiable.

    Args:
        a: (M, K) or (B, M, K), bf16, fp16, fp32 or fp64, any strides.
        b: (K, N) or (B, K, N) like `a`, same dtype, any strides.
        bias: Broadcasts to the output; any float dtype. Not read if `beta` is 0.
        alpha: Factor of the product; `a` and `b` are not read if it is 0.
        beta: Factor of the bias.
        out_dtype: Of the output; None is that of `a`.
        tf32: Has no meaning on a CPU.

    Returns:
        (M, N) or (B, M, N), contiguous.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    del tf32
    _check(a, b)
    if 0 < b.shape[-1] <= _FEW_COLUMNS:
        # A value head: the same chains, side by side over the rows. Not by the number of rows,
        # since which of two NaN survives follows their order.
        shape = (*a.shape[:-1], b.shape[-1])
        turned = None if bias is None or beta == 0 else bias.expand(shape).mT
        found = _product(b.mT, a.mT, turned, alpha, beta, out_dtype)
        # Not .contiguous(): it keeps unusual strides of dims of one element.
        return found.view(shape) if shape[-1] == 1 else found.new_empty(shape).copy_(found.mT)
    return _product(a, b, bias, alpha, beta, out_dtype)


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    """`matmul` as it is."""
    if bias is not None:
        shape = (*a.shape[:-1], b.shape[-1])
        bias = None if beta == 0 else bias.to(wide(a.dtype)).expand(shape)
    elif a.dim() == 3 and b.stride(0) == 0 and b.shape[0] > 1:
        rows = _as_rows(a)
        if rows is not None:  # one product instead of many with the same b, which is packed once
            flat = product(rows, b[0], alpha=alpha, out_dtype=out_dtype)
            return flat.view(*a.shape[:2], b.shape[2])
    return product(a, b, bias, alpha=alpha, beta=beta, out_dtype=out_dtype)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
    divisor: torch.Tensor | None = None,
    skip_zeros: bool = False,
) -> torch.Tensor:
    """The product behind `matmul`: of two, three or four dims, all of a, b and bias alike.

    Args:
        a: (..., M, K) of `b`'s dtype, or any 16-bit or fp32 dtype if that of `b` is one too.
        b: (..., K, N), any strides; its dtype picks the kernel.
        bias: (..., M, N) of the dtype that `wide` gives, any strides, or None.
        alpha: As in `matmul`.
        beta: As in `matmul`.
        out_dtype: Of the output; None is that of `a`.
        divisor: (..., M) of the dtype that `wide` gives, contiguous, or None: divides the rows of
            the sum before it is rounded. Not together with `bias`.
        skip_zeros: A zero in `a` adds nothing even where `b` holds NaN or infinity, and leaves the
            bits as if its k did not exist.
    """
    *batch, m, k = a.shape
    n = b.shape[-1]
    made = out_dtype or a.dtype
    written = made if (made == torch.float64) == (b.dtype == torch.float64) else wide(b.dtype)
    out = torch.empty((*batch, m, n), dtype=written)
    work = out.numel() * k
    if work == 0 or alpha == 0:  # as BLAS: the operands are not read, nor a NaN in them
        return _without_products(out, bias, beta).to(made)
    run = cpu_library.library("product", b.dtype)
    if run is None:
        return mm_plain.product(a, b, bias, alpha, beta, divisor, skip_zeros, made)
    missing = _MISSING[len(batch)]
    run(
        _FORMAT.pack(
            a.data_ptr(),
            b.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if divisor is None else divisor.data_ptr(),
            out.data_ptr(),
            *(*_ONES[len(batch)], *batch, m, n, k),
            *(*missing, *a.stride()),
            *(*missing, *b.stride()),
            *(_NO_STRIDES if bias is None else (*missing, *bias.stride())),
            *(TYPES[a.dtype], TYPES[written], skip_zeros),
            cpu_library.threads(0, work),
            *(alpha, beta),
        )
    )
    return out if written == made else out.to(made)


def _without_products(out: torch.Tensor, bias: torch.Tensor | None, beta: float) -> torch.Tensor:
    return out.zero_() if bias is None or out.numel() == 0 else out.copy_(beta * bias)


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    fits = a.dim() == b.dim() and a.dim() in (2, 3) and a.shape[-1] == b.shape[-2]
    if not fits or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"cannot multiply {tuple(a.shape)} by {tuple(b.shape)}")
    if a.dtype != b.dtype or a.dtype not in TYPES:
        raise ValueError(f"cannot multiply {a.dtype} by {b.dtype}")
    if a.device.type != "cpu" or b.device.type != "cpu":
        raise ValueError(f"needs tensors on the CPU, not on {a.device} and {b.device}")


def _as_rows(a: torch.Tensor) -> torch.Tensor | None:
    """(B, M, K) as (B * M, K), if its strides allow that without a copy."""
    return a.flatten(0, 1) if a.stride(0) == a.shape[1] * a.stride(1) else None
