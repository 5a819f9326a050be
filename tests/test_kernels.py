"""Every kernel against its contract: the meaning, the truth, and the batch.

Three oracles: `reference` in the same roundings, the spec's formula in float64, and the kernel's
own result for the same row alone. The matrix follows the contract, so a new kernel (or a new claim
of an old one) is tested without a line here.
"""

import dataclasses
import itertools
import math

import pytest
import torch

from fxpass.kernels import kernels, reference
from fxpass.kernels.contract import Kernel
from fxpass.spec import NormSpec, is_narrow

LLAMA = (
    "x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,cast:bf16,mul_weight:bf16"
    " weight=bf16"
)
SPECS = {
    "llama": LLAMA,
    "llama_f16": LLAMA.replace("bf16", "f16"),
    "llama_f32": LLAMA.replace("bf16", "f32"),
    "nn_rms_norm": "x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,mul_weight:f32,cast:bf16 weight=bf16",
    "gemma": "x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,mul_weight:f32,cast:bf16 weight=bf16 offset=1.0:f32",
    "offset_16bit": LLAMA + " offset=1.0:bf16",
    "weight_f32": "x=f16 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,cast:f16,mul_weight:f32 weight=f32",
    "mixed_16bit": "x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,cast:bf16,mul_weight:f32,cast:bf16 weight=f16",
    "bias": "x=bf16 row=div_n:f32,add_eps:f32,rsqrt:f32".replace("div_n", "sum:f32,div_n")
    + " element=mul_row:f32,mul_weight:f32,add_bias:f32,cast:bf16 weight=f32 bias=bf16",
    "residual": "x=bf16 residual=bf16 sum=bf16 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,cast:bf16,mul_weight:bf16 weight=bf16 outputs=out,sum,row",
    "residual_f32_sum": "x=bf16 residual=f32 sum=f32 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,mul_weight:f32,cast:bf16 weight=f32 outputs=out,sum",
    "residual_no_sum": "x=bf16 residual=f32 sum=bf16 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,cast:bf16 outputs=out,row",
    "deepseek_v4": "x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32,cast:bf16 element=mul_row:bf16",
    "x_over_sqrt": "x=f32 row=mean:f32,add_eps:f32,sqrt:f32 element=div_row:f32,mul_weight:f32"
    " weight=f32",
    "one_over_sqrt": "x=bf16 row=sum:f32,mul_n:f32,add_eps:f32,sqrt:f32,reciprocal:f32"
    " element=mul_row:f32,mul_weight:f32,cast:bf16 weight=bf16",
    "l2": "x=bf16 row=sum:f32,sqrt:f32,cast:bf16,clamp_eps:bf16 element=div_row:bf16",
    "l2_scaled": "x=f32 row=sum:f32,sqrt:f32,mul_const(0.125):f32,clamp_eps:f32,square:f32,sqrt:f32"
    " element=div_row:f32",
    "each_step": "x=bf16 square=bf16 row=mean:bf16,add_eps:bf16,sqrt:bf16"
    " element=div_row:bf16,mul_weight:bf16 weight=bf16",
    "each_step_f16": "x=f16 square=f16 row=mean:f16,add_eps:f16,rsqrt:f16"
    " element=mul_row:f16,mul_weight:f16 weight=f16",
}
ROW_STEPS_16BIT = {"deepseek_v4", "l2", "each_step", "each_step_f16"}
"""Specs whose row value is rounded to 16 bits: one flip there moves the whole row."""

HIDDEN = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 257, 1000, 4096, 4097, 8192, 20_000)
EPS = 1e-6
MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
TESTED = [kernel for kernel in kernels() if kernel.contract.platforms in (("cpu",), ("any",))]


def fits(kernel: Kernel, spec: NormSpec) -> bool:
    return kernel.contract.refusal(spec, "cpu", None) is None


PAIRS = [
    pytest.param(kernel, NormSpec.parse(text), id=f"{kernel.name}-{name}")
    for kernel, (name, text) in itertools.product(TESTED, SPECS.items())
    if fits(kernel, NormSpec.parse(text))
]
each_pair = pytest.mark.parametrize(("kernel", "spec"), PAIRS)
INVARIANT = [pair for pair in PAIRS if pair.values[0].contract.batch_invariant]


