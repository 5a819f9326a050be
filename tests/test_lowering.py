"""What our operators become on a GPU: the code Inductor generates, without a GPU to run it."""

from __future__ import annotations

import re

import pytest
import sympy
import torch
from fake_gpu import captured, generated, ptx
from kernel_cases import LLAMA, SPECS
from torch._inductor.utils import run_and_get_code

from fxpass import lowering, ops, torch_inductor
from fxpass.kernels import gpu_rows
from fxpass.kernels.contract import Inline
from fxpass.spec import NormSpec

BF16, F32 = torch.bfloat16, torch.float32
RESIDUAL = SPECS["residual"]


@pytest.fixture(autouse=True)
def _registered():
    lowering.register()


def _norm(kernel: str, spec: str, x, residual=None, weight=None, eps=1e-6):
    op = ops.op_for(NormSpec.parse(spec).outputs)
    return op(x, residual, weight, None, None, eps, kernel, spec)


def _text(function, *inputs) -> str:
    return generated(*captured(function, [(shape, BF16) for shape in inputs]))


def _fused(spec: str, x, residual=None, weight=None, bias=None):
    op = ops.op_for(NormSpec.parse(spec).outputs)
    return op(x, residual, weight, bias, None, 1e-6, "inductor.fused", spec)


def _launches(text: str) -> list[str]:
    return re.findall(r"^\s+(fxpass_row\w*\.run\(.*)$", text, re.MULTILINE)


# ---- A Triton kernel that Inductor launches ------------------------------------------------------


def test_heads_of_a_packed_projection_are_read_in_place() -> None:
    def heads(x, w):
        return _norm("triton.row", LLAMA, x.narrow(1, 8, 8), weight=w)

    text = _text(heads, (32, 48, 128), (128,))
    (launch,) = _launches(text)
    # rows, inner, x_outer, x_step, weight_rows, eps, and the grid
    assert "256, 8, 6144, 128, 1, 1e-06, " in launch
    assert "reinterpret_tensor(" in launch
    assert "triton_poi" not in text  # no copy
    assert "torch.ops.fxpass" not in text
    assert "extern_kernels.fxpass" not in text


def test_what_has_three_row_strides_is_copied_once() -> None:
    def scattered(x, w):
        return _norm("triton.row", LLAMA, x.narrow(0, 0, 3).permute(2, 1, 0, 3), weight=w)

    text = _text(scattered, (4, 5, 6, 64), (64,))
    assert len(_launches(text)) == 1
    assert len(re.findall(r"async_compile\.triton\('triton_poi", text)) == 1


def test_an_input_that_is_computed_is_stored_first() -> None:
    text = _text(lambda x, w: _norm("triton.row", LLAMA, x * 2, weight=w), (32, 64), (64,))
    assert len(_launches(text)) == 1
    assert len(re.findall(r"async_compile\.triton\('triton_poi", text)) == 1


def test_equal_sites_share_one_kernel_and_every_output_is_new() -> None:
    def twice(x, r, w):
        out, total, _ = _norm("triton.row", RESIDUAL, x, r, w)
        return _norm("triton.row", RESIDUAL, out, total, w)

    text = _text(twice, (32, 64), (32, 64), (64,))
    assert len(_launches(text)) == 2
    assert text.count("def fxpass_row(") == 1
    assert "buf0 = empty_strided_cuda((32, 64), (64, 1), torch.bfloat16)" in text
    assert "empty_strided_cuda((32, 1), (1, 1), torch.float32)" in text


def test_an_opaque_kernel_is_called_by_a_constant() -> None:
    text = _text(lambda x, w: _norm("cuda.row", LLAMA, x, weight=w), (32, 64), (64,))
    assert f"extern_kernels.fxpass['cuda.row {LLAMA}']" in text
    assert "assert_size_stride(buf" not in text


def test_more_rows_than_one_launch_counts_are_left_to_the_call_which_refuses_them() -> None:
    for rows, launches in ((2**31 - 1, 1), (2**31, 0)):
        text = _text(lambda x, w: _norm("triton.row", LLAMA, x, weight=w), (rows, 8), (8,))
        assert len(_launches(text)) == launches
        assert (f"extern_kernels.fxpass['triton.row {LLAMA}']" in text) == (not launches)


# ---- Its arguments ------------------------------------------------------------------------------


def test_arguments_follow_the_parameters() -> None:
    inline = Inline(None, 4, 2, ("x", "weight", "out", "rows", "inner", "weight_rows", "eps"))
    rows = gpu_rows.address((6, 4, 64), [(512, 64, 1)])
    sizes = lowering.scalars(rows, 64, {"weight": (4, 64)})
    assert sizes == {"rows": 24, "inner": 4, "x_outer": 512, "x_step": 64, "weight_rows": 4}
    launch = lowering.arguments(inline, 25, {"x": "X", "weight": "W", "out": "O", **sizes}, 1e-5)
    assert launch.programs == 13
    assert list(launch.given) == ["x", "weight", "out", "rows", "inner", "weight_rows"]
    assert launch.constants == {"eps": 1e-5}


def test_a_symbolic_number_of_rows_gives_a_symbolic_grid() -> None:
    rows = sympy.Symbol("s0", integer=True, positive=True)
    inline = Inline(None, 1, 4, ("x", "rows"))
    launch = lowering.arguments(inline, rows, {"x": "X", "rows": rows}, 1e-5)
    assert launch.constants == {}
    assert [launch.programs.subs(rows, n) for n in (1, 4, 5)] == [1, 1, 2]


