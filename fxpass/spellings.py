"""The spelling table: every way to write an operation, at Dynamo level and at ATen level.

A row is `@spelled(operation, *targets)`. Targets are functions, OpOverloads or method names; a
spelling may be added only if it gives the same bits as the others of its row. The function under
the row turns a call into a term, or returns None to leave the node a leaf.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxpass import facts
from fxpass.terms import Term, TermTable, exact, number

aten = torch.ops.aten
prims = torch.ops.prims

Builder = Callable[["Call"], "Term | None"]
TABLE: dict[Any, Builder] = {}


class Call:
    """One call with its arguments as terms and its result's facts."""

    def __init__(self, table: TermTable, node: fx.Node, result: facts.TensorFacts) -> None:
        self.table = table
        self.node = node
        self.result = result

    def raw(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument as the graph has it, by position or by one of its names."""
        if position < len(self.node.args):
            return self.node.args[position]
        for name in names:
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        return default

    def term(self, position: int, *names: str) -> Term | None:
        """A tensor or number argument as a term."""
        found = self.raw(position, *names)
        if isinstance(found, fx.Node):
            return self.table.of(found)
        if isinstance(found, (int, float)):
            return self.table.constant(found)
        return None

    def make(self, op: str, *args: Term | None, params: tuple[Any, ...] = ()) -> Term | None:
        """A term with the node's own dtype and shape; None if an argument is missing."""
        known = tuple(arg for arg in args if arg is not None)
        if len(known) != len(args):
            return None
        return self.table.make(op, known, params, self.result.dtype, self.result.shape)


def spelled(*targets: Any) -> Callable[[Builder], Builder]:
    """Add targets (functions, overloads, method names) to the table."""

    def add(builder: Builder) -> Builder:
        for target in targets:
            TABLE[target] = builder
        return builder

    return add


def lift(graph: fx.Graph) -> TermTable:
    """The terms of all nodes of a graph, in one pass."""
    table = TermTable()
    for node in graph.nodes:
        if node.op != "output":
            table.bind(node, _term(table, node))
    return table


def _term(table: TermTable, node: fx.Node) -> Term:
    builder = TABLE.get(node.target) if node.op in ("call_function", "call_method") else None
    found = facts.of(node)
    if builder is None or found is None or "out" in node.kwargs:
        return table.leaf(node)
    return builder(Call(table, node, found)) or table.leaf(node)


VIEWS = frozenset(
    (
        "view", "view_as", "reshape", "reshape_as", "unsqueeze", "squeeze", "flatten", "unflatten",
        "transpose", "permute", "t", "mT", "T", "expand", "expand_as", "contiguous", "to", "float",
        "half", "bfloat16", "type", "type_as", "narrow", "select", "chunk", "split", "unbind",
        "detach", "swapaxes", "movedim", "diagonal", "unfold", "as_strided", "alias", "squeeze_",
        "__getitem__", "getattr",
        torch.unsqueeze, torch.squeeze, torch.reshape, torch.flatten, torch.unflatten,
        torch.transpose, torch.permute, torch.chunk, torch.split, torch.unbind, torch.narrow,
        torch.select, torch.swapaxes, torch.movedim, torch.t, operator.getitem, getattr,
    )
)  # fmt: skip
"""Targets outside ATen whose result may share its inputs' memory (ATen's say so themselves)."""


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
    found = facts.of(source.nodes[0])
    if found is None or found.device != call.result.device:
        return None
    return source if found.dtype == call.result.dtype else call.make("cast", source)


@spelled(
    aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default, aten.contiguous.default,
    "contiguous", "clone", torch.clone,
)  # fmt: skip
def _same(call: Call) -> Term | None:
    return call.term(0, "self", "input")


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


@spelled(aten.expand.default, "expand", "expand_as")
def _expand(call: Call) -> Term | None:
    return call.make("expand", call.term(0, "self"))


@spelled(aten.full.default, aten.scalar_tensor.default, torch.tensor, torch.full)
def _filled(call: Call) -> Term | None:
    scalar = call.raw(0) if len(call.node.args) == 1 else call.raw(1, "fill_value")
    if call.result.shape != () or not isinstance(scalar, (int, float)):
        return None
    rounded = torch.tensor(scalar, dtype=call.result.dtype).item()
    return call.table.constant(rounded)


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
    aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, prims.pow.default, operator.pow, torch.pow,
    torch.float_power, "pow", "__pow__", "float_power",
)  # fmt: skip
def _pow(call: Call) -> Term | None:
    base, exponent = call.term(0, "input", "self"), call.term(1, "exponent")
    power = None if exponent is None else number(exponent)
    if base is None or power is None:
        return None
    # Eager sends these exponents to the named kernels, on CPU and on CUDA.
    name = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}.get(power)
    if name == "square":
        return call.make("square", exact(base))
    return call.make(name, base) if name else call.make("pow", base, params=(power,))


