"""How Inductor lowers our operators: to a kernel it launches itself, to its own code, or to a call.

Only the first two run without Python, which CUDA graphs like and AOTInductor's packages need.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxpass import fused, ops
from fxpass import torch_inductor as inductor
from fxpass.kernels import Kernel, gpu_call, gpu_rows, kernels
from fxpass.kernels.contract import Inline
from fxpass.kernels.inductor import KERNEL as FUSED
from fxpass.select import inlines
from fxpass.spec import NormSpec
from fxpass.torch_inductor import Size, Value

TRUSTED = ("cpu", "cuda", "triton")
"""Providers whose outputs' strides are tested here and need no check at run time."""


@functools.cache
def register() -> None:
    """Tell Inductor about our operators."""
    for count in (1, 2, 3):
        op = ops.op_for(("out", "sum", "row")[:count])
        inductor.lower_with(op, ops.calls, lower, lambda name: name.partition(".")[0] in TRUSTED)


def lower(
    x: Value,
    residual: Value | None,
    weight: Value | None,
    bias: Value | None,
    eps_tensor: Value | None,
    eps: float,
    kernel: str,
    spec: str,
) -> Any:
    """The outputs as Inductor's values, or None if the kernel is to be called from Python."""
    found = next((known for known in kernels() if known.name == kernel), None)
    hidden = inductor.size_of(x)[-1]
    if found is None or eps_tensor is not None or not isinstance(hidden, int):
        return None
    if not inlines(found, inductor.device_of(x).type):
        return None
    if found is not FUSED and _too_many(inductor.size_of(x)):
        return None  # the call says so
    meaning = ops.parsed(spec)
    if found is FUSED:
        made = fused.lower(meaning, hidden, x, residual, weight, bias, eps)
    else:
        tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
        made = _launched(found, meaning, hidden, tensors, eps)
    outputs = [made[name] for name in meaning.outputs]
    return outputs[0] if len(outputs) == 1 else outputs


def _too_many(size: Sequence[Size]) -> bool:
    """Whether x has more rows than one launch, which counts them in 32 bits."""
    rows = math.prod(size[:-1])
    return isinstance(rows, int) and rows > gpu_call.ROWS_MOST


def _launched(
    kernel: Kernel, spec: NormSpec, hidden: int, given: Mapping[str, Value | None], eps: float
) -> dict[str, Value]:
    """Launch the kernel on new tensors; these by name."""
    inputs, rows = _addressed({name: v for name, v in given.items() if v is not None})
    x = inputs["x"]
    size, device = inductor.size_of(x), inductor.device_of(x)
    shapes: dict[str, tuple[tuple[Size, ...], torch.dtype]] = {
        "out": (size, spec.out),
        "sum": (size, spec.normed),
        "row": ((*size[:-1], 1), spec.row_dtype),
    }
    outputs = {name: inductor.empty(*shapes[name], device) for name in spec.outputs}
    assert kernel.inline is not None
    inline = kernel.inline(spec, hidden, rows.count if isinstance(rows.count, int) else None)
    sizes = {name: inductor.size_of(value) for name, value in inputs.items()}
    given = {**inputs, **outputs, **scalars(rows, hidden, sizes)}
    launch = arguments(inline, rows.count, given, eps)
    inductor.launch_triton(
        inline.kernel, inline.num_warps, launch.programs, launch.given, launch.constants
    )
    return outputs


def _addressed(given: Mapping[str, Value]) -> tuple[dict[str, Value], gpu_rows.Rows]:
    """The inputs in memory, and how their rows are addressed; copies only what cannot be."""
    inputs = {
        name: inductor.in_memory(value) if name in _ROWS else inductor.contiguous(value)
        for name, value in given.items()
    }
    rows = _rows(inputs)
    for name in reversed(_ROWS):  # a residual without gaps merges wherever x does
        if rows is None and name in inputs:
            inputs[name] = inductor.contiguous(inputs[name])
            rows = _rows(inputs)
    assert rows is not None, "contiguous rows have one stride"
    return inputs, rows


_ROWS = ("x", "residual")


def _rows(inputs: Mapping[str, Value]) -> gpu_rows.Rows | None:
    strides = [inductor.stride_of(inputs[name]) for name in _ROWS if name in inputs]
    return gpu_rows.address(inductor.size_of(inputs["x"]), strides, inductor.known_equal)


def scalars(
    rows: gpu_rows.Rows, hidden: int, sizes: Mapping[str, Sequence[Size]]
) -> dict[str, Size]:
    """The sizes a kernel may ask for, by parameter name; `sizes` are those of its tensors."""
    found = {"rows": rows.count, "inner": rows.inner}
    for name, outer, step in zip(_ROWS, rows.outer, rows.step, strict=False):
        found |= {f"{name}_outer": outer, f"{name}_step": step}
    for name in ("weight", "bias"):
        if name in sizes:
            found[f"{name}_rows"] = math.prod(sizes[name]) // hidden
    return {name: inductor.plain(size) for name, size in found.items()}


@dataclass(frozen=True)
class Launch:
    """What a Triton kernel is launched with."""

    programs: Size
    given: dict[str, Any]
    constants: dict[str, Any]


def arguments(inline: Inline, rows: Size, given: Mapping[str, Any], eps: float) -> Launch:
    """The arguments that the kernel's parameters name, in their order."""
    return Launch(
        programs=inductor.ceil_div(rows, inline.rows_per_program),
        given={name: given[name] for name in inline.parameters if name != "eps"},
        constants={"eps": eps} if "eps" in inline.parameters else {},
    )
