"""A norm in Inductor's own operations, every rounding of its spec written out.

Values are float32 in registers; a rounding is a conversion to 16 bits and back that Inductor may
not leave out. On a GPU some float32 operations need an instruction of their own, because Triton
divides and takes roots approximately and may join a product with the addition that follows it, in
16 bits too, whoever wrote the two: the product of a neighbour, or the addition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxpass import torch_inductor as inductor
from fxpass.dtypes import is_exact_cast
from fxpass.kernels import steps
from fxpass.kernels.steps import Statement
from fxpass.spec import NormSpec, is_narrow
from fxpass.torch_inductor import Value

F32 = torch.float32
Index = Sequence[Any]
Load = Callable[[Index], Any]

_ADDS = ("add_eps", "add_bias", "offset")
_MULTIPLIES = ("mean", "div_n", "mul_n", "mul_const", "square", "mul_row", "mul_weight")


def lower(
    spec: NormSpec,
    hidden: int,
    x: Value,
    residual: Value | None,
    weight: Value | None,
    bias: Value | None,
    eps: float,
) -> dict[str, Value]:
    """The spec's outputs by name."""
    given = [value for value in (x, residual, weight, bias) if value is not None]
    compute = _Compute(
        inductor.ops(),
        inductor.device_of(x).type == "cuda",
        hidden,
        eps,
        fused_input=not all(map(inductor.comes_rounded, given)),
    )
    total = x if residual is None else _added(spec, compute, x, residual)
    if residual is not None and "sum" in spec.outputs:
        inductor.store(total)
    inductor.read_twice(total)
    element = _loaded(compute, total, spec.normed, pinned=residual is not None)
    row = _row(spec, compute, total, element)
    factor = _over_rows(compute, total, weight, spec.weight)
    shift = _over_rows(compute, total, bias, spec.bias)

    def at(index: Index) -> Any:
        operands = {"row": compute.widened(row.make_loader()([*index[:-1], 0]), spec.row_dtype)}
        if factor is not None:
            operands["factor"] = compute.run(steps.factor(spec), factor(index))
        if shift is not None:
            operands["shift"] = shift(index)
        value = compute.run(steps.element(spec), element(index), operands, adds_next=True)
        return compute.rounded(value, [spec.out])

    out = inductor.pointwise(x, spec.out, inductor.size_of(total), at)
    return {"out": out, "sum": total, "row": row}


def _added(spec: NormSpec, compute: _Compute, x: Value, residual: Value) -> Value:
    """The residual sum, in the dtype eager adds in, rounded to its own."""
    assert spec.sum is not None
    assert spec.residual is not None
    left, right = (_widest(dtype, spec.sum) for dtype in (spec.x, spec.residual))
    roundings = [torch.promote_types(left, right), spec.sum]
    loads = [_loaded(compute, x, spec.x), _loaded(compute, residual, spec.residual)]

    def at(index: Index) -> Any:
        left, right = (load(index) for load in loads)
        return compute.rounded(compute.added(left, right), roundings)

    return inductor.pointwise(x, spec.sum, inductor.size_of(x), at)


def _row(spec: NormSpec, compute: _Compute, total: Value, element: Load) -> Value:
    """The value per row, shape (..., 1)."""
    squares = steps.square(spec)

    def square(index: Index) -> Any:
        return compute.run([squares], element(index), adds_next=spec.normed == F32)

    size = inductor.size_of(total)
    added = inductor.summed(inductor.pointwise(total, F32, size, square))
    load = added.make_loader()

    def at(index: Index) -> Any:
        return compute.run(steps.row(spec), load(index), adds_next="row" in spec.outputs)

    return inductor.pointwise(total, spec.row_dtype, (*size[:-1], 1), at)


def _loaded(compute: _Compute, value: Value, dtype: torch.dtype, pinned: bool = False) -> Load:
    """Elements of `value` as float32, rounded to `dtype` even if they come from registers."""
    load = value.make_loader()
    roundings = [] if pinned or inductor.comes_rounded(value) else [dtype]
    return lambda index: compute.rounded(compute.widened(load(index), dtype), roundings)


