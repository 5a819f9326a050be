"""What the GPU kernels' tests share: their exact bits in torch, and Triton's interpreter."""

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from kernel_cases import LLAMA

from fxpass.kernels import gpu_rows, steps
from fxpass.spec import NormSpec, is_narrow

MORE_SPECS = {
    "bias_16bit": LLAMA.replace("mul_weight:bf16", "mul_weight:bf16,add_bias:bf16") + " bias=bf16",
    "no_eps": "x=bf16 row=mean:f32,rsqrt:f32 element=mul_row:f32,cast:bf16",
    "rsqrt_16bit": "x=f16 square=f16 row=mean:f16,add_eps:f16,rsqrt:f16 element=mul_row:f16",
    "constants": "x=f32 row=sum:f32,mul_const(-0.0):f32,add_eps:f32,mul_const(1e-40):f32"
    " element=mul_row:f32",
    "infinite": "x=f32 row=sum:f32,mul_const(inf):f32 element=div_row:f32",
}
"""What kernel_cases does not have: a bias in 16 bits, no eps, constants that are hard to write."""


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Triton's interpreter on CPU tensors; TRITON_INTERPRET=1 must be set before its import."""
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", _convert_float)
        patch.setattr(interpreter.InterpreterBuilder, "create_fma", _fma)
        yield


def _convert_float(data, source, target, rounding):
    """Rounds to nearest even, as GPUs do; the interpreter's own truncates bf16."""
    del rounding
    dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    raw = torch.from_numpy(np.ascontiguousarray(data).view(_integer(source)))
    value = raw.view(dtypes[source.name]).to(dtypes[target.name])
    return value.view(getattr(torch, _integer(target))).numpy().reshape(np.shape(data))


def _fma(builder, x, y, z):
    """Rounds once; the interpreter's own rounds the product, too."""
    del builder
    from triton.runtime.interpreter import TensorHandle

    wide = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(wide.astype(np.float32), z.dtype.scalar)


def _integer(dtype) -> str:
    return f"int{dtype.primitive_bitwidth}"


def correct_sqrt(value: torch.Tensor) -> torch.Tensor:
    """Correctly rounded; torch's own may be MKL's, which is not."""
    return torch.from_numpy(np.sqrt(value.numpy()))


def correct_rsqrt(value: torch.Tensor) -> torch.Tensor:
    """Two roundings, as Triton's interpreter does it. An NVIDIA GPU approximates."""
    return 1.0 / correct_sqrt(value)


def expected(spec: NormSpec, given, rsqrt=correct_rsqrt) -> dict[str, torch.Tensor]:
    """The bits of `triton.row` and `cuda.row`, from tensors on the CPU.

    Every operation is one of IEEE float32, which torch on a CPU rounds as a GPU does, except rsqrt:
    for what a GPU computed, pass torch's own there, `lambda v: v.cuda().rsqrt().cpu()`.
    """
    x = given.x.float()
    if given.residual is not None:
        x = (x + given.residual.float()).to(spec.sum).float()
    rows = x.reshape(-1, x.shape[-1])
    value = _program(steps.row(spec), tree(spec, rows), given.eps, rows.shape[-1], rsqrt)
    out = _elements(spec, rows, value, given)
    shapes = {"out": x.shape, "sum": x.shape, "row": (*x.shape[:-1], 1)}
    made = {
        "out": out.to(spec.out),
        "sum": rows.to(spec.normed),
        "row": value.to(spec.row_dtype),
    }
    return {name: made[name].reshape(shapes[name]) for name in spec.outputs}


def tree(spec: NormSpec, rows: torch.Tensor) -> torch.Tensor:
    """The sum of squares in the order of `gpu_rows`; (rows, hidden) -> (rows, 1)."""
    lanes = gpu_rows.lanes(rows.shape[1])
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % lanes))
    chunks = padded.reshape(len(rows), padded.shape[1] // lanes, lanes)
    units = _nearest_first(_squares_of_two(spec, chunks), gpu_rows.VECTOR // 2)
    total = units[:, 0]
    for chunk in range(1, units.shape[1]):
        total = total + units[:, chunk]
    return _nearest_first(total, total.shape[1])


def _squares_of_two(spec: NormSpec, value: torch.Tensor) -> torch.Tensor:
    even, odd = value[..., ::2], value[..., 1::2]
    if is_narrow(spec.normed) and not steps.square(spec).narrow:
        # A fused multiply-add, which matters below 2**-63, where squares are not exact either:
        # float64 holds this product, and its rounding of the sum does not show in float32.
        return (odd.double() * odd.double() + (even * even).double()).float()
    return _rounded(even * even, steps.square(spec)) + _rounded(odd * odd, steps.square(spec))


def _nearest_first(value: torch.Tensor, count: int) -> torch.Tensor:
    """Adds groups of `count` neighbours, a power of two."""
    while count > 1:
        value = value[..., ::2] + value[..., 1::2]
        count //= 2
    return value


def _elements(spec, rows, row_value, given) -> torch.Tensor:
    def repeated(shared):
        shared = shared.reshape(-1, rows.shape[1])
        return shared.repeat(-(-len(rows) // len(shared)), 1)[: len(rows)].float()

    operands = {"mul_row": row_value, "div_row": row_value}
    if given.weight is not None:
        operands["mul_weight"] = _program(steps.factor(spec), repeated(given.weight), 0.0, 1)
    if given.bias is not None:
        operands["add_bias"] = repeated(given.bias)
    value = rows
    for statement in steps.element(spec):
        if statement.op in ("mul_row", "mul_weight"):
            value = value * operands[statement.op]
        elif statement.op == "div_row":
            value = value / operands["div_row"]
        elif statement.op == "add_bias":
            value = value + operands["add_bias"]
        value = _rounded(value, statement)
    return value


def _program(statements, value, eps, hidden, rsqrt=correct_rsqrt) -> torch.Tensor:
    single = torch.tensor(eps, dtype=torch.float32)
    for statement in statements:
        bound = _rounded_to(single, statement.computed)
        constant = torch.tensor(1.0 if statement.value is None else statement.value)
        by_op = {
            # Eager on a GPU multiplies in all three. The float32 inverse and the double one rounded
            # to float32 are equal for every hidden up to 2**17.
            "mean": lambda v: v * (1.0 / hidden),
            "mul_n": lambda v: v * (1.0 / hidden),
            "div_n": lambda v: v * (1.0 / hidden),
            "mul_const": lambda v, c=constant: v * c,
            "offset": lambda v, c=constant: v + c,
            "add_eps": lambda v: v + single,
            "clamp_eps": lambda v, b=bound: torch.where(v < b, b, v),
            "sqrt": correct_sqrt,
            "square": lambda v: v * v,
            "rsqrt": rsqrt,
            "reciprocal": lambda v: 1.0 / v,
        }
        value = by_op.get(statement.op, lambda v: v)(value)
        value = _rounded(value, statement)
    return value


def _rounded(value: torch.Tensor, statement: steps.Statement) -> torch.Tensor:
    for dtype in statement.narrow:
        value = value.to(dtype).float()
    return value


def _rounded_to(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return value.to(dtype).float() if is_narrow(dtype) else value
