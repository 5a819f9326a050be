"""The GPU reductions' bits and values, in Triton's interpreter.

test_invariant_reduce_triton.py runs this file in a process of its own, because TRITON_INTERPRET=1
must be set before Triton is imported.
"""

import math

import pytest
import torch
from invariant_reduce_cases import ALL, BLOCK, CLOSE, FLOATS, SUMS, same, tolerance, values, views
from triton_cases import interpreted

from fxpass.kernels.invariant import reduce_gpu, scan_triton

pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")

SIZES = (1, 2, 7, 8, 31, 257, 1000, 4096, 8192, 20_000)
F32, F64 = torch.float32, torch.float64


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    with interpreted():
        yield


@pytest.mark.parametrize("name", SUMS)
def test_exact_bits(name):
    kernel, exact = SUMS[name]
    assert BLOCK == scan_triton.BLOCK
    for size in SIZES if name != "cumsum" else (1, 7, 1000, 2048, 5000):
        for dtype in FLOATS if size in (7, 1000) else (torch.bfloat16,):
            x = values(3, size, dtype=dtype, seed=size)
            assert same(kernel(x, F32), exact(x.float())), (size, dtype)
            assert same(kernel(x, dtype), exact(x.float()).to(dtype)), (size, dtype)


@pytest.mark.parametrize("name", SUMS)
def test_float64_is_added_in_float64(name):
    kernel, exact = SUMS[name]
    x = values(2, 300, dtype=F64)
    assert same(kernel(x, F64), exact(x))
    assert same(kernel(x.float(), F64), exact(x.float().double()))
    assert same(kernel(x, F32), exact(x).float())


@pytest.mark.parametrize("name", CLOSE)
def test_close_to_float64(name):
    kernel, meaning = CLOSE[name]
    for size in (2, 7, 31, 1000, 8192, 20_000):
        for dtype in FLOATS if size < 1000 else FLOATS[:1]:
            x = values(3, size, dtype=dtype, seed=size)
            found, out = kernel(x, F32), dtype if name == "layer_norm" else F32
            torch.testing.assert_close(
                found, meaning(x.double()), check_dtype=False, **tolerance(name, size, out)
            )


