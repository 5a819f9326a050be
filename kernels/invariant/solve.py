"""Triangular systems, every matrix by itself: forward substitution, one column after the other.

    x[j] = b[j] / a[j, j];  b[i] -= a[i, j] * x[j] for i > j

with every product rounded before it is subtracted; beyond 64 unknowns, what earlier blocks of 64
take away from a block is one product. Libraries choose between this, inverses and blocks by the
number of matrices, and MKL's bits follow the address of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxpass.kernels.cuda_launch import on_device
from fxpass.kernels.gpu_call import keep

Tensor = torch.Tensor

BLOCK = 64
"""Unknowns that are found one by one."""
_COLUMNS = 32
"""Right-hand sides of one program on a GPU."""

_launches: dict[Any, Any] = {}


def solve_lower(a: Tensor, b: Tensor, unit: bool, matmul: Callable[..., Tensor]) -> Tensor:
    """The x with a @ x = b: a (B, N, N), of which the lower half is read; b and x (B, N, K).

    unit: the diagonal is ones and not read. `matmul(a, b, bias, alpha=...)` is an invariant
    product; not called for N <= 64.
    """
    small = by_columns if a.device.type == "cpu" else _on_gpu
    size = a.shape[-1]
    if size <= BLOCK:
        return small(a, b, unit)
    out = torch.empty_like(b, memory_format=torch.contiguous_format)
    for start in range(0, size, BLOCK):
        block = slice(start, start + BLOCK)
        right = b[:, block]
        if start:
            right = matmul(a[:, block, :start], out[:, :start], right, alpha=-1.0)
        out[:, block] = small(a[:, block, block], right, unit)
    return out


def by_columns(a: Tensor, b: Tensor, unit: bool) -> Tensor:
    """As above, in operations of torch that round every element by itself."""
    x = b.clone(memory_format=torch.contiguous_format)
    term = torch.empty_like(x)
    for j in range(a.shape[-1]):
        found, below = x[:, j : j + 1], x[:, j + 1 :]
        if not unit:
            found /= a[:, j : j + 1, j : j + 1]
        below -= torch.mul(a[:, j + 1 :, j : j + 1], found, out=term[:, j + 1 :])
    return x


def _on_gpu(a: Tensor, b: Tensor, unit: bool) -> Tensor:
    from fxpass.kernels.invariant import solve_triton
    from fxpass.kernels.invariant.triton_math import FIXED
    from fxpass.kernels.triton_launch import ALIGNED, Launch

    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(b)
    if not b.numel():
        return out
    aligned = (a.data_ptr() | b.data_ptr() | out.data_ptr()) % ALIGNED == 0
    device = a.get_device()
    key = (device, b.shape, b.dtype, unit, aligned)
    launch = _launches.get(key)
    if launch is None:
        count, size, columns = b.shape
        programs = count * -(-columns // _COLUMNS)
        constants = {"UNIT": unit, "SIZE": BLOCK, "COLUMNS": _COLUMNS}
        options = {"num_warps": 4, **FIXED}
        launch = Launch(
            solve_triton.solve_lower, (programs,), (size, columns), constants, options,
            aligned=aligned,
        )  # fmt: skip
        keep(_launches, key, launch)
    with on_device(device):
        launch(device, (a, b, out))
    return out
