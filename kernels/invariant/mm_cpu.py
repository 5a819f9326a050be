"""The CPU product whose rows do not depend on other rows.

K is cut into chunks of 256. An output element is, within a chunk, one chain of fused multiply-adds
over k in order, and the chunks' sums are added in order, in float32 (float64 for float64). Tiles,
packing, threads and register width only decide when an element is computed: mm_cpu.h.
"""

from __future__ import annotations

import struct

import torch

from fxpass.kernels.invariant import cpu_library, mm_plain
from fxpass.kernels.invariant.cpu_library import TYPES, wide

_FORMAT = struct.Struct("5P 5q 4q 4q 4q 4q 2d")  # FxProduct of mm_cpu.h
_NO_STRIDES = (0, 0, 0, 0)


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
        alpha: Factor of the product.
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
    shape = (*a.shape[:-1], b.shape[-1])
    bias = None if bias is None or beta == 0 else bias.to(wide(a.dtype)).expand(shape)
    if a.dim() == 2:
        operands = [None if t is None else t[None, None] for t in (a, b, bias)]
    else:
        a, b, bias = _without_batch(a, b, bias)
        operands = [None if t is None else t[None] for t in (a, b, bias)]
    a4, b4, bias4 = operands
    assert a4 is not None
    assert b4 is not None
    return product(a4, b4, bias4, alpha=alpha, beta=beta, out_dtype=out_dtype).view(shape)


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
    """The product behind `matmul`, of two leading dims: (P, Q, M, K) @ (P, Q, K, N).

    Args:
        a: Of `b`'s dtype, or any 16-bit or fp32 dtype if that of `b` is one too.
        b: Any strides; its dtype picks the kernel.
        bias: (P, Q, M, N) of the dtype that `wide` gives, any strides, or None.
        alpha: As in `matmul`.
        beta: As in `matmul`.
        out_dtype: Of the output; None is that of `a`.
        divisor: (P, Q, M) of the dtype that `wide` gives, contiguous, or None: divides the rows of
            the sum before it is rounded. Not together with `bias`.
        skip_zeros: A zero in `a` adds nothing even where `b` holds NaN or infinity, and leaves the
            bits as if its k did not exist.
    """
    outer, inner, m, k = a.shape
    n = b.shape[-1]
    made = out_dtype or a.dtype
    written = made if (made == torch.float64) == (b.dtype == torch.float64) else wide(b.dtype)
    out = torch.empty((outer, inner, m, n), dtype=written)
    if out.numel() == 0:
        return out.to(made)
    if k == 0:
        out.zero_()
        return (out if bias is None else out + beta * bias).to(made)
    run = cpu_library.library("product", b.dtype)
    if run is None:
        return mm_plain.product(a, b, bias, alpha, beta, divisor, skip_zeros, made)
    run(
        _FORMAT.pack(
            a.data_ptr(),
            b.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if divisor is None else divisor.data_ptr(),
            out.data_ptr(),
            *(outer, inner, m, n, k),
            *a.stride(),
            *b.stride(),
            *(_NO_STRIDES if bias is None else bias.stride()),
            *(TYPES[a.dtype], TYPES[written], skip_zeros),
            cpu_library.threads(0, out.numel() * k),
            *(alpha, beta),
        )
    )
    return out if written == made else out.to(made)


def _check(a: torch.Tensor, b: torch.Tensor) -> None:
    fits = a.dim() == b.dim() and a.dim() in (2, 3) and a.shape[-1] == b.shape[-2]
    if not fits or a.shape[:-2] != b.shape[:-2]:
        raise ValueError(f"cannot multiply {tuple(a.shape)} by {tuple(b.shape)}")
    if a.dtype != b.dtype or a.dtype not in TYPES:
        raise ValueError(f"cannot multiply {a.dtype} by {b.dtype}")
    if a.device.type != "cpu" or b.device.type != "cpu":
        raise ValueError(f"needs tensors on the CPU, not on {a.device} and {b.device}")


def _without_batch(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One product instead of many where every batch has the same b: b is then packed once."""
    one = b.shape[0] > 1 and b.stride(0) == 0 and a.stride(0) == a.shape[1] * a.stride(1)
    if not one or bias is not None:
        return a, b, bias
    rows = a.as_strided((1, a.shape[0] * a.shape[1], a.shape[2]), (0, *a.stride()[1:]))
    return rows, b[:1], None
