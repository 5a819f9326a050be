"""The reductions of reduce_cpu.h where it cannot be built: elementwise torch, correct and slow.

Same order, same exp: the same bits. Also what tests compare reduce_cpu.h with.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from fxpass.dtypes import wide
from fxpass.kernels.invariant.mm_plain import one_nan

Tensor = torch.Tensor

_LANES, _BLOCK = 64, 4096


def run(
    what: str,
    x: Tensor,
    out: Tensor | None,
    first: Tensor | None,
    second: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    p: float,
    eps: float,
) -> None:
    """Does `what` of reduce_cpu to x (rows, R), writing out (rows, R), first and second (rows,)."""
    x = x.to(wide(x.dtype))
    if what in ("softmax", "log_softmax"):
        found: list[Tensor | None] = [_softmax(x, log=what == "log_softmax"), None, None]
    elif what == "cumsum":
        found = [_running(x), None, None]
    elif what == "layer_norm":
        found = list(_layer_norm(x, weight, bias, eps))
    elif what == "var_mean":
        mean = _mean(x)
        var = _deviations(x, mean) / max(x.shape[-1] - p, 0.0)
        found = [None, var, mean]
    else:
        found = [None, _reduced(what, x, p), None]
    for target, made in zip((out, first, second), found, strict=True):
        if target is not None and made is not None:
            one_nan(target.view(made.shape).copy_(made))


def summed(x: Tensor) -> Tensor:
    """(rows, R) -> (rows,) by the tree of cpu_row.h."""
    rows, size = x.shape
    total = x.new_zeros(rows, _LANES)
    for start in range(0, size, _BLOCK):
        lane = x.new_zeros(rows, _LANES)
        end = min(start + _BLOCK, size)
        for i in range(start, end, _LANES):
            part = x[:, i : min(i + _LANES, end)]
            lane[:, : part.shape[1]] += part
        total += lane
    half = _LANES
    while half > 1:
        half //= 2
        total = total[:, :half] + total[:, half : 2 * half]
    return total[:, 0]


def exponential(x: Tensor) -> Tensor:
    """exp, operation by operation as in cpu_exp.h."""
    hexes = _EXP64 if x.dtype == torch.float64 else _EXP32
    low, high, inverse, magic, ln2, rest, *series = (float.fromhex(h) for h in hexes.split())
    x = torch.where(x < low, low, x)
    x = torch.where(x > high, high, x)
    n = (x * inverse + magic) - magic
    r = (x - n * ln2) - n * rest
    p = torch.full_like(r, series[0])
    for factor in series[1:]:
        p = p * r + factor
    value = 1.0 + (r + r * r * p)
    half = (n / 2).floor()
    return value * _power_of_2(half) * _power_of_2(n - half)


_EXP32 = """
    -0x1.ap+6 0x1.64p+6 0x1.715476p+0 0x1.8p+23 0x1.62e4p-1 0x1.7f7d1cp-20 0x1.a01a02p-13
    0x1.6c16c2p-10 0x1.111112p-7 0x1.555556p-5 0x1.555556p-3 0x1p-1
"""
_EXP64 = " ".join(
    ["-0x1.75p+9 0x1.63p+9 0x1.71547652b82fep+0 0x1.8p+52 0x1.62e42feep-1 0x1.a39ef35793c76p-33"]
    + [(1.0 / math.factorial(k)).hex() for k in range(13, 1, -1)]
)


def _power_of_2(n: Tensor) -> Tensor:
    if n.dtype == torch.float64:
        return ((n.nan_to_num(0).to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((n.nan_to_num(0).to(torch.int32) + 127) << 23).view(torch.float32)


def _each(function: Callable[[float], float], x: Tensor) -> Tensor:
    """`function` of each element by itself: what a vector library gives may depend on the place."""
    return x.to(torch.float64, copy=True).apply_(function).to(x.dtype)


def _root(x: Tensor) -> Tensor:
    # torch.sqrt may be a library's, which is not always the nearest float.
    return _each(lambda v: math.sqrt(v) if v >= 0 else math.nan, x)


def logarithm(x: Tensor) -> Tensor:
    """The logarithm of each element by itself."""
    return _each(lambda v: math.log(v) if v > 0 else -math.inf if v == 0 else math.nan, x)


def _powers(x: Tensor, p: float) -> Tensor:
    return _each(lambda v: _power(v, p), x.abs())


def _power(v: float, p: float) -> float:
    try:
        return math.pow(v, p)
    except OverflowError:
        return math.inf
    except ValueError:  # 0 ** -p
        return math.inf


def _mean(x: Tensor) -> Tensor:
    return summed(x) / x.shape[-1] if x.shape[-1] else summed(x) / 0.0


def _deviations(x: Tensor, mean: Tensor) -> Tensor:
    off = x - mean[:, None]
    return summed(off * off)


def _reduced(what: str, x: Tensor, p: float) -> Tensor:
    if what == "logsumexp":
        return _logsumexp(x)
    if what == "mean":
        return _mean(x)
    if what in ("most", "least"):
        return x.abs().amax(-1) if what == "most" else x.abs().amin(-1)
    if what == "power":
        return _powers(summed(_powers(x, p)), 1.0 / p)
    terms = {"sum": x, "count": (x != 0).to(x.dtype), "absolute": x.abs(), "square": x * x}[what]
    return _root(summed(terms)) if what == "square" else summed(terms)


def _largest(x: Tensor) -> Tensor:
    """NaNs are passed over, as in cpu_exp.h."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:1], -math.inf)
    return torch.where(x.isnan(), -math.inf, x).amax(-1)


def _logsumexp(x: Tensor) -> Tensor:
    most = _largest(x)
    shift = torch.where(most.isinf(), 0.0, most)
    return logarithm(summed(exponential(x - shift[:, None]))) + shift


def _softmax(x: Tensor, log: bool) -> Tensor:
    off = x - _largest(x)[:, None]
    raised = exponential(off)
    total = summed(raised)
    return off - logarithm(total)[:, None] if log else raised / total[:, None]


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = _mean(x)
    var = _deviations(x, mean) / x.shape[-1] if x.shape[-1] else mean
    scale = 1.0 / _root(var + eps)
    out = (x - mean[:, None]) * scale[:, None]
    out = out if weight is None else out * weight
    return out if bias is None else out + bias, mean, scale


def _running(x: Tensor) -> Tensor:
    out, total = torch.empty_like(x), x.new_zeros(x.shape[0], dtype=torch.float64)
    for i in range(x.shape[1]):
        total += x[:, i]
        out[:, i] = total
    return out
