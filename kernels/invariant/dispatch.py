"""Products, reductions and attention whose rows are invariant, by the device of the tensors.

Every function says of its last dim what ATen says of `dim`; `fxpass.invariant.aten` makes ATen's
operators of them. The modules of a device are imported when the first of its tensors comes. While a
graph is traced, `through` puts operators in their place.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from fxpass.kernels.invariant import solve
from fxpass.kernels.invariant.convolve import Windows, convolve

Tensor = torch.Tensor

DEVICES = ("cpu", "cuda")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@functools.cache
def products(device: str) -> Any:
    """The module with `matmul` for a device type."""
    if device == "cpu":
        from fxpass.kernels.invariant import mm_cpu

        return mm_cpu
    from fxpass.kernels.invariant import mm_gpu

    return mm_gpu


@functools.cache
def reductions(device: str) -> Any:
    """The module with the `row_` functions for a device type."""
    if device == "cpu":
        from fxpass.kernels.invariant import reduce_cpu

        return reduce_cpu
    from fxpass.kernels.invariant import reduce_gpu

    return reduce_gpu


@functools.cache
def attentions(device: str) -> Any:
    """The module with `attention` for a device type."""
    if device == "cpu":
        from fxpass.kernels.invariant import attention_cpu

        return attention_cpu
    from fxpass.kernels.invariant import attention_gpu

    return attention_gpu


class _Through(threading.local):
    operators: Any = None


_through = _Through()


@contextlib.contextmanager
def through(operators: Any) -> Iterator[None]:
    """Have this thread call `operators`, an object with functions of the same names, meanwhile."""
    before, _through.operators = _through.operators, operators
    try:
        yield
    finally:
        _through.operators = before


def is_through() -> bool:
    """Whether this thread's calls become operators of a graph."""
    return _through.operators is not None


def _products(x: Tensor) -> Any:
    return _through.operators or products(x.device.type)


def _reductions(x: Tensor) -> Any:
    return _through.operators or reductions(x.device.type)


def _attentions(x: Tensor) -> Any:
    return _through.operators or attentions(x.device.type)


def takes(x: Tensor, product: bool = False) -> bool:
    """Whether there are kernels for a tensor: its device, layout and dtype."""
    device = x.device.type
    if device not in DEVICES or x.layout != torch.strided or x.dtype not in FLOATS:
        return False
    return not (product and device == "cuda" and x.dtype == torch.float64)


def matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> Tensor:
    """`beta * bias + alpha * (a @ b)`, added up in float32 and rounded once.

    a (M, K) or (B, M, K); b (K, N) or (B, K, N); any strides; bias broadcasts to the output.
    """
    made: Tensor = _products(a).matmul(
        a, b, bias, alpha=alpha, beta=beta, out_dtype=out_dtype, tf32=tf32
    )
    return made


def grouped_matmul(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows ends[i - 1] to ends[i] - 1 of a (M, K), times b[i] of (G, K, N) -> (M, N).

    Reads `ends` on the host. Rows after the last end are zeros.
    """
    if _through.operators is not None:
        traced: Tensor = _through.operators.grouped_matmul(a, b, ends)
        return traced
    out, start = a.new_zeros(a.shape[0], b.shape[2]), 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = matmul(a[start:end], b[group])
        start = end
    return out


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    windows: Windows,
    *,
    channels_last: bool,
    tf32: bool = False,
) -> Tensor:
    """aten::convolution (see `convolve`): (N, O, *S'), contiguous or with channels innermost."""
    if _through.operators is not None:
        traced: Tensor = _through.operators.convolution(
            x, weight, bias, *windows, channels_last, tf32
        )
        return traced
    made = convolve(x, weight, bias, windows, functools.partial(matmul, tf32=tf32)).movedim(-1, 1)
    # Not .contiguous(), which keeps the strides of dims of one element.
    return made if channels_last else made.clone(memory_format=torch.contiguous_format)


def solve_lower(a: Tensor, b: Tensor, unit: bool) -> Tensor:
    """The x with a @ x = b for lower triangles a (B, N, N); b and x (B, N, K). See `solve`."""
    if _through.operators is not None:
        traced: Tensor = _through.operators.solve_lower(a, b, unit)
        return traced
    return solve.solve_lower(a, b, unit, matmul)


def row_sum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The sum over the last dim."""
    made: Tensor = _reductions(x).row_sum(x, dtype=dtype)
    return made


def row_mean(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """The mean over the last dim."""
    made: Tensor = _reductions(x).row_mean(x, dtype=dtype)
    return made


def row_norm(x: Tensor, p: float, *, dtype: torch.dtype) -> Tensor:
    """The p-norm over the last dim."""
    made: Tensor = _reductions(x).row_norm(x, p, dtype=dtype)
    return made


def row_logsumexp(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """log(sum(exp(x))) over the last dim."""
    made: Tensor = _reductions(x).row_logsumexp(x, dtype=dtype)
    return made


def row_softmax(x: Tensor, *, dtype: torch.dtype, log: bool) -> Tensor:
    """(Log-)softmax over the last dim, of x's shape."""
    made: Tensor = _reductions(x).row_softmax(x, dtype=dtype, log=log)
    return made


def row_var_mean(x: Tensor, correction: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Variance and mean over the last dim."""
    made: tuple[Tensor, Tensor] = _reductions(x).row_var_mean(x, correction, dtype=dtype)
    return made


def row_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm over the last dim: (out in x's dtype, mean, rstd), the last two in float32."""
    made: tuple[Tensor, Tensor, Tensor] = _reductions(x).row_layer_norm(x, weight, bias, eps)
    return made


def row_cumsum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Running sums along the last dim."""
    made: Tensor = _reductions(x).row_cumsum(x, dtype=dtype)
    return made


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of (B, H, L, D) tensors: (out, logsumexp in float32)."""
    made: tuple[Tensor, Tensor] = _attentions(q).attention(
        q, k, v, mask, causal=causal, scale=scale
    )
    return made