@pytest.fixture(scope="session", autouse=True)
def _built_side_by_side():
    """Compile what the matrix needs on all cores."""
    from fxpass.kernels import cpu

    cpu.prepare_all(map(NormSpec.parse, SPECS.values()))


@dataclasses.dataclass
class Inputs:
    """Tensors for one launch."""

    x: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float = EPS

    def run(self, kernel: Kernel, spec: NormSpec) -> dict[str, torch.Tensor]:
        why_not = kernel.prepare(spec, self.x.shape[-1])
        assert why_not is None, why_not
        made = kernel.launch(spec, self.x, self.residual, self.weight, self.bias, self.eps)
        return dict(zip(spec.outputs, made, strict=True))

    def map_rows(self, change) -> "Inputs":
        residual = None if self.residual is None else change(self.residual)
        return dataclasses.replace(self, x=change(self.x), residual=residual)


def inputs(spec: NormSpec, *shape: int, weight_rows: int = 1, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def make(dtype, *size):
        return None if dtype is None else torch.randn(size, generator=generator).to(dtype)

    size = (shape[-1],) if weight_rows == 1 else (weight_rows, shape[-1])
    return Inputs(
        x=make(spec.x, *shape),
        residual=make(spec.residual, *shape),
        weight=make(spec.weight, *size),
        bias=make(spec.bias, *size),
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and values; any NaN equals any NaN, and -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    equal = a.contiguous().view(integer) == b.contiguous().view(integer)
    return bool((equal | (a.isnan() & b.isnan())).all())


def ulps(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """|found - wanted| in units of the last place of `wanted` in `dtype`."""
    exponent = torch.frexp(wanted.double().abs().clamp_min(torch.finfo(dtype).tiny))[1]
    return (found.double() - wanted.double()).abs() / torch.exp2(
        (exponent - MANTISSA[dtype]).double()
    )


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


@pytest.mark.parametrize("kernel", TESTED, ids=lambda kernel: kernel.name)
def test_expanded_rows_and_many_dims(kernel):
    spec = NormSpec.parse(LLAMA)
    given = inputs(spec, 1, 40)
    expanded = given.map_rows(lambda t: t.expand(3, 5, 40))
    assert_matches_reference(kernel, spec, expanded)
    scattered = inputs(spec, *[2] * 10, 8).map_rows(lambda t: t.permute(*range(9, -1, -1), 10))
    assert_matches_reference(kernel, spec, scattered)


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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_casts_round_like_torch(kernel, dtype):
    """Every 16-bit value in, and every halfway case out: hidden 1 with 1/rms a power of two."""
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
    x = torch.cat(near).reshape(-1, 1)
    found = Inputs(x, None, None, None, eps=1.0).run(kernel, narrow)["out"]
    assert same_bits(found, x.to(dtype))


@pytest.mark.parametrize("kernel", TESTED, ids=lambda kernel: kernel.name)
def test_every_f16_value_is_read(kernel):
    spec = NormSpec.parse("x=f16 row=sum:f32,mul_const(0.0):f32,add_eps:f32 element=mul_row:f32")
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(-1, 1)
    x = x[x.isfinite()].reshape(-1, 1)
    found = Inputs(x, None, None, None, eps=1.0).run(kernel, spec)["out"]
    assert same_bits(found, x.float())


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
    from fxpass.kernels import cpu

    assert CPU_REFUSALS[text] in str(cpu.KERNEL.prepare(NormSpec.parse(text), 64))


def test_cpu_entry_checks_its_tensors():
    from fxpass.kernels import cpu

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
    from fxpass.kernels import cpu

    spec = NormSpec.parse(SPECS["residual"])
    given, call = inputs(spec, 3, 40), cpu.entry(spec)
    wanted = call(given.x, given.residual, given.weight, None, EPS)
    column = given.x.t().contiguous().t()
    spread = torch.stack([given.weight, given.weight], -1)[:, 0]
    found = call(column, given.residual, spread, None, EPS)
    assert all(map(same_bits, found, wanted))
