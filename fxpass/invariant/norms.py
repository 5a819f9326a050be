"""Layer norm, RMS norm and group norm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxpass import torch_dispatcher
from fxpass.dtypes import is_exact_cast, wide
from fxpass.invariant.aten import NARROW, is_empty
from fxpass.kernels import Kernel, kernels
from fxpass.kernels.cuda_launch import on_device
from fxpass.kernels.invariant import dispatch
from fxpass.spec import NormSpec, Step

Tensor = torch.Tensor
_Launch = Callable[..., Any]
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Types without operators of their own."""
RMS_ROW = tuple(Step(op, torch.float32) for op in ("mean", "add_eps", "rsqrt"))
"""From a row's squares to its factor, as torch, Llama and Gemma compute it."""


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    """aten::native_layer_norm: (out, mean, rstd)."""
    count = len(normalized_shape)
    if not _normalises(input, normalized_shape, weight, bias) or _are_mixed(input, weight, bias):
        return NotImplemented
    scale, shift = (None if t is None else t.reshape(-1) for t in (weight, bias))
    made, mean, rstd = dispatch.row_layer_norm(_rows(input, count), scale, shift, eps)
    shape = (*input.shape[: input.dim() - count], *[1] * count)
    dtype = statistics_dtype(input, weight, bias)
    return made.reshape(input.shape), mean.to(dtype).view(shape), rstd.to(dtype).view(shape)


def _are_mixed(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch's CPU kernel refuses these dtypes: float32 beside 16 bits is all it mixes."""
    dtypes = {t.dtype for t in (weight, bias) if t is not None}
    allowed = [{input.dtype}, {torch.float32}] if input.dtype in NARROW else [{input.dtype}]
    return input.device.type == "cpu" and bool(dtypes) and dtypes not in allowed


def statistics_dtype(
    input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
) -> torch.dtype:
    """Dtype of the mean and rstd that torch returns, which its backward kernel expects.

    On the CPU it is the input's, unless the weight or bias are wider.
    """
    if input.dtype not in NARROW:
        return input.dtype
    mixed = any(t is not None and t.dtype != input.dtype for t in (weight, bias))
    return input.dtype if input.device.type == "cpu" and not mixed else torch.float32


def fused_rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> Any:
    """aten::_fused_rms_norm: (out, rstd)."""
    return _rms_norm(input, normalized_shape, weight, eps, ("out", "row"))


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    """torch.rms_norm of tensors that nobody differentiates or traces; else NotImplemented.

    torch's own is then made of operators that have invariant kernels, with the same result.
    """
    tensors = [t for t in (input, weight) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return NotImplemented
    if torch_dispatcher.is_traced() or any(type(t) not in PLAIN or t.is_neg() for t in tensors):
        return NotImplemented
    return _rms_norm(input, normalized_shape, weight, eps, ("out",))


def _rms_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    eps: float | None,
    outputs: tuple[str, ...],
) -> Any:
    if x.dtype == torch.float64 or not _normalises(x, shape, weight, None):
        return NotImplemented
    spec = rms_spec(x.dtype, None if weight is None else weight.dtype, outputs)
    launch = None if spec is None else _launch(spec, x.device, math.prod(shape))
    if launch is None:
        return NotImplemented
    rows = _rows(x, len(shape))
    flat = None if weight is None else weight.reshape(-1)
    # torch takes the epsilon of the type it computes in: float32 also for 16-bit inputs.
    made = launch(rows, None, flat, None, torch.finfo(torch.float32).eps if eps is None else eps)
    out = (made[0] if len(outputs) > 1 else made).reshape(x.shape)
    if x.device.type == "cpu":
        out = out.contiguous(memory_format=torch_dispatcher.suggested_format(x))
    if len(outputs) == 1:
        return out
    return out, made[1].reshape(*x.shape[: x.dim() - len(shape)], *[1] * len(shape))


@functools.cache
def rms_spec(
    x: torch.dtype, weight: torch.dtype | None, outputs: tuple[str, ...]
) -> NormSpec | None:
    """What torch.rms_norm means: all in float32, rounded once. None where it does not."""
    f32 = torch.float32
    if weight is not None and torch.promote_types(x, weight) != x:
        return None
    element = [Step("mul_row", f32)]
    element += [] if weight is None else [Step("mul_weight", f32)]
    element += [] if is_exact_cast(f32, x) else [Step("cast", x)]
    return NormSpec(x=x, row=RMS_ROW, element=tuple(element), weight=weight, outputs=outputs)


@functools.cache
def _launch(spec: NormSpec, device: torch.device, hidden: int) -> _Launch | None:
    """The callable of `invariant_kernel`."""
    kernel = invariant_kernel(spec, device, hidden)
    return None if kernel is None else kernel.entry(spec)


@functools.cache
def invariant_kernel(spec: NormSpec, device: torch.device, hidden: int) -> Kernel | None:
    """The first kernel whose contract says that rows are invariant, ready to launch."""
    platform = "cpu" if device.type == "cpu" else "rocm" if torch.version.hip else "cuda"
    for kernel in kernels():
        if not kernel.contract.batch_invariant or kernel.refusal(spec, platform, hidden):
            continue
        with on_device(-1 if device.index is None else device.index):
            if kernel.prepare(spec, hidden) is None:
                return kernel
    return None


def group_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    N: int,  # noqa: N803 - as ATen's schema
    C: int,  # noqa: N803
    HxW: int,  # noqa: N803
    group: int,
    eps: float,
) -> Any:
    """aten::native_group_norm: (out, mean, rstd); each sample's groups by themselves."""
    if is_empty(input) or not dispatch.takes(input) or C % group:
        return NotImplemented
    if any(t is not None and t.dtype != input.dtype for t in (weight, bias)):
        return NotImplemented
    single = wide(input.dtype)
    rows = input.reshape(N, group, -1)
    var, mean = dispatch.row_var_mean(rows, 0.0, dtype=single)
    rstd = (var + eps).rsqrt()
    made = ((rows.to(single) - mean[..., None]) * rstd[..., None]).view(N, C, -1)
    if weight is not None:
        made = made * weight.reshape(C, 1)
    if bias is not None:
        made = made + bias.reshape(C, 1)
    made = made.to(input.dtype).reshape(input.shape)
    if input.device.type == "cpu":
        made = made.contiguous(memory_format=torch_dispatcher.suggested_format(input))
    return made, mean.to(input.dtype), rstd.to(input.dtype)


def _normalises(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> bool:
    count = len(shape)
    if not 0 < count <= x.dim() or tuple(x.shape[x.dim() - count :]) != tuple(shape):
        return False
    fits = all(t is None or tuple(t.shape) == tuple(shape) for t in (weight, bias))
    return fits and not is_empty(x) and dispatch.takes(x)


def _rows(x: Tensor, count: int) -> Tensor:
    rows = x if count == 1 else x.flatten(x.dim() - count)
    return rows if rows.stride(-1) == 1 else rows.contiguous()
