"""The Triton kernel's bits, in Triton's interpreter.

test_triton.py runs this file in a process of its own, because TRITON_INTERPRET=1 must be set before
Triton is imported.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from kernel_cases import LLAMA, SPECS, inputs, same_bits
from test_kernel_rows import strided_views
from test_kernels import assert_matches_reference
from triton_cases import MORE_SPECS, expected, interpreted

from fxpass.kernels import triton_row, triton_source
from fxpass.spec import NormSpec

HIDDEN = (1, 7, 31, 128, 257, 1000, 2880, 4096)
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
    def use(rows_per_program):
        monkeypatch.setattr(triton_row, "schedule", lambda hidden, rows: (rows_per_program, 4))

    return use


@pytest.mark.parametrize("name", ALL)
def test_bits(name):
    spec = NormSpec.parse(ALL[name])
    for hidden in HIDDEN:
        given = inputs(spec, 3, hidden, seed=hidden)
        assert_same(run(spec, given), expected(spec, given))


@pytest.mark.parametrize("name", SPECS)
def test_matches_reference(name):
    spec = NormSpec.parse(SPECS[name])
    for hidden in HIDDEN:
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
            schedule(rows_per_program)
            assert_same(run(spec, given), wanted)


def forget():
    triton_row._bound.cache_clear()
    triton_row._kernel.cache_clear()


@pytest.mark.parametrize("name", ALL)
def test_reading_twice_changes_no_bit(name, monkeypatch):
    spec = NormSpec.parse(ALL[name])
    monkeypatch.setattr(triton_source, "IN_REGISTERS", 0)
    forget()
    for hidden in (1, 1000, 9000):
        given = inputs(spec, 2, hidden)
        assert_same(run(spec, given), expected(spec, given))
    forget()


@pytest.mark.parametrize("name", SPECS)
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


@pytest.mark.parametrize("name", SPECS)
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


@pytest.mark.parametrize("name", SPECS)
def test_special_values_stay_in_their_row(name):
    spec = NormSpec.parse(SPECS[name])
    for bad, hidden in itertools.product((math.nan, math.inf, -math.inf), (100, 1000)):
        given = inputs(spec, 3, hidden)
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
