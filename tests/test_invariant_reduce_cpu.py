"""The CPU reductions: their tree, their exp, rows alone and among others, and torch's meaning."""

import math
from collections.abc import Callable

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

from fxpass.kernels import cpu
from fxpass.kernels.invariant import cpu_library, reduce_cpu, reduce_plain
from fxpass.spec import NormSpec

SIZES = (1, 2, 31, 63, 64, 65, 257, 1000, 4096, 4097, 9000)
POWERS = (0.0, 1.0, 2.0, 3.5, -2.0, math.inf, -math.inf)
Tensors = tuple[torch.Tensor, ...]
Function = Callable[[torch.Tensor, torch.dtype], Tensors]


def _affine(x: torch.Tensor, dtype: torch.dtype) -> Tensors:
    size = x.shape[-1]
    weight, bias = drawn(size, dtype=x.dtype), drawn(size, dtype=torch.float32, seed=1)
    return reduce_cpu.row_layer_norm(x, weight, bias, 1e-5)


FUNCTIONS: dict[str, Function] = {
    "sum": lambda x, dtype: (reduce_cpu.row_sum(x, dtype=dtype),),
    "mean": lambda x, dtype: (reduce_cpu.row_mean(x, dtype=dtype),),
    "logsumexp": lambda x, dtype: (reduce_cpu.row_logsumexp(x, dtype=dtype),),
    "softmax": lambda x, dtype: (reduce_cpu.row_softmax(x, dtype=dtype, log=False),),
    "log_softmax": lambda x, dtype: (reduce_cpu.row_softmax(x, dtype=dtype, log=True),),
    "var_mean": lambda x, dtype: reduce_cpu.row_var_mean(x, 1.0, dtype=dtype),
    "layer_norm": _affine,
    "layer_norm_bare": lambda x, dtype: reduce_cpu.row_layer_norm(x, None, None, 1e-5),
    "cumsum": lambda x, dtype: (reduce_cpu.row_cumsum(x, dtype=dtype),),
    **{f"norm{p}": lambda x, dtype, p=p: (reduce_cpu.row_norm(x, p, dtype=dtype),) for p in POWERS},
}
TORCH: dict[str, Callable[[torch.Tensor], Tensors]] = {
    "sum": lambda x: (x.sum(-1),),
    "mean": lambda x: (x.mean(-1),),
    "logsumexp": lambda x: (x.logsumexp(-1),),
    "softmax": lambda x: (x.softmax(-1),),
    "log_softmax": lambda x: (x.log_softmax(-1),),
    "var_mean": lambda x: torch.var_mean(x, -1, correction=1.0),
    "layer_norm_bare": lambda x: _layer_norm(x),
    "cumsum": lambda x: (x.cumsum(-1),),
    **{f"norm{p}": lambda x, p=p: (torch.linalg.vector_norm(x, p, -1),) for p in POWERS},
}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def _layer_norm(x: torch.Tensor) -> Tensors:
    out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)
    return out, mean[..., 0], rstd[..., 0]


@pytest.fixture(scope="module", autouse=True)
def _built():
    cpu_library.build_all(DTYPES)


# ---- The order ----------------------------------------------------------------------------------


@each_dtype
@each_function
def test_same_bits_as_elementwise_torch(dtype, name):
    function = FUNCTIONS[name]
    for size in SIZES:
        if size > 4097 and name == "cumsum":
            continue  # one tensor operation per element there
        x = drawn(3, size, dtype=dtype, scale=3)
        for out in (dtype, torch.float32, torch.float64):
            found = function(x, out)
            with without_library():
                wanted = function(x, out)
            assert same(*zip(found, wanted, strict=True)), (size, out)


def test_width_of_registers_changes_no_bit(tmp_path):
    rows = [drawn(3, size, dtype=torch.bfloat16, scale=3) for size in SIZES]
    here = [made for f in FUNCTIONS.values() for x in rows for made in f(x, torch.float32)]
    with built_for("x86-64", "rows", torch.bfloat16, tmp_path):
        there = [made for f in FUNCTIONS.values() for x in rows for made in f(x, torch.float32)]
    assert same(*zip(here, there, strict=True))


