"""The CPU product: its order, its rows alone and among others, and what it does with edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from invariant_cpu_cases import (
    DTYPES,
    ROWS,
    built_for,
    drawn,
    each_dtype,
    layouts,
    same,
    threads,
    without_library,
)

from fxpass.kernels import cpu_build
from fxpass.kernels.build_cache import BuildError, Once
from fxpass.kernels.invariant import cpu_library
from fxpass.kernels.invariant.mm_cpu import _product, matmul, product

LAYOUTS = ("dense", "transposed", "sliced", "spread", "shifted")
# Around the sizes of tiles (6, 12, 16, 32), of thin products (4) and of chunks (256).
SHAPES = [
    (m, k, n)
    for m in (1, 3, 4, 5, 13, 37)
    for k, n in ((1, 1), (15, 16), (16, 33), (255, 31), (256, 64), (257, 300), (600, 17))
]


@pytest.fixture(scope="module", autouse=True)
def _built():
    cpu_library.build_all(DTYPES)


def exact_products(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Operands whose products have no rounding, so a fused multiply-add is a product and a sum."""
    mantissa = torch.float16 if dtype == torch.float16 else torch.bfloat16
    return tuple(drawn(*s, dtype=mantissa).to(dtype) for s in ((m, k), (k, n)))


# ---- The order ----------------------------------------------------------------------------------


@each_dtype
def test_order_is_a_chain_in_chunks(dtype):
    for shape in SHAPES:
        a, b = exact_products(*shape, dtype)
        with without_library():
            wanted = matmul(a, b, out_dtype=cpu_library.wide(dtype))
        for name, other in layouts(b).items():
            found = matmul(a, other, out_dtype=cpu_library.wide(dtype))
            assert same((found, wanted)), (shape, name)


def test_plain_order_written_out():
    a, b = exact_products(2, 600, 3, torch.float32)
    total = torch.zeros(2, 3)
    for start in range(0, 600, 256):
        chunk = torch.zeros(2, 3)
        for k in range(start, min(start + 256, 600)):
            chunk = chunk + a[:, k, None] * b[k]
        total = total + chunk
    assert same((matmul(a, b), total))


def test_width_of_registers_changes_no_bit(tmp_path):
    dtype = torch.bfloat16
    operands = [(drawn(m, k, dtype=dtype), drawn(k, n, dtype=dtype)) for m, k, n in SHAPES]
    here = [matmul(a, other) for a, b in operands for other in layouts(b).values()]
    with built_for("haswell", "product", dtype, tmp_path):
        there = [matmul(a, other) for a, b in operands for other in layouts(b).values()]
    assert same(*zip(here, there, strict=True))


