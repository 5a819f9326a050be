"""The meaning of a spec in plain torch: the oracle of every test and the last fallback.

Runs the spec's steps with the operators the model itself would run, so on one device it gives
eager's bits (the row reduction included, because it is eager's own).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fxpass.dtypes import is_exact_cast
from fxpass.kernels.contract import Contract, Hidden, Kernel, Layout, Outputs
from fxpass.spec import Inverse, NormSpec, Rounding

CONTRACT = Contract(
    platforms=("any",),
    x=(torch.bfloat16, torch.float16, torch.float32),
    weight=("same", "other", "none"),
    hidden=Hidden(1),
    layout=Layout(rows="any"),
    rounding=tuple(Rounding),
    inverse=tuple(Inverse),
    programs="any",
    accumulate=torch.float32,
    residual=True,
    residual_rounded=True,
    weight_offset=True,
    weight_rows=True,
    bias=True,
    outputs=("out", "sum", "row"),
    mutates=(),
    deterministic=True,
    batch_invariant=False,  # eager's mean over float32 rows varies with the row count on a GPU
    reduction="eager torch.sum and torch.mean over the last dim",
)


def launch(
    spec: NormSpec,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Outputs:
    """Run the spec step by step. Shapes as in `contract.Launch`; differentiable."""
    total = x if residual is None else _cast(_widen(x, spec.sum) + _widen(residual, spec.sum), spec)
    # Widened once, as models do: the gradients of both uses then meet in float32.
    wide = _widen(total, torch.float32)
    row = row_value(spec, wide if spec.square == torch.float32 else total, eps)
    start = wide if spec.element[0].dtype == torch.float32 else total
    out = _element_value(spec, start, row, weight, bias)
    by_name = {"out": out, "sum": total, "row": row}
    return tuple(by_name[name].contiguous() for name in spec.outputs)


def row_value(spec: NormSpec, total: torch.Tensor, eps: float) -> torch.Tensor:
    """The scalar per row, shape (..., 1), after every row step."""
    value = torch.square(_widen(total, spec.square))
    for step in spec.row:
        row = _Row(eps, total.shape[-1], step.value)
        value = _ROW_STEPS[step.op](_widen(value, step.dtype), row).to(step.dtype)
    return value


def _element_value(
    spec: NormSpec,
    total: torch.Tensor,
    row: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    factor = None if weight is None else effective_weight(spec, weight, total.shape)
    value = total
    for step in spec.element:
        value = _widen(value, step.dtype) if step.op != "cast" else value.to(step.dtype)
        if step.op == "mul_row":
            value = value * row
        elif step.op == "div_row":
            value = value / row
        elif step.op == "mul_weight" and factor is not None:
            value = value * factor
        elif step.op == "add_bias" and bias is not None:
            value = value + _over_rows(bias, total.shape)
        value = value.to(step.dtype)
    return value


def effective_weight(spec: NormSpec, weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """(weight + offset) as the element program reads it, broadcast over `shape`."""
    factor = _over_rows(weight, shape)
    if spec.weight_offset_dtype is None:
        return factor
    return (_widen(factor, spec.weight_offset_dtype) + spec.weight_offset).to(
        spec.weight_offset_dtype
    )


def _over_rows(weight: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A weight of hidden elements as it is; one of several rows repeated over the rows of x."""
    if weight.numel() == shape[-1]:
        return weight.reshape(shape[-1])
    rows = weight.reshape(-1, shape[-1])
    repeats = shape[:-1].numel() // rows.shape[0]
    return rows.repeat(repeats, 1).reshape(shape)


def _widen(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Cast up to `dtype` if that is exact, so that an operator computes and rounds in it."""
    return value.to(dtype) if dtype is not None and is_exact_cast(value.dtype, dtype) else value


def _cast(value: torch.Tensor, spec: NormSpec) -> torch.Tensor:
    return value if spec.sum is None else value.to(spec.sum)


@dataclass(frozen=True)
class _Row:
    """What a row step may read besides the value so far."""

    eps: float
    hidden: int
    constant: float | None


def _reduce(value: torch.Tensor, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    # The squares keep their own dtype: a 16-bit input is added up in float32 either way.
    return reduce(value, -1, keepdim=True)


def _root(value: torch.Tensor) -> torch.Tensor:
    """The square root; its gradient at 0 is 0, as that of torch's vector norms, not infinite."""
    if not (torch.is_grad_enabled() and value.requires_grad):
        return value.sqrt()
    zero = value == 0
    return torch.where(zero, value, torch.where(zero, 1.0, value).sqrt())


_ROW_STEPS: dict[str, Callable[[torch.Tensor, _Row], torch.Tensor]] = {
    "mean": lambda v, row: _reduce(v, torch.mean),
    "sum": lambda v, row: _reduce(v, torch.sum),
    "div_n": lambda v, row: v / row.hidden,
    "mul_n": lambda v, row: v * (1.0 / row.hidden),
    "mul_const": lambda v, row: v * (1.0 if row.constant is None else row.constant),
    "add_eps": lambda v, row: v + row.eps,
    "clamp_eps": lambda v, row: v.clamp_min(row.eps),
    "sqrt": lambda v, row: _root(v),
    "square": lambda v, row: v.square(),
    "rsqrt": lambda v, row: v.rsqrt(),
    "reciprocal": lambda v, row: v.reciprocal(),
    "cast": lambda v, row: v,
}

KERNEL = Kernel("reference.eager", CONTRACT, launch)


def instead_of(kernel: str, spec: NormSpec, error: Exception) -> Callable[..., Any]:
    """`KERNEL.entry(spec)`, with a warning that `kernel` cannot run here."""
    warnings.warn(
        f"fxpass: {kernel} cannot run here ({error}); {spec} runs as reference.eager,"
        " with the same roundings",
        RuntimeWarning,
        stacklevel=3,
    )
    return KERNEL.entry(spec)
