"""`fxpass::bi_*`: the functions of `dispatch` as operators of a graph.

Their views and casts stay in the graph as ATen's own. `OPERATORS` goes to `dispatch.through` while
a graph is traced; `calls` is what compiled code calls.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fxpass.dtypes import wide
from fxpass.invariant import attention_op
from fxpass.invariant.attention import attend
from fxpass.kernels.invariant import dispatch
from fxpass.kernels.invariant.convolve import Windows

Tensor = torch.Tensor

_library: Any = getattr(torch.library, "Library")("fxpass", "FRAGMENT")  # noqa: B009 - untyped

_MATMUL = (
    "bi_matmul(Tensor a, Tensor b, Tensor? bias, float alpha, float beta, ScalarType? out_dtype,"
    " bool tf32) -> Tensor"
)
_SCHEMAS = {
    "matmul": _MATMUL,
    "grouped_matmul": "bi_grouped_matmul(Tensor a, Tensor b, Tensor ends) -> Tensor",
    "convolution": (
        "bi_convolution(Tensor x, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding,"
        " SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups,"
        " bool channels_last, bool tf32) -> Tensor"
    ),
    "solve_lower": "bi_solve_lower(Tensor a, Tensor b, bool unit) -> Tensor",
    "row_sum": "bi_row_sum(Tensor x, ScalarType dtype) -> Tensor",
    "row_mean": "bi_row_mean(Tensor x, ScalarType dtype) -> Tensor",
    "row_norm": "bi_row_norm(Tensor x, float p, ScalarType dtype) -> Tensor",
    "row_logsumexp": "bi_row_logsumexp(Tensor x, ScalarType dtype) -> Tensor",
    "row_softmax": "bi_row_softmax(Tensor x, ScalarType dtype, bool log) -> Tensor",
    "row_var_mean": (
        "bi_row_var_mean(Tensor x, float correction, ScalarType dtype) -> (Tensor, Tensor)"
    ),
    "row_layer_norm": (
        "bi_row_layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "row_cumsum": "bi_row_cumsum(Tensor x, ScalarType dtype) -> Tensor",
}


# ---- What compiled code calls: positional arguments, contiguous results -------------------------


def _matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype | None,
    tf32: bool,
) -> Tensor:
    # Graphs have many products: without `dispatch.matmul` each costs 1 us less on the host.
    found: Tensor = dispatch.products(a.device.type).matmul(
        a, b, bias, alpha=alpha, beta=beta, out_dtype=out_dtype, tf32=tf32
    )
    return found


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> Tensor:
    *windows, channels_last, tf32 = given
    return dispatch.convolution(
        x, weight, bias, Windows(*windows), channels_last=channels_last, tf32=tf32
    )


def _row_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    return dispatch.row_sum(x, dtype=dtype).contiguous()


def _row_mean(x: Tensor, dtype: torch.dtype) -> Tensor:
    return dispatch.row_mean(x, dtype=dtype).contiguous()


def _row_norm(x: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    return dispatch.row_norm(x, p, dtype=dtype).contiguous()


def _row_logsumexp(x: Tensor, dtype: torch.dtype) -> Tensor:
    return dispatch.row_logsumexp(x, dtype=dtype).contiguous()


def _row_softmax(x: Tensor, dtype: torch.dtype, log: bool) -> Tensor:
    return dispatch.row_softmax(x, dtype=dtype, log=log).contiguous()


def _row_var_mean(x: Tensor, correction: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    var, mean = dispatch.row_var_mean(x, correction, dtype=dtype)
    return var.contiguous(), mean.contiguous()


def _row_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd = dispatch.row_layer_norm(x, weight, bias, eps)
    return out.contiguous(), mean.contiguous(), rstd.contiguous()


def _row_cumsum(x: Tensor, dtype: torch.dtype) -> Tensor:
    return dispatch.row_cumsum(x, dtype=dtype).contiguous()


calls: dict[str, Callable[..., Any]] = {
    "matmul": _matmul,
    "grouped_matmul": dispatch.grouped_matmul,
    "convolution": _convolution,
    "solve_lower": dispatch.solve_lower,
    "row_sum": _row_sum,
    "row_mean": _row_mean,
    "row_norm": _row_norm,
    "row_logsumexp": _row_logsumexp,
    "row_softmax": _row_softmax,
    "row_var_mean": _row_var_mean,
    "row_layer_norm": _row_layer_norm,
    "row_cumsum": _row_cumsum,
    "attention": attend,
}


# ---- Their shapes -------------------------------------------------------------------------------


def _fake_matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    alpha: float,
    beta: float,
    out_dtype: torch.dtype | None,
    tf32: bool,
) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1], dtype=out_dtype or a.dtype)


def _fake_grouped(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


def _fake_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *given: Any) -> Tensor:
    *windows, channels_last, _ = given
    channels, *sizes = Windows(*windows).sizes(x.shape, weight.shape)
    if channels_last:
        return x.new_empty(x.shape[0], *sizes, channels).movedim(-1, 1)
    return x.new_empty(x.shape[0], channels, *sizes)


def _fake_row(x: Tensor, *given: Any) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=given[-1])


def _fake_softmax(x: Tensor, dtype: torch.dtype, log: bool) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _fake_var_mean(x: Tensor, correction: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _fake_row(x, dtype), _fake_row(x, dtype)


def _fake_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    single = wide(x.dtype)
    return x.new_empty(x.shape), _fake_row(x, single), _fake_row(x, single)


def _fake_cumsum(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "matmul": _fake_matmul,
    "grouped_matmul": _fake_grouped,
    "convolution": _fake_convolution,
    "solve_lower": lambda a, b, unit: b.new_empty(b.shape),
    "row_softmax": _fake_softmax,
    "row_var_mean": _fake_var_mean,
    "row_layer_norm": _fake_layer_norm,
    "row_cumsum": _fake_cumsum,
}


def _tags(name: str) -> tuple[Any, ...]:
    """What Inductor may do with an operator."""
    on_host = name == "grouped_matmul"  # reads a tensor there
    found = ("pt2_compliant_tag", "cudagraph_unsafe") if on_host else ("pt2_compliant_tag",)
    return tuple(getattr(torch.Tag, tag) for tag in found if hasattr(torch.Tag, tag))


def _define() -> dict[str, Any]:
    made = {"attention": attention_op.OPERATOR}
    for name, schema in _SCHEMAS.items():
        _library.define(schema, tags=_tags(name))
        _library.impl(f"bi_{name}", calls[name], "CompositeExplicitAutograd")
        fake = _FAKES.get(name, _fake_row)
        torch.library.register_fake(f"fxpass::bi_{name}", fake, lib=_library)
        made[name] = getattr(torch.ops.fxpass, f"bi_{name}").default
    return made


PACKETS = _define()
"""Name in `dispatch` -> the operator."""


# ---- `dispatch` as operators --------------------------------------------------------------------


def _op_matmul(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
    tf32: bool = False,
) -> Any:
    return PACKETS["matmul"](a, b, bias, alpha, beta, out_dtype, tf32)


def _op_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Any:
    return PACKETS["attention"](q, k, v, mask, causal, scale)


def _op_norm(x: Tensor, p: float, *, dtype: torch.dtype) -> Any:
    return PACKETS["row_norm"](x, p, dtype)


def _op_softmax(x: Tensor, *, dtype: torch.dtype, log: bool) -> Any:
    return PACKETS["row_softmax"](x, dtype, log)


def _op_var_mean(x: Tensor, correction: float, *, dtype: torch.dtype) -> Any:
    return PACKETS["row_var_mean"](x, correction, dtype)


def _op_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
    return PACKETS["row_layer_norm"](x, weight, bias, eps)


def _op_row(name: str) -> Callable[..., Any]:
    packet = PACKETS[name]
    return lambda x, *, dtype: packet(x, dtype)


OPERATORS = SimpleNamespace(
    matmul=_op_matmul,
    grouped_matmul=PACKETS["grouped_matmul"],
    convolution=PACKETS["convolution"],
    solve_lower=PACKETS["solve_lower"],
    attention=_op_attention,
    row_norm=_op_norm,
    row_softmax=_op_softmax,
    row_var_mean=_op_var_mean,
    row_layer_norm=_op_layer_norm,
    **{name: _op_row(name) for name in ("row_sum", "row_mean", "row_logsumexp", "row_cumsum")},
)