# ---- A row alone and among others ---------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_row_does_not_depend_on_the_others(dtype, layout):
    a, b = drawn(257, 300, dtype=dtype), layouts(drawn(300, 70, dtype=dtype))[layout]
    bias = drawn(70, dtype=dtype)
    whole = matmul(a, b, bias)
    for rows in ROWS:
        for first in {0, (257 - rows) // 2, 257 - rows}:
            part = slice(first, first + rows)
            assert same((matmul(a[part], b, bias), whole[part])), (rows, first)
    order = torch.randperm(257)
    assert same((matmul(a[order], b, bias), whole[order]))


@each_dtype
def test_layout_of_rows_and_batches(dtype):
    a, b = drawn(3, 37, 300, dtype=dtype), drawn(3, 300, 40, dtype=dtype)
    wanted = torch.stack([matmul(a[i], b[i]) for i in range(3)])
    for left in layouts(a).values():
        for right in layouts(b).values():
            assert same((matmul(left, right), wanted))
    shared = matmul(a, b[:1].expand(3, -1, -1))
    assert same((shared, torch.stack([matmul(a[i], b[0]) for i in range(3)])))
    assert same((matmul(a.flip(0), b.flip(0)), wanted.flip(0)))
    assert same((matmul(a[:1].expand(3, -1, -1), b)[2], matmul(a[0], b[2])))


@each_dtype
@pytest.mark.parametrize("rows", [1, 4, 5, 64])
def test_neighbours_with_nan_and_infinity(dtype, rows):
    a, b = drawn(rows + 2, 300, dtype=dtype), drawn(300, 70, dtype=dtype)
    wanted = matmul(a[1:-1], b)
    a[0], a[-1] = math.nan, math.inf
    found = matmul(a, b)
    assert same((found[1:-1], wanted))
    assert found[0].isnan().all()
    # What lies around a column or a row is not read either.
    inside = layouts(b)["sliced"]
    assert same((matmul(a[1:-1], inside), wanted))
    b[:, 1] = math.nan
    assert same((matmul(a, b)[1:-1, 2:], wanted[:, 2:]))


def test_nan_and_infinity_flow_as_in_a_product():
    a, b = torch.ones(5, 300), torch.ones(300, 20)
    a[1, 299], a[2, 7], a[3, 0] = math.inf, math.nan, -math.inf
    a[3, 1], b[299, 3] = math.inf, 0.0
    for rows in (slice(0, 5), slice(1, 4)):
        torch.testing.assert_close(matmul(a, b)[rows], torch.mm(a[rows], b), equal_nan=True)
    assert matmul(a, b)[1, 3].isnan()


@each_dtype
def test_threads_change_no_bit(dtype):
    for m, k, n in ((1, 700, 1000), (4, 700, 300), (300, 300, 300)):
        a, b = drawn(m, k, dtype=dtype), drawn(k, n, dtype=dtype)
        for other in (b, b.t().contiguous().t()):
            with threads(1):
                one = matmul(a, other)
            with threads(2):
                two = matmul(a, other)
            assert same((one, two))


@settings(max_examples=60)
@given(
    m=st.integers(1, 60),
    k=st.integers(1, 600),
    n=st.integers(1, 90),
    row=st.integers(0, 59),
    dtype=st.sampled_from(DTYPES),
    left=st.sampled_from(LAYOUTS),
    right=st.sampled_from(LAYOUTS),
)
def test_any_row_of_any_product(m, k, n, row, dtype, left, right):
    a, b = drawn(m, k, dtype=dtype), drawn(k, n, dtype=dtype)
    row %= m
    whole = matmul(layouts(a)[left], layouts(b)[right])
    assert same((matmul(a[row : row + 1], b), whole[row : row + 1]))


# ---- The value ----------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("m", [1, 4, 50])
def test_close_to_the_truth(dtype, m):
    for k, n in ((300, 70), (4096, 40)):
        a, b = drawn(m, k, dtype=dtype), drawn(k, n, dtype=dtype)
        exact = _exact(a, b)
        out = matmul(a, b, out_dtype=cpu_library.wide(dtype))
        # A term goes through at most 256 sums of its chunk and those of the chunks, each of which
        # moves it by at most half an ulp.
        steps = min(k, 256) + -(-k // 256)
        eps = torch.finfo(out.dtype).eps / 2
        assert ((out.double() - exact).abs() <= 1.01 * steps * eps * _exact(a.abs(), b.abs())).all()


def _exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """In float64; torch adds it up differently, so for float64 it is off by as much itself."""
    return a.double() @ b.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [2, 20])
def test_float32_result_is_not_rounded_to_16_bits(dtype, m):
    a, b = drawn(m, 500, dtype=dtype), drawn(500, 40, dtype=dtype)
    wide = matmul(a, b, out_dtype=torch.float32)
    assert not torch.equal(wide, wide.to(dtype).float())
    assert same((matmul(a, b), wide.to(dtype)))
    assert same((matmul(a, b, out_dtype=torch.float64), wide.double()))


@each_dtype
@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0), (-1.5, 0.25), (0.0, 1.0)])
def test_alpha_and_beta(dtype, m, alpha, beta):
    a, b = drawn(m, 90, dtype=dtype), drawn(90, 40, dtype=dtype)
    wide = cpu_library.wide(dtype)
    plain = matmul(a, b, out_dtype=wide)
    for shape in ((40,), (m, 40), (m, 1), (1, 40), (1,), ()):
        for bias in (drawn(*shape, dtype=dtype), drawn(*shape, dtype=torch.float32)):
            found = matmul(a, b, bias, alpha=alpha, beta=beta)
            assert same((found, (alpha * plain + beta * bias.to(wide)).to(dtype)))
    turned = drawn(40, m, dtype=dtype).t()
    assert same((matmul(a, b, turned), (plain + turned.to(wide)).to(dtype)))


def test_beta_zero_does_not_read_the_bias():
    a, b = drawn(5, 9, dtype=torch.float32), drawn(9, 7, dtype=torch.float32)
    bias = torch.full((7,), math.nan)
    assert same((matmul(a, b, bias, beta=0.0), matmul(a, b)))


def test_alpha_zero_does_not_read_the_operands():
    a, b, bias = torch.full((2, 3), math.nan), torch.full((3, 4), math.inf), torch.rand(4)
    assert torch.equal(matmul(a, b, bias, alpha=0.0, beta=2.0), (2 * bias).expand(2, 4))
    assert torch.equal(matmul(a, b, alpha=0.0), torch.zeros(2, 4))


