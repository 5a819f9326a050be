"""The row alone, rows with gaps between them, and values at the edge of what floats hold."""

import dataclasses
import math

import pytest
import torch
from kernel_cases import (
    EPS,
    INVARIANT,
    MANTISSA,
    SPECS,
    TESTED,
    Inputs,
    build_all,
    each_pair,
    inputs,
    same_bits,
)

from fxpass.kernels import reference
from fxpass.spec import NormSpec


@pytest.fixture(scope="module", autouse=True)
def _built():
    build_all()


# ---- Oracle 3: the row alone --------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("kernel", "spec"), INVARIANT)
@pytest.mark.parametrize("hidden", [1, 33, 128, 1000, 5000, 20_000])
def test_row_alone_is_row_in_batch(kernel, spec, hidden, threads):
    rows = 9 if hidden > 4096 else 70
    given = inputs(spec, rows, hidden)
    whole = given.run(kernel, spec)
    for position in (0, 1, rows // 2, rows - 1):
        alone = given.map_rows(lambda t, p=position: t[p : p + 1].clone()).run(kernel, spec)
        for name in spec.outputs:
            assert same_bits(alone[name], whole[name][position : position + 1])
    for count in (1, 2, 3):
        threads(count)
        again = given.run(kernel, spec)
        assert all(same_bits(again[name], whole[name]) for name in spec.outputs)


def strided_views(hidden: int):
    """Ways to hold the same 24 rows with gaps, transposed, overlapping dims and odd alignment."""

    def gaps(t):
        wide = torch.full((24, hidden + 7), float("nan"), dtype=t.dtype)
        wide[:, 3 : hidden + 3] = t
        return wide[:, 3 : hidden + 3]

    def transposed(t):
        return t.reshape(4, 6, hidden).transpose(0, 1).contiguous().transpose(0, 1)

    def four_dims(t):
        view = t.reshape(2, 3, 4, hidden)
        return view.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)

    def packed_slice(t):  # q of one packed qkv projection
        return torch.cat([t, t * 2, t * 3], -1).reshape(4, 6, -1)[..., :hidden]

    return [gaps, transposed, four_dims, packed_slice]


@pytest.mark.parametrize(("kernel", "spec"), INVARIANT)
@pytest.mark.parametrize("hidden", [1, 40, 4100])
def test_strides_change_no_bit(kernel, spec, hidden):
    given = inputs(spec, 24, hidden)
    whole = given.run(kernel, spec)
    for view in strided_views(hidden):
        strided = given.map_rows(view)
        assert (strided.x.reshape(24, hidden) == given.x).all()
        found = strided.run(kernel, spec)
        for name in spec.outputs:
            assert found[name].is_contiguous()
            assert same_bits(found[name].reshape(whole[name].shape), whole[name])


@pytest.mark.parametrize("kernel", TESTED, ids=lambda kernel: kernel.name)
def test_residual_and_x_may_be_strided_differently(kernel):
    spec = NormSpec.parse(SPECS["residual"])
    given = inputs(spec, 4, 6, 40)
    strided = dataclasses.replace(
        given, x=given.x.transpose(0, 1).contiguous().transpose(0, 1), residual=given.residual
    )
    found, wanted = strided.run(kernel, spec), given.run(kernel, spec)
    assert all(same_bits(found[name], wanted[name]) for name in spec.outputs)


# ---- Values at the edge -------------------------------------------------------------------------


@each_pair
def test_nan_and_infinite_rows(kernel, spec):
    for bad in (math.nan, math.inf, -math.inf):
        given = inputs(spec, 3, 100)
        given.x[1, 50] = bad
        found, wanted = given.run(kernel, spec), given.run(reference.KERNEL, spec)
        for name in spec.outputs:
            assert (found[name].isnan() == wanted[name].isnan()).all()
            assert (found[name].isinf() == wanted[name].isinf()).all()


@each_pair
def test_nan_in_the_weight_stays_in_its_column(kernel, spec):
    if spec.weight is None:
        pytest.skip("no weight")
    given = inputs(spec, 3, 100)
    # The payload with all bits set is the one that a careless rounding carries into the sign.
    integer = torch.int32 if spec.weight == torch.float32 else torch.int16
    given.weight.view(integer)[7] = torch.iinfo(integer).max
    found = given.run(kernel, spec)["out"]
    assert found[:, 7].isnan().all()
    assert found.isnan().sum() == 3


@each_pair
@pytest.mark.parametrize("eps", [0.0, EPS])
def test_zero_rows(kernel, spec, eps):
    given = dataclasses.replace(inputs(spec, 2, 100), eps=eps)
    given.x.zero_()
    if given.residual is not None:
        given.residual.zero_()
    found, wanted = given.run(kernel, spec), given.run(reference.KERNEL, spec)
    for name in spec.outputs:
        assert torch.equal(found[name].isnan(), wanted[name].isnan())
        assert torch.allclose(found[name].nan_to_num(), wanted[name].nan_to_num(), rtol=2**-7)


@pytest.mark.parametrize("kernel", TESTED, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("hidden", [1, 64])  # one by one, and sixteen at a time
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_casts_round_like_torch(kernel, dtype, hidden):
    """Every 16-bit value and what lies between two: just above, the tie, and around the tie."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    narrow = NormSpec.parse(
        f"x=f32 row=sum:f32,mul_const(0.0):f32,add_eps:f32 element=mul_row:f32,cast:{name}"
    )
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    every = every[every.isfinite() & (every.abs() < 2.0**60)]
    bits = every.view(torch.int32)
    step = 2 ** (MANTISSA[torch.float32] - MANTISSA[dtype])
    near = [(bits + delta).view(torch.float32) for delta in (0, 1, step // 2 - 1, step // 2)]
    near += [(bits + delta).view(torch.float32) for delta in (step // 2 + 1, step - 1)]
    x = torch.cat(near)
    x = x[: len(x) // hidden * hidden].reshape(-1, hidden)
    found = Inputs(x, None, None, None, eps=1.0).run(kernel, narrow)["out"]
    assert same_bits(found, x.to(dtype))


@pytest.mark.parametrize("kernel", TESTED, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("hidden", [1, 64])
def test_every_f16_value_is_read(kernel, hidden):
    spec = NormSpec.parse("x=f16 row=sum:f32,mul_const(0.0):f32,add_eps:f32 element=mul_row:f32")
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(-1, 1)
    x = x[x.isfinite()].reshape(-1, hidden)
    found = Inputs(x, None, None, None, eps=1.0).run(kernel, spec)["out"]
    assert same_bits(found, x.float())