@spelled(aten.square.default, torch.square, "square")
def _square(call: Call) -> Term | None:
    base = call.term(0, "input", "self")
    return None if base is None else call.make("square", exact(base))


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
    aten.clamp_min.default, aten.clamp.default, torch.clamp_min, torch.clamp, torch.clip,
    "clamp_min", "clamp", "clip",
)  # fmt: skip
def _clamp_min(call: Call) -> Term | None:
    if call.raw(2, "max") is not None:
        return None
    return call.make("clamp_min", call.term(0, "input", "self"), call.term(1, "min"))


@spelled(aten.maximum.default, torch.maximum)
def _maximum(call: Call) -> Term | None:
    a, b = call.term(0, "input", "self"), call.term(1, "other")
    if a is None or b is None or number(b) is None:
        return None
    return call.make("clamp_min", a, b)


# --- reductions ------------------------------------------------------------------------------


def _dims(raw: Any, ndim: int) -> tuple[int, ...] | None:
    """Reduced dimensions counted from the front, sorted; None if they are not ints."""
    if raw is None or raw == [] or raw == ():
        return tuple(range(ndim))
    listed = list(raw) if isinstance(raw, (list, tuple, torch.Size)) else [raw]
    if not all(isinstance(dim, int) for dim in listed):
        return None
    return tuple(sorted(dim % ndim if ndim else 0 for dim in listed))


def _reduction(call: Call, op: str) -> Term | None:
    source = call.term(0, "input", "self")
    if source is None or source.shape is None:
        return None
    raw = call.raw(1, "dim", "axis")
    if isinstance(raw, torch.dtype):
        raw = None
    dims = _dims(raw, len(source.shape))
    return None if dims is None else call.make(op, source, params=(dims,))


@spelled(aten.mean.dim, aten.mean.default, torch.mean, "mean")
def _mean(call: Call) -> Term | None:
    return _reduction(call, "mean")


@spelled(aten.sum.dim_IntList, aten.sum.default, torch.sum, "sum")
def _sum(call: Call) -> Term | None:
    return _reduction(call, "sum")


# --- composite operators: the terms eager's own implementation runs ---------------------------


@spelled(
    aten.linalg_vector_norm.default, torch.linalg.vector_norm, torch.linalg.norm, torch.norm,
    "norm", aten.norm.ScalarOpt_dim,
)  # fmt: skip
def _vector_norm(call: Call) -> Term | None:
    """sqrt(sum(x*x)), added up in float32 and rounded once."""
    source = call.term(0, "input", "self", "x", "A")
    order = call.raw(1, "ord", "p", default=2)
    whole = call.raw(2, "dim") is None
    if source is None or source.shape is None or order not in (2, 2.0, "fro", None):
        return None
    dims = _dims(call.raw(2, "dim"), len(source.shape))
    if dims is None or (call.node.target is torch.linalg.norm and len(dims) != 1 and not whole):
        return None
    return _norm_terms(call.table, exact(source), dims, call.result.shape, call.result.dtype)