def test_bias_of_batches():
    a, b = drawn(3, 5, 70, dtype=torch.float32), drawn(3, 70, 11, dtype=torch.float32)
    plain = matmul(a, b)
    for shape in ((3, 5, 11), (3, 1, 11), (5, 11), (11,), (3, 1, 1)):
        bias = drawn(*shape, dtype=torch.float32)
        assert same((matmul(a, b, bias), plain + bias))
    same_b = b[:1].expand(3, -1, -1)
    bias = drawn(3, 5, 11, dtype=torch.float32)
    assert same((matmul(a, same_b, bias), matmul(a, same_b) + bias))


@each_dtype
def test_nothing_to_multiply(dtype):
    bias = drawn(4, dtype=dtype)
    for shape in ((0, 5, 4), (5, 5, 0), (0, 0, 0)):
        m, k, n = shape
        assert matmul(drawn(m, k, dtype=dtype), drawn(k, n, dtype=dtype)).shape == (m, n)
    empty = drawn(3, 0, dtype=dtype), drawn(0, 4, dtype=dtype)
    assert same((matmul(*empty), torch.zeros(3, 4, dtype=dtype)))
    assert same((matmul(*empty, bias, beta=2.0), (2 * bias).expand(3, 4).contiguous()))
    assert matmul(torch.ones(0, 3, 4), torch.ones(0, 4, 2)).shape == (0, 3, 2)


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_skipped_zeros(rows, layout):
    a, b = drawn(1, 1, rows, 600, dtype=torch.float32), drawn(1, 1, 600, 40, dtype=torch.bfloat16)
    a[..., 300:320], a[..., 500:] = 0.0, 0.0
    wanted = product(a, b)
    b[..., 300:320, :], b[..., 500:, :] = math.nan, math.inf
    other = layouts(b)[layout]
    found = product(a, other, skip_zeros=True)
    assert same(
        (found, wanted), (found, product(a[..., :500], other[..., :500, :], skip_zeros=True))
    )
    with without_library():
        torch.testing.assert_close(product(a, other, skip_zeros=True), found)
    assert product(a, other).isnan().all()
    nothing = product(torch.zeros_like(a), other, skip_zeros=True)
    assert same((nothing, torch.zeros_like(nothing)))


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (torch.ones(2, 3), torch.ones(4, 2), "cannot multiply (2, 3) by (4, 2)"),
        (torch.ones(2, 3), torch.ones(1, 3, 2), "cannot multiply"),
        (torch.ones(2, 3, 3), torch.ones(1, 3, 2), "cannot multiply"),
        (torch.ones(2, 3), torch.ones(3, 2).double(), "torch.float32 by torch.float64"),
        (torch.ones(2, 3).int(), torch.ones(3, 2).int(), "torch.int32"),
        (torch.ones(2, 3), torch.ones(3, 2, device="meta"), "on the CPU"),
    ],
)
def test_what_does_not_fit(a, b, words):
    with pytest.raises(ValueError, match=r"multiply|CPU") as error:
        matmul(a, b)
    assert words in str(error.value)


def test_without_a_compiler_it_warns_once(monkeypatch):
    def fails(name: str, source: str) -> None:
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(cpu_library, "_runs", Once())
    monkeypatch.setattr(cpu_library, "_known", {})
    monkeypatch.setattr(cpu_build, "load_library", fails)
    a, b = drawn(9, 300, dtype=torch.bfloat16), drawn(300, 40, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler"):
        whole = matmul(a, b, drawn(40, dtype=torch.bfloat16))
    alone = matmul(a[4:5], b, drawn(40, dtype=torch.bfloat16))  # a second warning is an error
    assert same((whole[4:5], alone))
    wanted = a.double() @ b.double() + drawn(40, dtype=torch.bfloat16).double()
    # The rounding to bf16 alone is 2^-9; the sum in float32 is far finer.
    torch.testing.assert_close(whole.double(), wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_few_columns_are_rows_of_the_transposed_product(n, batch):
    a, b, bias = torch.randn(*batch, 70, 600), torch.randn(*batch, 600, n), torch.randn(n)
    found = matmul(a, b, bias, alpha=0.5, beta=2.0)
    assert torch.equal(found, _product(a, b, bias, 0.5, 2.0, None))
    assert found.stride() == torch.empty(found.shape).stride()
    one = matmul(a[..., :1, :], b)
    assert torch.equal(one, matmul(a, b)[..., :1, :])
    assert one.stride() == torch.empty(one.shape).stride()
