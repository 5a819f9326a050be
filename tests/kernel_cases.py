"""What the kernel tests share: one list of specs, inputs for them, and how results are compared.

The matrix is every kernel times every spec its contract accepts, so a new kernel, or a new claim of
an old one, is tested without a line here.
"""

import dataclasses
import functools
import itertools

import pytest
import torch

from fxpass.kernels import cpu, kernels
from fxpass.kernels.contract import Kernel
from fxpass.spec import NormSpec

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
    "each_step_f16": "x=f16 square=f16 row=mean:f16,add_eps:f16,sqrt:f16,reciprocal:f16"
    " element=mul_row:f16,mul_weight:f16 weight=f16",
}
ROW_STEPS_16BIT = {"deepseek_v4", "l2", "each_step", "each_step_f16"}
"""Specs whose row value is rounded to 16 bits: one flip there moves the whole row."""

HIDDEN = (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 257, 1000, 4096, 4097, 8192, 20_000)
EPS = 1e-6
MANTISSA = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}
TESTED = [kernel for kernel in kernels() if kernel.contract.platforms in (("cpu",), ("any",))]


def fits(kernel: Kernel, spec: NormSpec) -> bool:
    return kernel.refusal(spec, "cpu", None) is None


PAIRS = [
    pytest.param(kernel, NormSpec.parse(text), id=f"{kernel.name}-{name}")
    for kernel, (name, text) in itertools.product(TESTED, SPECS.items())
    if fits(kernel, NormSpec.parse(text))
]
each_pair = pytest.mark.parametrize(("kernel", "spec"), PAIRS)
INVARIANT = [pair for pair in PAIRS if pair.values[0].contract.batch_invariant]


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


@functools.cache
def build_all() -> None:
    """Compile what the matrix needs on all cores."""
    cpu.prepare_all(map(NormSpec.parse, SPECS.values()))
