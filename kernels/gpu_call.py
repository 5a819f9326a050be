"""What a launch of a GPU kernel checks and works out from its tensors, once per plan."""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from fxpass.kernels import gpu_rows
from fxpass.spec import NormSpec

Tensor = torch.Tensor

PLANS_MOST = 4096
"""Plans a kernel keeps; a program with more shapes starts over."""
ROWS_MOST = 2**31 - 1  # blocks of one launch; the kernels count rows in 32 bits


Plan = TypeVar("Plan")


def keep(plans: dict[Any, Plan], key: Any, plan: Plan) -> Plan:
    """Remember a plan for the calls after this one."""
    if len(plans) >= PLANS_MOST:
        plans.clear()
    plans[key] = plan
    return plan


def check(
    spec: NormSpec,
    hidden: int,
    device: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raises TypeError or ValueError, in one line, where the kernel would read something else."""
    given = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    for name, tensor in given.items():
        dtype = getattr(spec, name)
        if tensor is None or dtype is None:
            if tensor is not dtype:
                what = "missing" if tensor is None else "given"
                raise TypeError(f"{name} is {what}, needs {dtype}")
        elif tensor.dtype != dtype or str(tensor.device) != device:
            raise TypeError(
                f"{name} is {tensor.dtype} on {tensor.device}, needs {dtype} on {device}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual's shape {tuple(residual.shape)}, needs x's {tuple(x.shape)}")
    for name in ("weight", "bias"):
        tensor = given[name]
        if tensor is not None and (tensor.numel() == 0 or tensor.numel() % hidden):
            raise ValueError(
                f"{name} has {tensor.numel()} elements, needs a multiple of hidden {hidden}"
            )


def addressed(x: Tensor, residual: Tensor | None) -> tuple[gpu_rows.Rows, bool]:
    """The way to the rows, and whether x and residual have to be made contiguous for it.

    Raises ValueError if there are more rows than one launch has blocks.
    """
    strides = [x.stride()] if residual is None else [x.stride(), residual.stride()]
    rows = gpu_rows.address(x.shape, strides)
    copies = rows is None
    if rows is None:
        rows = gpu_rows.address(x.shape, [gpu_rows.dense(x.shape)] * len(strides))
        assert rows is not None
    if rows.count > ROWS_MOST:
        raise ValueError(f"x has {rows.count} rows, needs at most {ROWS_MOST}")
    return rows, copies
