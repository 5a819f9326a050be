"""What the tests of the GPU reductions share: their exact sums in torch, and oracles in float64."""

from __future__ import annotations

import math

import torch

from fxpass.kernels import gpu_rows
from fxpass.kernels.invariant import reduce_gpu

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INFINITY = math.inf
BLOCK = 2048
"""Elements of a block of running sums: part of what `row_cumsum` means."""


def tree(values: torch.Tensor) -> torch.Tensor:
    """The sum over the last dim in the order of `gpu_rows`, in the values' dtype."""
    size = values.shape[-1]
    lanes = gpu_rows.lanes(size)
    padded = torch.nn.functional.pad(values, (0, -size % lanes))
    units = _by_pairs(padded.reshape(*values.shape[:-1], -1, lanes), 3)
    total = torch.zeros_like(units[..., 0, :])
    for chunk in range(units.shape[-2]):
        total = total + units[..., chunk, :]
    return _by_pairs(total, total.shape[-1].bit_length() - 1)[..., 0]


def _by_pairs(values: torch.Tensor, levels: int) -> torch.Tensor:
    for _ in range(levels):
        values = values[..., ::2] + values[..., 1::2]
    return values


def running(values: torch.Tensor) -> torch.Tensor:
    """The running sums of `scan_triton`, in the values' dtype."""
    blocks, carry = [], torch.zeros_like(values[..., :1])
    for block in values.split(BLOCK, dim=-1):
        size = block.shape[-1]
        block = torch.nn.functional.pad(block, (0, BLOCK - size))
        width = 1
        while width < BLOCK:
            runs = block.unflatten(-1, (-1, 2, width))
            left = runs[..., :1, -1:] + 0.0
            block = torch.cat([runs[..., :1, :], runs[..., 1:, :] + left], -2).flatten(-3)
            width *= 2
        blocks.append((carry + block)[..., :size])
        carry = (carry + block)[..., -1:]
    return torch.cat(blocks, -1)


SUMS = {
    "sum": (
        lambda x, dtype: reduce_gpu.row_sum(x, dtype=dtype),
        lambda x: tree(x),
    ),
    "mean": (
        lambda x, dtype: reduce_gpu.row_mean(x, dtype=dtype),
        lambda x: tree(x) * (1.0 / x.shape[-1]),
    ),
    "norm0": (
        lambda x, dtype: reduce_gpu.row_norm(x, 0, dtype=dtype),
        lambda x: tree((x != 0).to(x.dtype)),
    ),
    "norm1": (
        lambda x, dtype: reduce_gpu.row_norm(x, 1, dtype=dtype),
        lambda x: tree(x.abs()),
    ),
    "norm2": (
        lambda x, dtype: reduce_gpu.row_norm(x, 2, dtype=dtype),
        # float64's root, rounded once more, is float32's.
        lambda x: tree(x * x).double().sqrt().to(x.dtype),
    ),
    "largest": (
        lambda x, dtype: reduce_gpu.row_norm(x, INFINITY, dtype=dtype),
        lambda x: x.abs().amax(-1),
    ),
    "smallest": (
        lambda x, dtype: reduce_gpu.row_norm(x, -INFINITY, dtype=dtype),
        lambda x: x.abs().amin(-1),
    ),
    "cumsum": (
        lambda x, dtype: reduce_gpu.row_cumsum(x, dtype=dtype),
        running,
    ),
}
"""name -> (kernel, its exact bits from float32 or float64 values)"""

CLOSE = {
    "norm3": (
        lambda x, dtype: reduce_gpu.row_norm(x, 3, dtype=dtype),
        lambda x: torch.linalg.vector_norm(x, 3, -1),
    ),
    "norm_half": (
        lambda x, dtype: reduce_gpu.row_norm(x, 0.5, dtype=dtype),
        lambda x: torch.linalg.vector_norm(x, 0.5, -1),
    ),
    "logsumexp": (
        lambda x, dtype: reduce_gpu.row_logsumexp(x, dtype=dtype),
        lambda x: x.logsumexp(-1),
    ),
    "softmax": (
        lambda x, dtype: reduce_gpu.row_softmax(x, dtype=dtype, log=False),
        lambda x: x.softmax(-1),
    ),
    "log_softmax": (
        lambda x, dtype: reduce_gpu.row_softmax(x, dtype=dtype, log=True),
        lambda x: x.log_softmax(-1),
    ),
    "var": (
        lambda x, dtype: reduce_gpu.row_var_mean(x, 1.0, dtype=dtype)[0],
        lambda x: x.var(-1, correction=1),
    ),
    "var_0": (
        lambda x, dtype: reduce_gpu.row_var_mean(x, 0.0, dtype=dtype)[0],
        lambda x: x.var(-1, correction=0),
    ),
    "var_mean": (
        lambda x, dtype: reduce_gpu.row_var_mean(x, 1.0, dtype=dtype)[1],
        lambda x: x.mean(-1),
    ),
    "layer_norm": (
        lambda x, dtype: reduce_gpu.row_layer_norm(x, None, None, 1e-5)[0],
        lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
    ),
}
"""name -> (kernel, its meaning in float64)"""

ALL = {name: kernel for name, (kernel, _) in {**SUMS, **CLOSE}.items()}


def tolerance(name: str, size: int, dtype: torch.dtype) -> dict[str, float]:
    """One rounding to dtype, and in float32 a few roundings of the elements and of the tree.

    A tree over R elements rounds log2(R) + 3 times and once a chunk, each time by at most half of
    2**-23 of the sum of absolute values; a mean near 0 is uncertain by that much of 1.
    """
    single = 2.0**-24
    roundings = 8 + math.log2(size) + size / gpu_rows.MOST_LANES
    if name == "softmax":
        roundings += 64  # of x - max, which is less than 64 in `values`
    return {"rtol": roundings * single + _half(dtype), "atol": _floor(name, dtype) * single}


def _half(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def _floor(name: str, dtype: torch.dtype) -> float:
    """In float32 roundings of 1: where terms cancel, and half a subnormal of float16."""
    if name == "softmax":
        return 1.0 if dtype == torch.float16 else 2.0**-40
    return 64.0 if name in ("log_softmax", "logsumexp", "layer_norm", "var_mean") else 0.0


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal dtypes, shapes, values, zeros' signs and places of NaN."""
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    nan = found.isnan()
    return bool(
        torch.equal(nan, wanted.isnan())
        and torch.equal(found.masked_fill(nan, 0), wanted.masked_fill(nan, 0))
        and torch.equal(found.signbit() & ~nan, wanted.signbit() & ~nan)
    )


def values(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Of many magnitudes, so that another order of addition shows."""
    made = torch.Generator().manual_seed(seed)
    size = torch.randn(shape, generator=made).exp()
    return (torch.randn(shape, generator=made) * size).to(dtype)


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Equal values for a (rows, R) tensor, laid out otherwise."""
    rows, size = x.shape
    odd = x.new_zeros(rows * (size + 3) + 1)[1:].view(rows, size + 3)[:, 1 : size + 1]
    sliced = x.new_full((rows, 2, size), math.nan)[:, 0]
    apart = x.new_full((rows, size, 2), math.nan)[..., 0]
    for view in (odd, sliced, apart):
        view.copy_(x)
    return {"odd": odd, "sliced": sliced, "apart": apart, "transposed": x.t().contiguous().t()}
