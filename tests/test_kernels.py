"""Every kernel against its contract: the meaning, the truth, and what it refuses.

Two oracles: `reference` in the same roundings, and the spec's formula in float64. The third, the
row alone, is in test_kernel_rows.py.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from kernel_cases import (
    EPS,
    HIDDEN,
    LLAMA,
    MANTISSA,
    ROW_STEPS_16BIT,
    SPECS,
    TESTED,
    Inputs,
    build_all,
    each_pair,
    inputs,
    same_bits,
    ulps,
)

from fxpass.kernels import by_name, cpu, kernels, reference
from fxpass.kernels.contract import Kernel
from fxpass.spec import NormSpec, is_narrow


@pytest.fixture(scope="module", autouse=True)
def _built():
    build_all()


# ---- Oracle 1: the reference, in the same roundings --------------------------------------------


def coarsest(spec: NormSpec) -> torch.dtype:
    """The dtype of the coarsest rounding on the way from the row value to the output."""
    dtypes = [spec.row_dtype, *(step.dtype for step in spec.element)]
    return min(dtypes, key=MANTISSA.__getitem__)


def flip_bound(spec: NormSpec) -> float:
    """Most ulps of the coarsest dtype by which a kernel may differ from the reference.

    The sum of squares differs only in its order: a few float32 ulps. A rounding to 16 bits passes
    that on as nothing or as one ulp (a flip). A multiplication or division after a flip can double
    it (the result may have half the mantissa of its operand), and the rounding of its result adds
    at most one more. With no 16-bit rounding the float32 difference itself is left: one ulp from
    the sum, and MKL's sqrt, which is one ulp from the correctly rounded one in 20% of values, both
    at most doubled on the way.
    """
    if not any(is_narrow(dtype) for dtype in (spec.row_dtype, spec.out, coarsest(spec))):
        return 4.0
    bound = float(is_narrow(spec.row_dtype))
    for step in spec.element:
        scales = step.op in ("mul_row", "div_row", "mul_weight")
        bound = bound * (1 + scales) + is_narrow(step.dtype)
    return bound


def assert_matches_reference(kernel: Kernel, spec: NormSpec, given: Inputs) -> dict[str, int]:
    """Check one launch. Returns how many elements there were and how many differed."""
    found, wanted = given.run(kernel, spec), given.run(reference.KERNEL, spec)
    for name in spec.outputs:
        assert found[name].shape == wanted[name].shape
        assert found[name].dtype == wanted[name].dtype
        assert found[name].is_contiguous()
    if "sum" in found:
        assert same_bits(found["sum"], wanted["sum"])
    if found["out"].numel():
        assert ulps(found["out"], wanted["out"], coarsest(spec)).max() <= flip_bound(spec)
        if "row" in found:
            assert ulps(found["row"], wanted["row"], spec.row_dtype).max() <= 4
    return {
        "elements": found["out"].numel(),
        "different": int((found["out"] != wanted["out"]).sum()),
    }


@each_pair
def test_matches_reference(kernel, spec, request):
    total = {"elements": 0, "different": 0}
    for hidden, rows in itertools.product(HIDDEN, (0, 1, 3)):
        counts = assert_matches_reference(kernel, spec, inputs(spec, rows, hidden, seed=hidden))
        total = {key: total[key] + counts[key] for key in total}
    # A 16-bit rounding flips where a value lies within the float32 difference (2**-23, say) of a
    # tie: 2**-23 / 2**-12 = 5e-4 of f16 values, fewer of bf16. A flipped row value moves its row.
    name = request.node.callspec.id.rpartition("-")[2]
    if is_narrow(spec.out) and name not in ROW_STEPS_16BIT:
        assert total["different"] <= 1e-3 * total["elements"]


@each_pair
@pytest.mark.parametrize("shape", [(5,), (2, 3, 40), (2, 1, 3, 2, 33)])
def test_any_rank(kernel, spec, shape):
    assert_matches_reference(kernel, spec, inputs(spec, *shape))


@each_pair
def test_weight_rows(kernel, spec):
    if not kernel.contract.weight_rows or spec.weight is None:
        pytest.skip("one weight row only")
    assert_matches_reference(kernel, spec, inputs(spec, 5, 4, 48, weight_rows=4))


@pytest.mark.parametrize("kernel", TESTED, ids=lambda kernel: kernel.name)
def test_expanded_rows_and_many_dims(kernel):
    spec = NormSpec.parse(LLAMA)
    given = inputs(spec, 1, 40)
    expanded = given.map_rows(lambda t: t.expand(3, 5, 40))
    assert_matches_reference(kernel, spec, expanded)
    scattered = inputs(spec, *[2] * 10, 8).map_rows(lambda t: t.permute(*range(9, -1, -1), 10))
    assert_matches_reference(kernel, spec, scattered)


# ---- Oracle 2: the truth -------------------------------------------------------------------------


def truth(spec: NormSpec, given: Inputs) -> torch.Tensor:
    """The spec's formula in float64, nothing rounded except the residual sum (it is an output)."""
    total = given.x.double()
    if given.residual is not None:
        total = (given.x.float() + given.residual.float()).to(spec.sum).double()

    def exact(steps):
        return tuple(dataclasses.replace(s, dtype=torch.float64) for s in steps if s.op != "cast")

    unrounded = dataclasses.replace(
        spec,
        x=torch.float64,
        residual=None,
        sum=None,
        square=torch.float64,
        row=exact(spec.row),
        element=exact(spec.element) or exact(spec.element[:1]),
        weight_offset_dtype=spec.weight_offset_dtype and torch.float64,
        outputs=("out",),
    )
    weight, bias = (None if t is None else t.double() for t in (given.weight, given.bias))
    return reference.launch(unrounded, total, None, weight, bias, given.eps)[0]


