"""The Triton kernel's bits, in Triton's interpreter.

test_triton.py runs this file in a process of its own, because TRITON_INTERPRET=1 must be set before
Triton is imported.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from kernel_cases import LLAMA, SPECS, inputs, same_bits
from test_kernel_rows import strided_views
from test_kernels import assert_matches_reference
from triton_cases import MORE_SPECS, expected, interpreted

from fxpass.kernels import triton_row, triton_tiles
from fxpass.spec import NormSpec

HIDDEN = (1, 7, 31, 257, 1000, 4096)
PIECES = {
    1500: (1024, 512),
    2880: (2048, 1024),
    5120: (4096, 1024),
    7168: (8192,),
    12_288: (4096, 4096),
    14_336: (8192,),
}
FEW = ("llama", "llama_f32", "bias", "residual", "each_step")
ALL = {**SPECS, **MORE_SPECS}


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    with interpreted():
        yield


def run(spec, given):
    return given.run(triton_row.KERNEL, spec)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(same_bits(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def schedule(monkeypatch):
    def use(rows_per_program, cut=False, last=False):
        triton_row._bound.cache_clear()  # what was planned before
        found = triton_row.Schedule(rows_per_program, 4, cut, last)
        monkeypatch.setattr(triton_row, "schedule", lambda spec, hidden, rows: found)

    yield use
    triton_row._bound.cache_clear()


@pytest.mark.parametrize("name", ALL)
def test_bits(name):
    spec = NormSpec.parse(ALL[name])
    for hidden in HIDDEN:
        given = inputs(spec, 3, hidden, seed=hidden)
        assert_same(run(spec, given), expected(spec, given))


@pytest.mark.parametrize("name", SPECS)
def test_matches_reference(name):
    spec = NormSpec.parse(SPECS[name])
    for hidden in (31, 1000):
        assert_matches_reference(triton_row.KERNEL, spec, inputs(spec, 2, hidden, seed=hidden))


@pytest.mark.parametrize("name", FEW)
def test_long_rows(name):
    spec = NormSpec.parse(SPECS[name])
    for hidden in (8193, 20_000, 65_536):
        given = inputs(spec, 2, hidden, seed=hidden)
        assert_same(run(spec, given), expected(spec, given))


@pytest.mark.parametrize("name", FEW)
def test_schedules_change_no_bit(name, schedule):
    spec = NormSpec.parse(SPECS[name])
    for hidden in (31, 128, 1000, 2880):
        given = inputs(spec, 5, hidden)
        wanted = expected(spec, given)
        for rows_per_program in (1, 2, 4, 8):
            schedule(rows_per_program, last=rows_per_program == 2)
            assert_same(run(spec, given), wanted)


@pytest.mark.parametrize("name", FEW)
def test_pieces_change_no_bit(name, schedule):
    spec = NormSpec.parse(SPECS[name])
    for hidden, widths in PIECES.items():
        assert triton_tiles.pieces(hidden) == widths
        given = inputs(spec, 2, hidden, seed=hidden)
        schedule(1, cut=True)
        assert_same(run(spec, given), expected(spec, given))


def test_tree_of_pieces_is_the_tree_of_the_row():
    """Squares of values so far apart that another order shows, against the definition itself."""
    spec = NormSpec.parse("x=f32 row=sum:f32 element=mul_row:f32 outputs=out,row")
    for hidden in (*PIECES, 1000, 8192, 16_384):
        given = inputs(spec, 3, hidden, seed=hidden)
        found = given.run(triton_row.KERNEL, spec)["row"].reshape(-1)
        for row, value in zip(given.x, found, strict=True):
            assert value == by_definition((row * row).numpy())


def by_definition(squares: np.ndarray) -> np.float32:
    """The docstring of `gpu_rows`, one addition at a time."""
    lanes = min(8192, max(8, 2 ** math.ceil(math.log2(len(squares)))))
    units = [np.float32(0)] * (lanes // 8)
    for start in range(0, len(squares), lanes):
        for unit in range(lanes // 8):
            place = start + 8 * unit
            a, b, c, d, e, f, g, h = (
                squares[i] if i < len(squares) else np.float32(0) for i in range(place, place + 8)
            )
            units[unit] = units[unit] + (((a + b) + (c + d)) + ((e + f) + (g + h)))
    while len(units) > 1:
        units = [units[i] + units[i + 1] for i in range(0, len(units), 2)]
    return units[0]


def forget():
    triton_row._bound.cache_clear()
    triton_row._kernel.cache_clear()


@pytest.mark.parametrize("name", ALL)
def test_reading_twice_changes_no_bit(name, monkeypatch):
    spec = NormSpec.parse(ALL[name])
    monkeypatch.setattr(triton_tiles, "IN_REGISTERS", 0)
    forget()
    for hidden in (1, 1000, 9000):
        given = inputs(spec, 2, hidden)
        assert_same(run(spec, given), expected(spec, given))
    forget()


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("rows_per_program", [1, 4])
def test_strides_change_no_bit(name, rows_per_program, schedule):
    schedule(rows_per_program)
    spec = NormSpec.parse(SPECS[name])
    given = inputs(spec, 24, 40)
    wanted = expected(spec, given)
    for view in strided_views(40):
        found = run(spec, given.map_rows(view))
        assert_same({key: t.reshape(wanted[key].shape) for key, t in found.items()}, wanted)


def test_x_and_residual_may_be_strided_differently():
    spec = NormSpec.parse(SPECS["residual"])
    given = inputs(spec, 4, 6, 40)
    x = given.x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same(run(spec, dataclasses.replace(given, x=x)), expected(spec, given))


@pytest.mark.parametrize("name", FEW)
def test_weight_rows(name):
    spec = NormSpec.parse(SPECS[name])
    for rows in (2, 4):
        given = inputs(spec, 5, 4, 48, weight_rows=rows)
        assert_same(run(spec, given), expected(spec, given))


@pytest.mark.parametrize("shape", [(5,), (0, 8), (2, 1, 3, 2, 33)])
def test_any_rank(shape):
    spec = NormSpec.parse(SPECS["residual"])
    given = inputs(spec, *shape)
    assert_same(run(spec, given), expected(spec, given))


def test_expanded_rows_and_many_dims():
    spec = NormSpec.parse(LLAMA)
    for given in (
        inputs(spec, 1, 40).map_rows(lambda t: t.expand(3, 5, 40)),
        inputs(spec, *[2] * 6, 8).map_rows(lambda t: t.permute(*range(5, -1, -1), 6)),
    ):
        assert_same(run(spec, given), expected(spec, given))


@pytest.mark.parametrize("name", FEW)
def test_special_values_stay_in_their_row(name):
    spec = NormSpec.parse(SPECS[name])
    for bad in (math.nan, math.inf, -math.inf):
        given = inputs(spec, 3, 1000)
        given.x[1, 50] = bad
        assert_same(run(spec, given), expected(spec, given))


@pytest.mark.parametrize("scale", [2.0**-70, 2.0**-60, 2.0**60, 2.0**70])
def test_tiny_and_huge_rows(scale):
    spec = NormSpec.parse(MORE_SPECS["no_eps"])
    given = inputs(spec, 3, 256).map_rows(lambda t: t * scale)
    assert_same(run(spec, given), expected(spec, given))


def test_zero_rows_keep_their_signs():
    spec = NormSpec.parse(LLAMA)
    given = inputs(spec, 2, 40).map_rows(lambda t: t * 0.0)
    assert torch.signbit(given.x).any()
    assert_same(run(spec, given), expected(spec, given))
