"""Products: mm, addmm, bmm and what is made of them."""

from __future__ import annotations

from typing import Any

import torch

from fxpass import torch_dispatcher
from fxpass.invariant.aten import NARROW, aten, broadcast, is_empty
from fxpass.kernels.invariant import dispatch

Tensor = torch.Tensor


def mm(self: Tensor, mat2: Tensor) -> Any:
    """(M, K) @ (K, N)."""
    return _product(self, mat2, 2)


def mm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Any:
    """`mm` of 16-bit tensors, not rounded below float32 if `out_dtype` is that."""
    return _product(self, mat2, 2, out_dtype=out_dtype)


def bmm(self: Tensor, mat2: Tensor) -> Any:
    """(B, M, K) @ (B, K, N)."""
    return _product(self, mat2, 3)


def bmm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Any:
    """`bmm` of 16-bit tensors, not rounded below float32 if `out_dtype` is that."""
    return _product(self, mat2, 3, out_dtype=out_dtype)


def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """Beta * self + alpha * (mat1 @ mat2), rounded once."""
    return _added(self, mat1, mat2, 2, beta, alpha)


def addmm_dtype(
    self: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Any:
    """`addmm` with the result in `out_dtype`."""
    return _added(self, mat1, mat2, 2, beta, alpha, out_dtype)


def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """Beta * self + alpha * (batch1 @ batch2), rounded once."""
    return _added(self, batch1, batch2, 3, beta, alpha)


def baddbmm_dtype(
    self: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: Any = 1,
    alpha: Any = 1,
) -> Any:
    """`baddbmm` with the result in `out_dtype`."""
    return _added(self, batch1, batch2, 3, beta, alpha, out_dtype)


def addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """Beta * self + alpha * the sum over the batch: one product with K = batch * k."""
    if batch1.dim() != 3 or batch2.dim() != 3 or batch1.shape[0] != batch2.shape[0]:
        return NotImplemented
    left = batch1.permute(1, 0, 2).flatten(1)
    return _added(self, left, batch2.flatten(0, 1), 2, beta, alpha)


def grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Rows [offs[i - 1], offs[i]) of (M, K) times matrix i of (G, K, N): the experts of a model.

    Reads `offs` on the host, so no CUDA graph can hold it.
    """
    plain = bias is None and out_dtype in (None, self.dtype)
    if self.dim() != 2 or mat2.dim() != 3 or offs is None or not plain:
        return NotImplemented
    if self.dtype != mat2.dtype or self.shape[1] != mat2.shape[1]:
        return NotImplemented
    if not dispatch.takes(self, product=True):
        return NotImplemented
    if torch_dispatcher.is_traced() and not dispatch.is_through():
        return NotImplemented  # by a compiler that knows no operator of ours
    return dispatch.grouped_matmul(self, mat2, offs)


def mv(self: Tensor, vec: Tensor) -> Any:
    """(M, K) @ (K,)."""
    if vec.dim() != 1:
        return NotImplemented
    made = _product(self, vec.unsqueeze(1), 2)
    return made if made is NotImplemented else made.squeeze(1)


def addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """Beta * self + alpha * (mat @ vec), rounded once."""
    if vec.dim() != 1 or self.dim() > 1 or mat.dim() != 2:
        return NotImplemented
    made = _added(self.unsqueeze(-1), mat, vec.unsqueeze(1), 2, beta, alpha)
    return made if made is NotImplemented else made.squeeze(1)


def dot(self: Tensor, tensor: Tensor) -> Any:
    """(K,) @ (K,)."""
    if self.dim() != 1 or tensor.dim() != 1:
        return NotImplemented
    made = _product(self.unsqueeze(0), tensor.unsqueeze(1), 2)
    return made if made is NotImplemented else made.reshape(())


def addmm_activation(
    self: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    *,
    beta: Any = 1,
    alpha: Any = 1,
    use_gelu: bool = False,
) -> Any:
    """`addmm`, then relu, or gelu: on a GPU in its tanh form, as torch does."""
    made = _added(self, mat1, mat2, 2, beta, alpha)
    if made is NotImplemented:
        return made
    if not use_gelu:
        return aten.relu(made)
    return aten.gelu(made, approximate="none" if made.device.type == "cpu" else "tanh")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """Input @ weight.T + bias. Differentiable.

    torch's own adds the bias in the product for some ranks and strides and after rounding it for
    others, and a batch of one can have other strides than a batch of two. Here it is always inside.
    """
    if weight.dim() != 2 or input.dim() < 1 or not dispatch.takes(input, product=True):
        return NotImplemented
    if bias is None:
        return matmul(input, weight.t())
    if bias.dim() > 1 or is_empty(input):
        return NotImplemented
    made = torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight.t())
    return made.reshape(*input.shape[:-1], weight.shape[0])


def matmul(self: Tensor, other: Tensor) -> Any:
    """torch.matmul. Differentiable.

    torch's own swaps the operands of (M, K) @ (B, K, N) to make one product of it; the rows of
    `self` would then be columns.
    """
    first, second = self.dim(), other.dim()
    if max(first, second) < 3 or not first or not second:
        return NotImplemented  # mm, mv or dot
    if self.shape[-1] != other.shape[-2 if second > 1 else 0] or is_empty(self):
        return NotImplemented
    if second <= 2:
        made = torch.matmul(self.reshape(-1, self.shape[-1]), other)
        return made.reshape(self.shape[:-1] + other.shape[1:])
    left = self.unsqueeze(0) if first == 1 else self
    batch = broadcast(left.shape[:-2], other.shape[:-2])
    made = torch.bmm(_batched(left, batch), _batched(other, batch))
    made = made.reshape(*batch, *made.shape[1:])
    return made.squeeze(-2) if first == 1 else made


def _batched(x: Tensor, batch: torch.Size) -> Tensor:
    return x.expand(*batch, *x.shape[-2:]).reshape(-1, *x.shape[-2:])


def _fits(a: Tensor, b: Tensor, rank: int) -> bool:
    """Whether two operands are ones that torch would take and we have a kernel for."""
    return (
        a.dim() == b.dim() == rank
        and a.dtype == b.dtype
        and a.device == b.device
        and a.shape[-1] == b.shape[-2]
        and a.shape[:-2] == b.shape[:-2]
        and dispatch.takes(a, product=True)
        and b.layout == torch.strided
    )


def _product(a: Tensor, b: Tensor, rank: int, out_dtype: torch.dtype | None = None) -> Any:
    if not _fits(a, b, rank) or not _may_give(a, out_dtype):
        return NotImplemented
    return dispatch.matmul(a, b, out_dtype=out_dtype, tf32=_tf32(a))


def _added(
    bias: Tensor,
    a: Tensor,
    b: Tensor,
    rank: int,
    beta: Any,
    alpha: Any,
    out_dtype: torch.dtype | None = None,
) -> Any:
    if not _fits(a, b, rank) or not _may_give(a, out_dtype) or not _may_be_bias(bias, a, b):
        return NotImplemented
    if bias.dtype not in (a.dtype, out_dtype) or isinstance(alpha + beta, complex):
        return NotImplemented
    return dispatch.matmul(
        a, b, bias, alpha=float(alpha), beta=float(beta), out_dtype=out_dtype, tf32=_tf32(a)
    )


def _may_give(a: Tensor, out_dtype: torch.dtype | None) -> bool:
    if out_dtype is None or out_dtype == a.dtype:
        return True
    return a.dtype in NARROW and out_dtype == torch.float32


def _may_be_bias(bias: Tensor, a: Tensor, b: Tensor) -> bool:
    shape = (*a.shape[:-1], b.shape[-1])
    sizes = zip(reversed(bias.shape), reversed(shape), strict=False)
    same_place = bias.device == a.device or not bias.dim()
    return bias.dim() <= len(shape) and same_place and all(s in (1, t) for s, t in sizes)


def _tf32(a: Tensor) -> bool:
    return a.dtype == torch.float32 and a.is_cuda and torch_dispatcher.tf32_allowed()
