"""Composite operators as the terms that eager's own implementation runs.

The terms inside have no nodes of their own: only the operator's result is a value of the graph.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxpass.calls import Call, reduced_dims, spelled
from fxpass.parts import picked
from fxpass.terms import Term, TermTable, exact

aten = torch.ops.aten


_ANY_NORM = (torch.linalg.norm, aten.linalg_norm.default)
"""Of a vector or of a matrix, as the arguments say."""


@spelled(
    aten.linalg_vector_norm.default, torch.linalg.vector_norm, torch.linalg.norm, torch.norm,
    aten.linalg_norm.default, "norm", aten.norm.ScalarOpt_dim,
)  # fmt: skip
def _vector_norm(call: Call) -> Term | None:
    """sqrt(sum(x*x)), added up in float32 and rounded once."""
    source = call.term(0, "input", "self", "x", "A")
    order = call.raw(1, "ord", "p", default=None if call.node.target in _ANY_NORM else 2)
    if source is None or source.shape is None or order not in (2, 2.0, "fro", None):
        return None
    dims = reduced_dims(call.raw(2, "dim"), len(source.shape))
    if dims is None or (call.node.target in _ANY_NORM and not _is_vector_norm(order, dims)):
        return None
    return _norm_terms(call.table, exact(source), dims, call.result.shape, call.result.dtype)


def _is_vector_norm(order: object, dims: tuple[int, ...]) -> bool:
    """torch.linalg.norm of a matrix with ord=2 is its largest singular value."""
    return len(dims) == 1 or order is None or order == "fro"


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
    dims = reduced_dims(dim, len(x.shape))
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


_WHOLE = (Ellipsis, None, slice(None))
"""Parts of an index that take everything, or add a dimension of size 1."""


@spelled(operator.getitem)
def _getitem(call: Call) -> Term | None:
    """`y[..., None]`, `y[:, None]`, an output of `aten._fused_rms_norm`, or another part."""
    index = call.node.args[1]
    if isinstance(index, tuple) and all(item in _WHOLE for item in index):
        source = call.term(0)
        return None if source is None else call.make("view", source)
    return _fused_rms_norm_output(call) or picked(call)


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
