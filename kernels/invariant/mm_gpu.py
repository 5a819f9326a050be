"""Products of matrices on a GPU whose rows keep their bits in every batch.

`chunks` says which sums are made, `mm_schedule` how; `mm_triton` has the kernels. What follows from
shapes, strides and dtypes is worked out once and kept, because host time matters at decode sizes.
"""

from __future__ import annotations

from typing import Any

import torch

from fxpass.kernels.gpu_call import keep
from fxpass.kernels.invariant.mm_launch import Plan
from fxpass.kernels.invariant.mm_plan import planned
from fxpass.kernels.steps import single
from fxpass.kernels.triton_launch import ALIGNED

Tensor = torch.Tensor

_plans: dict[Any, Plan] = {}


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
    """`beta * bias + alpha * (a @ b)`, summed in float32 and rounded once.

    Args:
        a: (M, K) or (B, M, K), any strides; bfloat16, float16 or float32.
        b: (K, N) or (B, K, N), any strides; a's dtype and device.
        bias: anything that broadcasts to the result's shape, of any floating dtype up to float32.
        alpha: factor of the product, taken as float32.
        beta: factor of the bias; 0 ignores the bias, NaN in it too.
        out_dtype: of the result, a's dtype if None. float32 is not rounded on the way.
        tf32: for float32 operands, whether their products may be made of 10-bit mantissas; not
            done on AMD GPUs.

    Returns:
        (M, N) or (B, M, N), contiguous. The bits of a row are a function of that row of a, of b,
        and of its bias.

    Raises:
        TypeError: for dtypes that no kernel takes, or operands of two dtypes or devices.
        ValueError: for shapes that do not fit.
    """
    if beta == 0:
        bias = None
    at = a.data_ptr() | b.data_ptr() | (0 if bias is None else bias.data_ptr())
    key = (
        at % ALIGNED == 0,
        a.get_device(),
        a.dtype,
        a.shape,
        a.stride(),
        b.get_device(),
        b.dtype,
        b.shape,
        b.stride(),
        None if bias is None else (bias.get_device(), bias.dtype, bias.shape, bias.stride()),
        out_dtype,
        tf32,
    )
    plan = _plans.get(key)
    if plan is None:
        plan = planned(a, b, bias, out_dtype, tf32, at % ALIGNED == 0)
        keep(_plans, key, plan)
    if alpha == 1 and beta == 1:
        return plan(a, b, bias, 1.0, 1.0)
    return plan(a, b, bias, single(alpha), single(beta))
