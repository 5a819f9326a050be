"""The spelling table: every way to write an operation, at Dynamo level and at ATen level.

A row is `@spelled(*targets)`. Targets are functions, OpOverloads or method names; a spelling may be
added only if it gives the same bits as the others of its row. The function under the row turns a
call into a term, or returns None to leave the node a leaf.
"""

from __future__ import annotations

import operator

import torch

from fxpass import facts
from fxpass.calls import Call, reduced_dims, spelled
from fxpass.dtypes import is_exact_cast
from fxpass.terms import Term, exact, number

aten = torch.ops.aten
prims = torch.ops.prims


# --- casts, views and copies -----------------------------------------------------------------


@spelled(
    prims.convert_element_type.default, aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout,
    aten.to.other, aten.to.device, aten.type_as.default, "to", "float", "half", "bfloat16",
    "double", "type", "type_as",
)  # fmt: skip
def _cast(call: Call) -> Term | None:
    source = call.term(0, "a", "self", "input")
    if source is None or not source.nodes:
        return None
    if source.op == "const":
        return _rounded(call, source.params[0])
    found = facts.of(source.nodes[0])
    if found is None or found.device != call.result.device:
        return None
    if found.dtype != call.result.dtype:
        return call.make("cast", source)
    if call.node.target in _COPIES or _asks_for_a_copy(call):
        return _copied(call, source, call.make("copy", source))
    same = facts.same_shape(found.stride, call.result.stride)
    return source if same else _copied(call, source, source)


_COPIES = (prims.convert_element_type.default, aten._to_copy.default)
"""Casts whose result is another tensor in any case."""


def _asks_for_a_copy(call: Call) -> bool:
    """`to(..., copy=True)`, which stands third, fourth or fifth; `non_blocking` counts as well."""
    return call.node.kwargs.get("copy") is True or any(arg is True for arg in call.node.args)


@spelled(aten.alias.default, aten.contiguous.default, "contiguous")
def _same(call: Call) -> Term | None:
    """The same tensor, or a copy in another memory order, unless either is written."""
    source = call.term(0, "self", "input")
    return _copied(call, source, source)


@spelled(aten.clone.default, aten.lift_fresh_copy.default, "clone", torch.clone)
def _copy(call: Call) -> Term | None:
    """The same value in memory of its own, under the same condition."""
    source = call.term(0, "self", "input")
    return _copied(call, source, call.make("copy", source))


_COMPUTED = ("mul", "div", "cast", "add")
"""What stands at the end of a norm, where AOTAutograd may put a copy in another memory order."""


def _copied(call: Call, source: Term | None, alike: Term | None) -> Term | None:
    """`alike` if source and result are laid out alike, else a value that says that they are not.

    A norm's end is looked for behind that one too; what a kernel reads is taken as it is.
    """
    if source is None or not source.nodes:
        return None
    if not call.table.overwritten.isdisjoint((call.node, *source.nodes)):
        return None
    found = facts.of(source.nodes[0])
    if found is None:
        return None
    if facts.same_shape(found.stride, call.result.stride):
        return alike
    order = tuple(map(str, call.result.stride))
    return call.make("reorder", source, params=order) if source.op in _COMPUTED else None


@spelled(
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, aten._reshape_copy.default,
    aten.flatten.using_ints, aten.unflatten.int,
    "view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten",
    torch.unsqueeze, torch.squeeze, torch.reshape, torch.flatten, torch.unflatten,
)  # fmt: skip
def _view(call: Call) -> Term | None:
    source = call.term(0, "self", "input")
    if source is None or source.dtype != call.result.dtype:
        return None  # view(dtype) reinterprets the bits
    return call.make("view", source)


@spelled(aten.expand.default, aten.expand_as.default, "expand", "expand_as")
def _expand(call: Call) -> Term | None:
    return call.make("expand", call.term(0, "self"))


@spelled(aten.full.default, aten.scalar_tensor.default, torch.tensor, torch.full)
def _filled(call: Call) -> Term | None:
    scalar = call.raw(0) if len(call.node.args) == 1 else call.raw(1, "fill_value")
    if call.result.shape != () or not isinstance(scalar, (int, float)):
        return None
    if call.node in call.table.overwritten:
        return None
    return _rounded(call, scalar)


def _rounded(call: Call, scalar: float) -> Term:
    """A constant as the result's dtype holds it."""
    return call.table.constant(torch.tensor(scalar, dtype=call.result.dtype).item())


# --- arithmetic ------------------------------------------------------------------------------


@spelled(
    aten.mul.Tensor, aten.mul.Scalar, prims.mul.default, operator.mul, torch.mul, torch.multiply,
    "mul", "multiply", "__mul__", "__rmul__",
)  # fmt: skip
def _mul(call: Call) -> Term | None:
    a, b = call.term(0, "input", "self"), call.term(1, "other")
    if a is None or b is None:
        return None
    if a.op != "const" and exact(a) is exact(b) and a.shape == b.shape == call.result.shape:
        return call.make("square", exact(a))
    if a.op == "reciprocal" and number(b) == 1.0 and a.dtype == call.result.dtype:
        return a  # AOTAutograd writes 1 / y as reciprocal(y) * 1
    return call.make("mul", a, b)


@spelled(
    aten.add.Tensor, aten.add.Scalar, prims.add.default, operator.add, torch.add, "add",
    "__add__", "__radd__",
)  # fmt: skip
def _add(call: Call) -> Term | None:
    if call.raw(2, "alpha", default=1) != 1:
        return None
    return call.make("add", call.term(0, "input", "self"), call.term(1, "other"))