@pytest.mark.parametrize("hidden", [1, 31, 64, 257, 4096, 5000, 16384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_mean_of_squares_is_that_of_cpu_row(dtype, hidden):
    """Eager x.float().pow(2).mean(-1) and the fused norm agree, by the norm's row output."""
    short = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
    x = drawn(5, hidden, dtype=dtype)
    for steps, root in (("sum:f32,sqrt:f32", True), ("mean:f32,add_eps:f32,rsqrt:f32", False)):
        spec = NormSpec.parse(
            f"x={short} row={steps} element=mul_row:f32,cast:{short} outputs=out,row"
        )
        row = cpu.launch(spec, x, None, None, None, 1e-6)[1]
        squares = x.float().pow(2)
        if root:
            assert same((reduce_cpu.row_norm(x, 2, dtype=torch.float32)[:, None], row))
            summed = reduce_cpu.row_sum(squares, dtype=torch.float32)
            nearest = summed.double().sqrt().float()  # torch's own float root may be one off
            assert same((nearest[:, None], row))
        else:
            mean = reduce_cpu.row_mean(squares, dtype=torch.float32)
            assert same(((mean + 1e-6).rsqrt()[:, None], row))


@each_dtype
def test_zeros_behind_a_row_change_no_sum(dtype):
    wide = cpu_library.wide(dtype)
    for size in (1, 63, 100, 4096, 5000):
        x = drawn(2, size, dtype=dtype)
        longer = torch.cat([x, torch.zeros(2, 4500, dtype=dtype)], -1)
        for name in ("sum", "norm1.0", "norm2.0", "norm0.0"):
            assert same(*zip(FUNCTIONS[name](x, wide), FUNCTIONS[name](longer, wide), strict=True))
        whole = reduce_cpu.row_cumsum(longer, dtype=dtype)[:, :size]
        assert same((whole, reduce_cpu.row_cumsum(x, dtype=dtype)))


# ---- A row alone and among others ---------------------------------------------------------------


@each_dtype
@each_function
def test_row_does_not_depend_on_the_others(dtype, name):
    function = FUNCTIONS[name]
    x = drawn(257, 300, dtype=dtype)
    whole = function(x, dtype)
    for rows in ROWS:
        for first in {0, (257 - rows) // 2, 257 - rows}:
            part = slice(first, first + rows)
            found = function(x[part], dtype)
            assert all(same((f, w[part])) for f, w in zip(found, whole, strict=True))
    for other in layouts(x).values():
        assert same(*zip(function(other, dtype), whole, strict=True))
    stacked = function(x[:256].view(4, 64, 300).transpose(0, 1), dtype)
    for found, wanted in zip(stacked, whole, strict=True):
        assert same((found.transpose(0, 1).flatten(0, 1), wanted[:256]))


@each_dtype
@each_function
def test_neighbours_with_nan_and_infinity(dtype, name):
    function = FUNCTIONS[name]
    x = drawn(5, 300, dtype=dtype)
    wanted = function(x[1:-1], dtype)
    x[0], x[-1] = math.nan, math.inf
    found = function(x, dtype)
    assert all(same((f[1:-1], w)) for f, w in zip(found, wanted, strict=True))


@each_function
def test_threads_change_no_bit(name):
    for rows, size in ((1000, 100), (7, 9000)):
        x = drawn(rows, size, dtype=torch.bfloat16)
        with threads(1):
            one = FUNCTIONS[name](x, torch.float32)
        with threads(2):
            two = FUNCTIONS[name](x, torch.float32)
        assert same(*zip(one, two, strict=True))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 40),
    size=st.integers(1, 5000),
    row=st.integers(0, 39),
    name=st.sampled_from(sorted(FUNCTIONS)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["dense", "transposed", "sliced", "spread", "shifted"]),
)
def test_any_row_of_any_matrix(rows, size, row, name, dtype, layout):
    x = drawn(rows, size, dtype=dtype)
    row %= rows
    whole = FUNCTIONS[name](layouts(x)[layout], dtype)
    alone = FUNCTIONS[name](x[row].clone(), dtype)
    assert all(same((a, w[row])) for a, w in zip(alone, whole, strict=True))


# ---- The value ----------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("name", TORCH)
def test_close_to_torch_in_float64(dtype, name):
    for size in (2, 64, 1000, 5000):
        x = drawn(4, size, dtype=dtype)
        wide = cpu_library.wide(dtype)
        found, wanted = FUNCTIONS[name](x, wide), TORCH[name](x.double())
        # A sum has at most 64 + 6 steps in a row of 4096, each half an ulp of a partial sum that
        # is below 3 sqrt(R); powers and quotients add a few ulps.
        eps = torch.finfo(wide).eps
        for f, w in zip(found, wanted, strict=True):
            assert f.dtype == (dtype if "layer_norm" in name and f is found[0] else wide)
            used = torch.finfo(f.dtype).eps
            close = {"rtol": 100 * eps + used, "atol": 100 * eps * math.sqrt(size)}
            torch.testing.assert_close(f.double(), w, **close)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_function
def test_result_is_rounded_once(dtype, name):
    x = drawn(3, 500, dtype=dtype)
    narrow, wide = FUNCTIONS[name](x, dtype), FUNCTIONS[name](x, torch.float32)
    if "layer_norm" not in name:
        assert same(*zip(narrow, (w.to(dtype) for w in wide), strict=True))
    if name not in ("norm0.0", "norminf", "norm-inf") and "layer_norm" not in name:
        assert not torch.equal(wide[0], wide[0].to(dtype).float())


def test_exp_is_within_one_ulp():
    x = torch.cat([torch.linspace(-104, 89, 400_001), drawn(100_000, dtype=torch.float32)])
    found, wanted = reduce_plain.exponential(x), x.double().exp()
    nearest = wanted.float()
    ulp = (torch.nextafter(nearest, torch.tensor(math.inf)) - nearest).double()
    known = nearest.isfinite() & found.isfinite()
    assert ((found.double() - wanted).abs() <= ulp)[known].all()
    assert known.sum() > 490_000
    exact = reduce_plain.exponential(x.double())
    # torch's float64 exp is itself within an ulp.
    torch.testing.assert_close(exact, wanted, rtol=2 * torch.finfo(torch.float64).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exp_at_its_ends(dtype):
    high, low = (88.7, -103.9) if dtype == torch.float32 else (709.7, -745.1)
    ends = [0.0, -0.0, -math.inf, math.inf, math.nan, high, high + 0.5, low, low - 0.5, 1e-45]
    x = torch.tensor(ends, dtype=dtype)
    found, wanted = reduce_plain.exponential(x), x.exp()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0, equal_nan=True)
    assert (found[-3], found[-2]) == (wanted[-3], 0.0)
    assert 0 < found[-3] < torch.finfo(dtype).tiny  # subnormal


@each_dtype
def test_extreme_rows_as_in_torch(dtype):
    inf, nan = math.inf, math.nan
    rows = [[1, inf, 2], [1, -inf, 2], [-inf] * 3, [inf, inf, -inf], [1, nan, 2], [nan] * 3]
    rows += [[-0.0] * 3, [1e4, -1e4, 1e4], [nan, inf, -inf]]
    x = torch.tensor(rows, dtype=dtype)
    for name, wanted in TORCH.items():
        wide = cpu_library.wide(dtype)
        for i, (found, want) in enumerate(
            zip(FUNCTIONS[name](x, wide), wanted(x.double()), strict=True)
        ):
            if (name, i) in (("var_mean", 1), ("layer_norm_bare", 1)):
                want = x.double().mean(-1)  # torch's way to the variance makes NaN of infinity
            close = {"rtol": torch.finfo(found.dtype).eps * 4, "atol": 1e-6}
            torch.testing.assert_close(found.double(), want, **close, equal_nan=True, msg=name)


# Torch warns where no degree of freedom is left.
@pytest.mark.filterwarnings("ignore:var_mean:UserWarning")
@pytest.mark.parametrize("correction", [0.0, 1.0, 0.5, 2.0, 3.0])
def test_correction(correction):
    for size in (1, 2, 10):
        x = drawn(3, size, dtype=torch.float64)
        found = reduce_cpu.row_var_mean(x, correction, dtype=torch.float64)
        wanted = torch.var_mean(x, -1, correction=correction)
        torch.testing.assert_close(found, wanted, equal_nan=True)


def test_variance_far_from_zero_keeps_its_digits():
    x = drawn(2, 1000, dtype=torch.float64).float() + 1e4
    var, _ = reduce_cpu.row_var_mean(x, 1.0, dtype=torch.float32)
    # The mean is good to half an ulp of 1e4 (5e-4), which enters squared.
    torch.testing.assert_close(var.double(), x.double().var(-1), rtol=1e-5, atol=0)


def test_cumsum_adds_in_float64():
    x = torch.full((1, 100_000), 0.1, dtype=torch.float32)
    found = reduce_cpu.row_cumsum(x, dtype=torch.float32)
    assert same((found, x.double().cumsum(-1).float()))


# ---- Edges --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:var_mean:UserWarning")
def test_rows_of_nothing():
    x = torch.empty(3, 0)
    for name in ("sum", "mean", "logsumexp", "softmax", "var_mean", "cumsum", "norm2.0", "norm0.0"):
        found, wanted = FUNCTIONS[name](x, torch.float32), TORCH[name](x)
        torch.testing.assert_close(found, wanted, equal_nan=True)
    for p in (math.inf, -math.inf, -1.0):
        with pytest.raises(RuntimeError, match="needs at least one element"):
            reduce_cpu.row_norm(x, p, dtype=torch.float32)
    assert reduce_cpu.row_layer_norm(x, None, None, 1e-5)[0].shape == (3, 0)


def test_no_rows_and_no_dims():
    for name, function in FUNCTIONS.items():
        for made in function(torch.empty(0, 4, 5), torch.float32):
            assert made.shape in ((0, 4), (0, 4, 5)), name
        row = drawn(70, dtype=torch.float32)
        for alone, one in zip(
            function(row, torch.float32), function(row[None], torch.float32), strict=True
        ):
            assert same((alone, one[0])), name


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"torch\.int32"):
        reduce_cpu.row_sum(torch.ones(2, 3).int(), dtype=torch.float32)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        reduce_cpu.row_sum(torch.ones(2, 3), dtype=torch.int64)
    with pytest.raises(ValueError, match="weight is"):
        reduce_cpu.row_layer_norm(torch.ones(2, 3), torch.ones(2), None, 1e-5)