def _norm_terms(
    table: TermTable, x: Term, dims: tuple[int, ...], shape: tuple[Any, ...], dtype: torch.dtype
) -> Term:
    f32 = torch.float32
    square = table.make("square", (x,), (), f32, x.shape)
    total = table.make("sum", (square,), (dims,), f32, shape)
    root = table.make("sqrt", (total,), (), f32, shape)
    return root if dtype == f32 else table.make("cast", (root,), (), dtype, shape)


@spelled(F.normalize)
def _normalize(call: Call) -> Term | None:
    """X / x.norm(dim=dim, keepdim=True).clamp_min(eps), as torch.nn.functional writes it."""
    x = call.term(0, "input")
    dim = call.raw(2, "dim", default=1)
    if x is None or x.shape is None or call.raw(1, "p", default=2.0) not in (2, 2.0):
        return None
    dims = _dims(dim, len(x.shape))
    if dims is None:
        return None
    shape = _kept(x.shape, dims)
    norm = _norm_terms(call.table, exact(x), dims, shape, call.result.dtype)
    eps = call.table.constant(call.raw(3, "eps", default=1e-12))
    floor = call.table.make("clamp_min", (norm, eps), (), call.result.dtype, shape)
    return call.make("div", x, floor)


def _kept(shape: tuple[Any, ...], dims: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(1 if dim in dims else size for dim, size in enumerate(shape))


@spelled(torch.rms_norm, F.rms_norm, aten.rms_norm.default)
def _rms_norm(call: Call) -> Term | None:
    """Computed in float32, weight included, and rounded once (ATen's rms_norm_composite)."""
    unit = _unit_rms(call)
    if unit is None:
        return None
    return _scaled(call, unit[0], call.result.dtype)


@spelled(operator.getitem)
def _fused_rms_norm_output(call: Call) -> Term | None:
    """The two outputs of `aten._fused_rms_norm`: y and rstd."""
    source, index = call.node.args
    if not isinstance(source, fx.Node) or source.target is not aten._fused_rms_norm.default:
        return None
    inner = Call(call.table, source, call.result)
    x = inner.term(0, "input")
    unit = _unit_rms(inner)
    if unit is None or x is None or x.dtype is None:
        return None
    return _scaled(inner, unit[0], x.dtype) if index == 0 else unit[1]


def _unit_rms(call: Call) -> tuple[Term, Term] | None:
    """(x at unit root-mean-square in float32, its rstd)."""
    x = call.term(0, "input")
    length = call.raw(1, "normalized_shape", default=())
    eps = call.raw(3, "eps")
    if x is None or x.shape is None or not isinstance(length, (list, tuple, torch.Size)):
        return None
    if eps is None:
        # ATen takes the epsilon of the type it computes in: float32 for 16-bit inputs.
        eps = torch.finfo(torch.float32).eps
    if not isinstance(eps, (int, float)) or x.dtype == torch.float64:
        return None
    f32, make = torch.float32, call.table.make
    rank = len(x.shape)
    dims = tuple(range(rank - len(length), rank))
    shape = _kept(x.shape, dims)
    mean = make("mean", (make("square", (exact(x),), (), f32, x.shape),), (dims,), f32, shape)
    variance = make("add", (mean, call.table.constant(eps)), (), f32, shape)
    rstd = make("rsqrt", (variance,), (), f32, shape)
    return make("mul", (x, rstd), (), f32, x.shape), rstd


def _scaled(call: Call, unit: Term, dtype: torch.dtype) -> Term:
    weight = call.term(2, "weight")
    f32, make = torch.float32, call.table.make
    value = unit if weight is None else make("mul", (unit, weight), (), f32, unit.shape)
    return value if dtype == f32 else make("cast", (value,), (), dtype, unit.shape)