def _over_rows(
    compute: _Compute, total: Value, weight: Value | None, dtype: torch.dtype | None
) -> Load | None:
    """Elements of a weight of one row, or of several that repeat over the rows of x."""
    if weight is None or dtype is None:
        return None
    lead = inductor.size_of(total)[:-1]
    rows = inductor.plain(math.prod(inductor.size_of(weight)) // compute.hidden)
    load = _loaded(compute, inductor.viewed(weight, (rows, compute.hidden)), dtype)

    def at(index: Index) -> Any:
        row: Any = 0
        for size, position in zip(lead, index[:-1], strict=True):
            row = row * size + position
        # The number of rows may be symbolic.
        return load([0 if rows == 1 else inductor.remainder(row, rows), index[-1]])

    return at


@dataclass(frozen=True)
class _Compute:
    """Float32 operations and roundings on Inductor's values."""

    ops: Any
    gpu: bool
    hidden: int
    eps: float
    fused_input: bool
    """Whether an input may be a product that is still in registers."""

    @property
    def exact(self) -> bool:
        """Whether a product with 1 / hidden is exact."""
        return self.hidden & (self.hidden - 1) == 0

    def widened(self, value: Any, dtype: torch.dtype | None) -> Any:
        """A loaded value as float32."""
        return self.ops.to_dtype(value, F32, src_dtype=dtype)

    def rounded(self, value: Any, dtypes: Iterable[torch.dtype]) -> Any:
        """To each dtype and back; Inductor would keep the float32 value without the last flag."""
        for dtype in dtypes:
            if is_narrow(dtype):
                value = self.ops.to_dtype(value, dtype, src_dtype=F32, use_compute_types=False)
                value = self.ops.to_dtype(value, F32, src_dtype=dtype)
        return value

    def run(
        self,
        program: Sequence[Statement],
        value: Any,
        operands: dict[str, Any] | None = None,
        adds_next: bool = False,
    ) -> Any:
        """The value after the statements. `adds_next`: an addition follows the last one."""
        for at, statement in enumerate(program):
            following = [s for s in program[at + 1 :] if s.op != "cast"][:1]
            added = following[0].op in _ADDS if following else adds_next
            alone = added and statement.op in _MULTIPLIES
            value = self._apply(statement, value, operands or {}, alone)
            value = self.rounded(value, statement.narrow)
        return value

    def _apply(self, step: Statement, v: Any, operands: dict[str, Any], alone: bool) -> Any:
        """One operation, unrounded. `alone`: a product that must not join an addition."""
        if step.op in ("mul_row", "mul_weight"):
            return self._product(v, operands["row" if step.op == "mul_row" else "factor"], alone)
        # Eager on a GPU divides by a number as it multiplies, by the float32 inverse.
        if step.op == "mul_n" or (step.op in ("mean", "div_n") and self.gpu):
            return self._product(v, self._constant(1.0 / self.hidden), alone and not self.exact)
        if step.op == "mul_const":
            return self._product(
                v, self._constant(1.0 if step.value is None else step.value), alone
            )
        if step.op == "square":
            return self._product(v, v, alone)
        if step.op in ("mean", "div_n"):
            return self._quotient(v, self._constant(float(self.hidden)))
        if step.op == "div_row":
            return self._quotient(v, operands["row"])
        if step.op == "reciprocal":
            return self._quotient(self._constant(1.0), v)
        return self._sum_or_root(step, v, operands)

    def _sum_or_root(self, step: Statement, v: Any, operands: dict[str, Any]) -> Any:
        if step.op == "add_eps":
            return self.ops.add(v, self._constant(self.eps))
        if step.op == "clamp_eps":
            return self.ops.maximum(v, self.rounded(self._constant(self.eps), [step.computed]))
        if step.op == "offset":
            return self.added(v, self._constant(step.value or 0.0))
        if step.op == "add_bias":
            return self.added(v, operands["shift"])
        if step.op == "sqrt":
            return self._asm("sqrt.rn.f32 $0, $1;", v) if self.gpu else self.ops.sqrt(v)
        if step.op == "rsqrt":
            # Triton's own rsqrt flushes subnormals, eager's does not.
            return self._asm("rsqrt.approx.f32 $0, $1;", v) if self.gpu else self.ops.rsqrt(v)
        assert step.op in ("sum", "cast"), step.op
        return v

    def added(self, a: Any, b: Any) -> Any:
        """The sum, in which no product of an input's maker is contracted."""
        if self.fused_input and self.gpu:
            return self._asm("add.rn.f32 $0, $1, $2;", a, b)
        return self.ops.add(a, b)

    def _constant(self, value: float) -> Any:
        return self.ops.constant(steps.single(value), F32)

    def _product(self, a: Any, b: Any, alone: bool) -> Any:
        if alone and self.gpu:
            return self._asm("mul.rn.f32 $0, $1, $2;", a, b)
        return self.ops.mul(a, b)

    def _quotient(self, a: Any, b: Any) -> Any:
        if self.gpu:
            return self._asm("div.rn.f32 $0, $1, $2;", a, b)
        return self.ops.truediv(a, b)

    def _asm(self, text: str, *values: Any) -> Any:
        registers = ",".join(["=f", *("f" for _ in values)])
        return self.ops.inline_asm_elementwise(*values, asm=text, constraints=registers, dtype=F32)


def _widest(dtype: torch.dtype, target: torch.dtype) -> torch.dtype:
    return target if is_exact_cast(dtype, target) else dtype
