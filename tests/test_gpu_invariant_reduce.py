"""The GPU reductions on a GPU: exact bits, the same in every batch and on every layout."""

from __future__ import annotations

import math

import pytest
import torch
from invariant_reduce_cases import ALL, CLOSE, FLOATS, SUMS, same, tolerance, values, views
from kernel_cases import LLAMA, inputs

from fxpass.kernels import by_name
from fxpass.kernels.invariant import reduce_gpu
from fxpass.spec import NormSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

F32 = torch.float32
ROWS = (1, 2, 3, 7, 8, 64, 255, 256, 257)


@pytest.mark.parametrize("name", SUMS)
def test_exact_bits(name: str) -> None:
    kernel, exact = SUMS[name]
    for size in (1, 31, 1000, 4096, 8192, 20_000):
        for dtype in FLOATS if size == 1000 else FLOATS[:1]:
            x = values(5, size, dtype=dtype, seed=size)
            assert same(kernel(x.cuda(), F32).cpu(), exact(x.float())), (size, dtype)


@pytest.mark.parametrize("name", CLOSE)
def test_close_to_float64(name: str) -> None:
    kernel, meaning = CLOSE[name]
    for size in (2, 31, 1000, 8192, 152_064):
        for dtype in FLOATS if size == 1000 else FLOATS[:1]:
            x = values(5, size, dtype=dtype, seed=size).cuda()
            found, out = kernel(x, F32), dtype if name == "layer_norm" else F32
            torch.testing.assert_close(
                found, meaning(x.double()), check_dtype=False, **tolerance(name, size, out)
            )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [100, 4096, 20_000])
def test_rows_do_not_depend_on_their_batch(name: str, size: int) -> None:
    for dtype in (torch.bfloat16, F32):
        x = values(4096 if size == 4096 else 512, size, dtype=dtype).cuda()
        whole = ALL[name](x, F32)
        for rows in ROWS:
            assert same(ALL[name](x[:rows], F32), whole[:rows]), rows
            assert same(ALL[name](x[-rows:].clone(), F32), whole[-rows:]), rows
        for layout, view in views(x[:9]).items():
            assert same(ALL[name](view, F32), whole[:9]), layout


@pytest.mark.parametrize("name", ALL)
def test_neighbours_do_not_matter(name: str) -> None:
    for size in (100, 9000):
        x = values(5, size).cuda()
        wanted = ALL[name](x, F32)
        for bad in (math.nan, math.inf, -math.inf):
            x[[0, 1, 3, 4]] = bad
            assert same(ALL[name](x, F32)[2], wanted[2])


def test_mean_of_squares_is_the_norm_s() -> None:
    """The row value of `triton.row` and `cuda.row`, from the eager spelling of a norm."""
    spec = NormSpec.parse("x=bf16 row=mean:f32 element=mul_row:f32 outputs=out,row")
    for hidden in (128, 1000, 4096, 5120, 14_336):
        given = inputs(spec, 9, hidden, seed=hidden)
        x = given.x.cuda()
        found = reduce_gpu.row_mean(x.float().pow(2), dtype=F32)
        for name in ("triton.row", "cuda.row"):
            kernel = by_name(name)
            assert kernel.prepare(spec, hidden) is None
            _, row = kernel.launch(spec, x, None, None, None, 0.0)
            assert same(found, row.reshape(-1)), (name, hidden)
    assert LLAMA.startswith("x=bf16 row=mean:f32")


def test_exp_and_log_of_the_device() -> None:
    """Within 2.5 ulp of float64's for one of two elements: subnormal results, too."""
    x = -torch.linspace(0.0, 103.0, 100_001)[:, None].cuda()
    x = torch.cat([torch.zeros_like(x), x], -1)
    found = reduce_gpu.row_softmax(x, dtype=F32, log=False)[:, 1].double()
    exact = x.double().softmax(-1)[:, 1]
    near = exact.float()
    ulp = torch.nextafter(near, torch.full_like(near, math.inf)).double() - near.double()
    worst = float(((found - exact).abs() / ulp).max())
    print(f"softmax of two: {worst:.2f} ulp")
    assert worst <= 4.0  # exp 2, the sum, its inverse and the product a half each
    y = torch.linspace(0.0, 20.0, 100_001)[:, None].cuda()
    y = torch.cat([torch.zeros_like(y), -y], -1)
    found = reduce_gpu.row_logsumexp(y, dtype=F32)
    torch.testing.assert_close(found.double(), y.double().logsumexp(-1), rtol=4e-7, atol=2e-7)