@pytest.mark.parametrize("name", CLOSE)
def test_float64(name):
    kernel, meaning = CLOSE[name]
    x = values(2, 300, dtype=F64)
    torch.testing.assert_close(kernel(x, F64), meaning(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_rows_alone_and_in_any_layout(name):
    x = values(9, 300)
    together = ALL[name](x, F32)
    for row in (0, 4, 8):
        assert same(ALL[name](x[row : row + 1], F32)[0], together[row])
        assert same(ALL[name](x[row], F32), together[row])
    for layout, view in views(x).items():
        assert same(ALL[name](view, F32), together), layout
    assert same(ALL[name](x.view(3, 3, 300).transpose(0, 1), F32)[1, 2], together[7])
    assert same(ALL[name](x.expand(2, 9, 300), F32)[1], together)


@pytest.mark.parametrize("name", ALL)
def test_neighbours_do_not_matter(name):
    x = values(5, 300)
    wanted = ALL[name](x, F32)
    for bad in (math.nan, math.inf, -math.inf, 0.0):
        x[[0, 1, 3, 4]] = bad
        assert same(ALL[name](x, F32)[2], wanted[2])


@pytest.mark.parametrize("name", ALL)
def test_schedules_change_no_bit(name, monkeypatch):
    x = values(5, 200)
    wanted = ALL[name](x, F32)
    for together in (1, 4, 8):
        monkeypatch.setattr(reduce_gpu, "schedule", lambda size, rows, n=together: (n, 4))
        assert same(ALL[name](x, F32), wanted)


KEPT_OR_NOT = [name for name in CLOSE if not name.startswith("norm")]


@pytest.mark.parametrize("name", KEPT_OR_NOT)
def test_reading_again_changes_no_bit(name, monkeypatch):
    x = values(3, 1000)
    wanted = ALL[name](x, F32)
    monkeypatch.setattr(reduce_gpu, "_kept", lambda x: {"KEPT": False})
    assert same(ALL[name](x, F32), wanted)


@pytest.mark.parametrize("name", ["sum", "mean", "norm2", "logsumexp", "cumsum"])
def test_trailing_zeros_change_no_bit(name):
    """What comes later in a row changes no sum that does not have it."""
    x = values(2, 1000)
    if name == "cumsum":
        longer = torch.cat([x, torch.full((2, 4000), math.nan)], -1)
        assert same(ALL[name](longer, F32)[:, :1000], ALL[name](x, F32))
        return
    longer = torch.nn.functional.pad(x, (0, 24), value=-math.inf if name == "logsumexp" else 0.0)
    found = ALL[name](longer, F32)
    if name == "mean":
        found = reduce_gpu.row_sum(longer, dtype=F32) * (1.0 / 1000)
    assert same(found, ALL[name](x, F32))


@pytest.mark.parametrize("size", [1, 8, 200, 9000])
def test_infinite_elements(size):
    """As torch on the CPU, in float64."""
    x = values(8, size)
    x[0, -1], x[1, -1], x[2, -1] = math.inf, -math.inf, math.nan
    x[3], x[4], x[5] = math.inf, -math.inf, math.nan
    x[6, 0], x[6, -1] = math.inf, math.nan
    for name in ("logsumexp", "softmax", "log_softmax"):
        kernel, meaning = CLOSE[name]
        torch.testing.assert_close(
            kernel(x, F32), meaning(x.double()).float(), equal_nan=True, rtol=1e-6, atol=1e-6
        )
    for p in (0, 1, 2, 3, math.inf, -math.inf):
        torch.testing.assert_close(
            reduce_gpu.row_norm(x, p, dtype=F32),
            torch.linalg.vector_norm(x.double(), p, -1).float(),
            equal_nan=True,
        )


def test_exp_at_the_ends():
    """Subnormal results, and the last place of every result: within 2 ulp of float64's."""
    x = -torch.linspace(0.0, 110.0, 4001).repeat_interleave(2)[:, None]
    x = torch.cat([torch.zeros_like(x), x], -1)
    found = reduce_gpu.row_softmax(x, dtype=F32, log=False)[:, 1]
    exact = x[:, 1].double().exp()
    scale = 1 / (1 + exact.float()).double()
    ulp = torch.nextafter(exact.float(), torch.tensor(math.inf)).double() - exact.float().double()
    assert ((found.double() - exact * scale).abs() <= 2.5 * ulp).all()
    assert ((found == 0) == (exact.float() == 0)).all()


def test_layer_norm():
    for size, dtype in ((31, torch.bfloat16), (1000, F32), (9000, torch.bfloat16)):
        x, w, b = values(4, size, dtype=dtype), values(size).bfloat16(), values(size, seed=1)
        for weight, bias in ((w, b), (w, None), (None, b)):
            found = reduce_gpu.row_layer_norm(x, weight, bias, 1e-5)
            wanted = torch.native_layer_norm(
                x.double(),
                (size,),
                *(None if t is None else t.double() for t in (weight, bias)),
                1e-5,
            )
            assert [t.dtype for t in found] == [dtype, F32, F32]
            for mine, exact, kind in zip(found, wanted, (dtype, F32, F32), strict=True):
                limits = {"rtol": torch.finfo(kind).eps, "atol": 1e-5}
                torch.testing.assert_close(
                    mine.double(), exact.reshape(mine.shape), check_dtype=False, **limits
                )
    with pytest.raises(ValueError, match=r"weight is \(7,\)"):
        reduce_gpu.row_layer_norm(values(2, 8), values(7), None, 1e-5)


def test_var_of_fewer_elements_than_corrected_for():
    x = torch.tensor([[3.0, 3.0], [1.0, 2.0]])
    for correction in (2.0, 3.0):
        found = reduce_gpu.row_var_mean(x, correction, dtype=F32)[0]
        assert found[0].isnan()
        assert found[1] == math.inf


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (0,)])
def test_empty(shape):
    """As torch."""
    x = torch.zeros(shape)
    wanted = {
        "sum": x.sum(-1),
        "mean": x.mean(-1),
        "norm2": torch.linalg.vector_norm(x, 2, -1),
        "norm3": torch.linalg.vector_norm(x, 3, -1),
        "logsumexp": x.logsumexp(-1),
        "softmax": x.softmax(-1),
        "cumsum": x.cumsum(-1),
        "var_mean": x.mean(-1),
        "layer_norm": x,
    }
    for name, expected in wanted.items():
        assert same(ALL[name](x, F32), expected), name


def test_what_is_refused():
    with pytest.raises(RuntimeError, match="order inf needs at least one element"):
        reduce_gpu.row_norm(torch.zeros(3, 0), math.inf, dtype=F32)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        reduce_gpu.row_sum(torch.zeros(3, 4).long(), dtype=F32)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        reduce_gpu.row_var_mean(torch.zeros(3, 0).long(), 1, dtype=F32)