# ---- Inductor's own code -------------------------------------------------------------------------


def test_roundings_and_the_gate_are_in_one_kernel() -> None:
    def gated(x, w, gate):
        return _norm("inductor.fused", LLAMA, x, weight=w) * torch.nn.functional.silu(gate)

    text = _text(gated, (4096, 128), (128,), (4096, 128))
    assert text.count("async_compile.triton(") == 1
    assert text.count(".to(tl.bfloat16)") == 2  # before the weight and after it
    assert "fxpass" not in text


def test_a_sixteen_bit_value_is_rounded_before_it_stays_in_registers() -> None:
    text = _text(lambda x, w: _norm("inductor.fused", LLAMA, x * 3, weight=w), (4096, 128), (128,))
    assert text.count("async_compile.triton(") == 1
    assert text.count(".to(tl.bfloat16)") >= 3


@pytest.mark.parametrize(
    ("name", "hidden", "wanted"),
    [
        ("deepseek_v4", 128, ["mul.rn.f32"]),  # the result, which anything may be added to
        ("l2", 128, ["div.rn.f32", "sqrt.rn.f32"]),
        ("bias", 128, ["mul.rn.f32"]),
        ("x_over_sqrt", 128, ["div.rn.f32", "mul.rn.f32", "sqrt.rn.f32"]),
    ],
)
def test_only_what_triton_would_approximate_or_contract_is_written_in_assembler(
    name: str, hidden: int, wanted: list[str]
) -> None:
    spec = NormSpec.parse(SPECS[name])

    def function(x, w, b):
        bias = b if spec.bias is not None else None
        op = ops.op_for(spec.outputs)
        return op(x, None, w, bias, None, 1e-6, "inductor.fused", str(spec))

    inputs = [((64, hidden), spec.x), ((hidden,), spec.weight), ((hidden,), spec.bias or BF16)]
    text = generated(*captured(function, inputs))
    assert sorted(set(re.findall(r"(\w+\.rn\.f32)", text))) == wanted


def _of_spec(text: str):
    """A norm of inputs, and these."""
    spec = NormSpec.parse(text)
    roles = [role for role in ("residual", "weight", "bias") if getattr(spec, role) is not None]

    def function(x, *rest):
        return _fused(text, x, **dict(zip(roles, rest, strict=True)))

    shapes = {"residual": (64, 96), "weight": (96,), "bias": (96,)}
    given = [((64, 96), spec.x), *((shapes[role], getattr(spec, role)) for role in roles)]
    return function, given


BIASED_16BIT = SPECS["each_step"].replace("mul_weight:bf16", "mul_weight:bf16,add_bias:bf16")
X, W, X32, W32 = ((64, 96), BF16), ((96,), BF16), ((64, 96), F32), ((96,), F32)
SUMS = {
    "result": (lambda x, w, y: _fused(LLAMA, x, None, w) + y, (X, W, X)),
    "result_f32": (lambda x, w, y: _fused(SPECS["llama_f32"], x, None, w) + y, (X32, W32, X32)),
    "bias": (lambda x, w, b: _fused(f"{BIASED_16BIT} bias=bf16", x, None, w, b), (X, W, W)),
    "bias_computed": (
        lambda x, w, b, c: _fused(f"{BIASED_16BIT} bias=bf16", x, None, w, b * c),
        (X, W, W, W),
    ),
    "residual": (lambda x, a, b, w: _fused(RESIDUAL, x, a * b, w), (X, X, X, W)),
    "residual_f32": (
        lambda x, a, b, w: _fused(SPECS["residual_f32_sum"], x, a * b, w),
        (X, X32, X32, W32),
    ),
    "offset": (lambda x, a, b: _fused(SPECS["gemma"], x, None, a * b), (X, W, W)),
    "offset_16bit": (lambda x, a, b: _fused(SPECS["offset_16bit"], x, None, a * b), (X, W, W)),
    **{f"spec_{name}": _of_spec(spec) for name, spec in SPECS.items() if name != "mixed_16bit"},
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SUMS)
def test_no_product_joins_an_addition(name: str, capability: int, tmp_path) -> None:
    function, given = SUMS[name]
    text = generated(*captured(function, given))
    from test_triton import contractions  # skips where there is no Triton

    found = contractions(ptx(text, tmp_path, capability))
    # An addition that says how it rounds is not contracted.
    assert [line for line in found if not line.startswith("add.rn.f32 ")] == []


def test_a_root_of_a_subnormal_is_not_flushed(tmp_path) -> None:
    text = ptx(generated(*captured(*_of_spec(LLAMA))), tmp_path, 90)
    assert "rsqrt.approx.f32" in text
    assert ".ftz" not in text


def test_the_length_is_divided_by_as_eager_does_on_a_gpu() -> None:
    spec = SPECS["bias"]
    text = generated(*captured(*_of_spec(spec)))
    assert "div_n" in spec
    assert "div.rn" not in text


def test_cplusplus_that_drops_roundings_is_not_generated(monkeypatch) -> None:
    """Nor when the graph that names Inductor's own code was made with another torch."""
    monkeypatch.setattr(torch_inductor, "CPP_KEEPS_ROUNDINGS", False)
    given = (torch.randn(4, 64).bfloat16(), torch.rand(64).bfloat16())

    def norm(x, w):
        return _fused(LLAMA, x, weight=w)

    found, (text,) = run_and_get_code(torch.compile(norm, fullgraph=True), *given)
    assert f"extern_kernels.fxpass['inductor.fused {LLAMA}']" in text
    assert torch.equal(found, norm(*given))