@spelled(aten.sub.Tensor, prims.sub.default, operator.sub, torch.sub, torch.subtract, "sub")
def _sub(call: Call) -> Term | None:
    if call.raw(2, "alpha", default=1) != 1:
        return None
    return call.make("sub", call.term(0, "input", "self"), call.term(1, "other"))


@spelled(
    aten.div.Tensor, aten.div.Scalar, prims.div.default, operator.truediv, torch.div,
    torch.divide, torch.true_divide, "div", "divide", "true_divide", "__truediv__",
)  # fmt: skip
def _div(call: Call) -> Term | None:
    if call.raw(2, "rounding_mode") is not None:
        return None
    a, b = call.term(0, "input", "self"), call.term(1, "other")
    if a is None or b is None:
        return None
    return call.make("reciprocal", b) if number(a) == 1.0 else call.make("div", a, b)


@spelled("__rtruediv__")
def _rdiv(call: Call) -> Term | None:
    a, b = call.term(1, "other"), call.term(0, "self")
    if a is None or b is None:
        return None
    return call.make("reciprocal", b) if number(a) == 1.0 else call.make("div", a, b)


@spelled(
    aten.pow.Tensor_Scalar, prims.pow.default, operator.pow, torch.pow,
    torch.float_power, "pow", "__pow__", "float_power",
)  # fmt: skip
def _pow(call: Call) -> Term | None:
    base, power = call.term(0, "input", "self"), call.raw(1, "exponent")
    if base is None or not isinstance(power, (int, float)):
        return None  # a tensor as exponent takes another kernel, with other bits
    # Eager sends these exponents to the named kernels, on CPU and on CUDA.
    if power == -0.5 and call.result.dtype == torch.float16:
        return None  # but not this one: 6 of 100,000 float16 values differ from rsqrt
    name = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(power)
    if name == "square":
        return call.make("square", _unsigned(base))
    return call.make(name, base) if name else call.make("pow", base, params=(power,))


@spelled(aten.square.default, torch.square, "square")
def _square(call: Call) -> Term | None:
    base = call.term(0, "input", "self")
    return None if base is None else call.make("square", _unsigned(base))


def _unsigned(base: Term) -> Term:
    """What is squared: its sign does not matter, so abs(x) squares to the same bits as x."""
    value = exact(base)
    return exact(value.args[0]) if value.op == "abs" else value


@spelled(aten.rsqrt.default, prims.rsqrt.default, torch.rsqrt, "rsqrt")
def _rsqrt(call: Call) -> Term | None:
    return call.make("rsqrt", call.term(0, "input", "self"))


@spelled(aten.sqrt.default, prims.sqrt.default, torch.sqrt, "sqrt")
def _sqrt(call: Call) -> Term | None:
    return call.make("sqrt", call.term(0, "input", "self"))


@spelled(aten.reciprocal.default, prims.reciprocal.default, torch.reciprocal, "reciprocal")
def _reciprocal(call: Call) -> Term | None:
    return call.make("reciprocal", call.term(0, "input", "self"))


@spelled(aten.abs.default, torch.abs, "abs")
def _abs(call: Call) -> Term | None:
    return call.make("abs", call.term(0, "input", "self"))


@spelled(
    aten.clamp_min.default, aten.clamp.default, aten.clamp_min.Tensor, aten.clamp.Tensor,
    torch.clamp_min, torch.clamp, torch.clip,
    "clamp_min", "clamp", "clip",
)  # fmt: skip
def _clamp_min(call: Call) -> Term | None:
    if call.raw(2, "max") is not None:
        clipped = call.raw(1, "min") is None
        value, most = call.term(0, "input", "self"), call.term(2, "max")
        return call.make("clamp_max", value, most) if clipped else None
    return call.make("clamp_min", call.term(0, "input", "self"), call.term(1, "min"))


@spelled(aten.clamp_max.default, torch.clamp_max, "clamp_max")
def _clamp_max(call: Call) -> Term | None:
    return call.make("clamp_max", call.term(0, "input", "self"), call.term(1, "max"))


@spelled(aten.maximum.default, torch.maximum)
def _maximum(call: Call) -> Term | None:
    a, b = call.term(0, "input", "self"), call.term(1, "other")
    if a is None or b is None:
        return None
    if _is_scalar(b):
        return call.make("clamp_min", a, b)
    return call.make("clamp_min", b, a) if _is_scalar(a) else None


def _is_scalar(term: Term) -> bool:
    return number(term) is not None or term.shape == ()


# --- reductions ------------------------------------------------------------------------------


def _reduction(call: Call, op: str) -> Term | None:
    source = call.term(0, "input", "self")
    if source is None or source.shape is None:
        return None
    raw = call.raw(1, "dim", "axis")
    if isinstance(raw, torch.dtype):
        raw = None
    dims = reduced_dims(raw, len(source.shape))
    if dims is None or source.dtype is None or not is_exact_cast(source.dtype, call.result.dtype):
        return None  # a narrower `dtype=` rounds every element first
    return call.make(op, source, params=(dims,))


@spelled(aten.mean.dim, aten.mean.default, torch.mean, "mean")
def _mean(call: Call) -> Term | None:
    return _reduction(call, "mean")


@spelled(aten.sum.dim_IntList, aten.sum.default, torch.sum, "sum")
def _sum(call: Call) -> Term | None:
    return _reduction(call, "sum")