def truth_bound(spec: NormSpec, hidden: int) -> float:
    """Most ulps of the coarsest dtype.

    Each 16-bit rounding adds half an ulp, at most doubled by where the mantissa falls. Squares of
    16 bits err at random, so their mean errs no more than one of them. The float32 sum errs by
    about sqrt(hidden) * 2**-24, relative.
    """
    narrow = [spec.square, spec.weight_offset_dtype or torch.float32]
    narrow += [step.dtype for step in (*spec.row, *spec.element)]
    roundings = 1 + sum(is_narrow(dtype) for dtype in narrow)
    return (
        roundings
        + math.sqrt(hidden) * 2.0 ** (MANTISSA[spec.out] - 23)
        + 4 * (spec.out == torch.float32)
    )


@each_pair
def test_near_the_truth(kernel, spec):
    for hidden in (1, 17, 128, 1000, 20_000):
        given = inputs(spec, 4, hidden, seed=hidden + 1)
        if given.bias is not None:
            given.bias.zero_()  # a sum near zero has no relative error bound
        found, wanted = given.run(kernel, spec)["out"], truth(spec, given)
        assert ulps(found, wanted, coarsest(spec)).max() <= truth_bound(spec, hidden)


# ---- Refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: kernel.name)
def test_contract_refuses_what_it_does_not_claim(kernel):
    contract, spec = kernel.contract, NormSpec.parse(LLAMA)
    platform = contract.platforms[0] if contract.platforms[0] != "any" else "cpu"
    assert "f64" in contract.refusal(dataclasses.replace(spec, x=torch.float64), platform, 64)
    if "any" not in contract.platforms:
        assert "platform mars" in contract.refusal(spec, "mars", 64)
    assert f"< {contract.hidden.least}" in contract.refusal(
        spec, platform, contract.hidden.least - 1
    )
    if contract.hidden.most is not None:
        assert f"> {contract.hidden.most}" in contract.refusal(
            spec, platform, contract.hidden.most + 1
        )


CPU_REFUSALS = {
    LLAMA.replace("weight=bf16", "weight=f64"): "weight is f64, needs bf16 or f16 or f32",
    LLAMA.replace("cast:bf16", "cast:f64"): "step cast:f64 is f64",
    LLAMA.replace("mean:f32,", ""): "must start with its only mean or sum",
    LLAMA.replace("rsqrt:f32", "rsqrt:f32,sum:f32"): "must start with its only mean or sum",
    LLAMA + " outputs=row,out": "outputs row,out",
    LLAMA + " outputs=out,sum": "outputs sum without a residual",
}


@pytest.mark.parametrize("text", CPU_REFUSALS)
def test_cpu_prepare_says_what_it_cannot_generate(text):
    assert CPU_REFUSALS[text] in str(cpu.KERNEL.prepare(NormSpec.parse(text), 64))


def test_cpu_entry_checks_its_tensors():
    spec = NormSpec.parse(SPECS["residual"])
    given, call = inputs(spec, 3, 40), cpu.entry(NormSpec.parse(SPECS["residual"]))
    with pytest.raises(TypeError, match=r"x is torch.float32 on cpu, needs torch.bfloat16 on cpu"):
        call(given.x.float(), given.residual, given.weight, None, EPS)
    with pytest.raises(ValueError, match="residual's shape"):
        call(given.x, given.residual[:2], given.weight, None, EPS)
    with pytest.raises(ValueError, match="weight has 39 elements, needs a multiple of hidden 40"):
        call(given.x, given.residual, given.weight[:39].clone(), None, EPS)
    with pytest.raises(TypeError, match="4 arguments, needs 5"):
        call(given.x, given.residual, given.weight, None)


def test_cpu_entry_copies_what_it_cannot_stride():
    spec = NormSpec.parse(SPECS["residual"])
    given, call = inputs(spec, 3, 40), cpu.entry(spec)
    wanted = call(given.x, given.residual, given.weight, None, EPS)
    column = given.x.t().contiguous().t()
    spread = torch.stack([given.weight, given.weight], -1)[:, 0]
    found = call(column, given.residual, spread, None, EPS)
    assert all(map(same_bits, found, wanted))


def test_cpu_leaves_a_16_bit_rsqrt_to_eager_operators() -> None:
    # Eager rounds bf16 rsqrt once in whole vectors and twice in the last elements of a tensor.
    spec = NormSpec.parse(
        "x=bf16 square=bf16 row=mean:bf16,add_eps:bf16,rsqrt:bf16 element=mul_row:bf16"
    )
    assert "rsqrt" in (by_name("cpu.row").refusal(spec, "cpu", 64) or "")
    assert by_name("reference.eager").refusal(spec, "cpu", 64) is None
