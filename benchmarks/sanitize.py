"""Some twenty launches of `cuda.row` for compute-sanitizer, each checked against the reference.

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/sanitize.py

Every tensor is an allocation of its own: an access one byte outside it is an error, where torch's
caching allocator would hide it in a larger block.
"""

from __future__ import annotations

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

from dataclasses import dataclass

import torch

from fxpass.kernels import by_name, reference
from fxpass.spec import NormSpec

CUDA = by_name("cuda.row")
LLAMA = (
    "x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,cast:bf16,mul_weight:bf16"
    " weight=bf16"
)
RESIDUAL = LLAMA.replace("x=bf16", "x=bf16 residual=bf16 sum=bf16") + " outputs=out,sum,row"
SINGLE = LLAMA.replace("bf16", "f32")
BIAS = LLAMA.replace("mul_weight:bf16", "mul_weight:bf16,add_bias:bf16") + " bias=bf16"


@dataclass(frozen=True)
class Point:
    """One launch."""

    name: str
    spec: str
    rows: int
    hidden: int
    shift: int = 0
    """Elements by which x's rows are off their alignment."""
    weight_rows: int = 1
    heads: int = 0
    """Rows of a token, where they are the upper half of a projection's: two strides."""


POINTS = (
    Point("one row", LLAMA, 1, 4096),
    Point("several rows of a block, the last block not full", LLAMA, 37, 128),
    Point("more of them, many rows", LLAMA, 2049, 128),
    Point("threads of two units", LLAMA, 1100, 4096),
    Point("fewer threads than a warp", LLAMA, 5, 64),
    Point("unaligned", LLAMA, 3, 4096, shift=1),
    Point("odd hidden", LLAMA, 3, 1001),
    Point("hidden 1", LLAMA, 33, 1),
    Point("absent units", LLAMA, 3, 2880),
    Point("residual", RESIDUAL, 3, 5120),
    Point("residual, unaligned, odd hidden", RESIDUAL, 37, 257, shift=1),
    Point("bias and weights per head", BIAS, 12, 128, weight_rows=4),
    Point("heads of a slice", LLAMA, 96, 128, heads=8),
    Point("heads of a slice, a block for each", LLAMA, 24, 1000, heads=8),
    Point("heads of a slice, residual", RESIDUAL, 96, 128, heads=8),
    Point("float32", SINGLE, 3, 8192),
    Point("two chunks", LLAMA, 3, 16_384),
    Point("few units of a second chunk", LLAMA, 400, 9216),
    Point("evicted last", RESIDUAL, 1030, 8192),
    Point("two chunks of one block each", RESIDUAL, 300, 16_384),
    Point("two blocks of a row", RESIDUAL, 64, 4096),
    Point("rows read twice, the last chunk not full", RESIDUAL, 2, 65_528),
)


def main() -> None:
    torch.manual_seed(0)
    for point in POINTS:
        run(point)
        print(f"{point.rows:5} x {point.hidden:<6} {point.name}")


def run(point: Point) -> None:
    """One launch, and how far it is from eager operators."""
    spec, hidden = NormSpec.parse(point.spec), point.hidden

    def make(dtype: torch.dtype | None, rows: int, shift: int = 0) -> torch.Tensor | None:
        if dtype is None:
            return None
        if point.heads and rows == point.rows:
            packed = torch.randn(rows // point.heads, 2 * point.heads, hidden, device="cuda")
            return packed.to(dtype)[:, point.heads :]
        flat = torch.randn(rows * hidden + shift, device="cuda").to(dtype)
        return flat[shift:].view(rows, hidden)

    x = make(spec.x, point.rows, point.shift)
    assert x is not None
    given = (
        x,
        make(spec.residual, point.rows),
        make(spec.weight, point.weight_rows),
        make(spec.bias, point.weight_rows),
    )
    found = CUDA.launch(spec, *given, 1e-6)
    wanted = reference.launch(spec, *given, 1e-6)
    for got, want in zip(found, wanted, strict=True):
        # A row's sum differs in its order only. That can flip the rounding before the weight and
        # the one after it, by a bf16 ulp each; a bias may leave little else of the product.
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-5)


if __name__ == "__main__":
    main()
