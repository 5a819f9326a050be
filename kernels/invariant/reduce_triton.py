# ruff: noqa: N803, SIM108 - constants are uppercase, constant conditions stand alone
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,misc,import-untyped"
"""Triton kernels over the last dim of a tensor, whose bits depend on the row alone.

A program takes ROWS rows; a row is cut into chunks of LANES elements, the tree of `gpu_rows`:

    a chunk is added by pairs, three levels, to units of 8; unit u adds what it has in each chunk,
    in order of the chunks, starting from +0; then the units are added by pairs (`triton_math`)

LANES is a function of the row's length, so ROWS and the number of warps may follow the number of
rows. A row of one chunk is KEPT in registers, a longer one read again for each pass. Arguments:
row r of x starts at (r // inner) * x_outer + (r % inner) * x_step; outputs are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fxpass.kernels.invariant.triton_math import (
    exp_nonpositive,
    float_of,
    inverse,
    largest,
    log_positive,
    pairs,
    root,
    total,
)

_UNIT = tl.constexpr(3)
"""Levels of a unit of 8 elements."""
_ANY = {"do_not_specialize": ["rows", "factor", "power", "eps"]}
"""Arguments whose values need no kernel of their own."""


@triton.jit
def _rows(ROWS: tl.constexpr):
    """The rows of this program: a scalar if it is one, else (ROWS, 1)."""
    if ROWS == 1:
        return tl.program_id(0)
    else:
        return tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def _there(r, rows, place, size, ROWS: tl.constexpr):
    """Which elements exist; a program of one row has no other."""
    found = place < size
    if ROWS > 1:
        found = found & (r < rows)
    return found


@triton.jit
def _start(r, inner, outer, step):
    return (r // inner).to(tl.int64) * outer + (r % inner).to(tl.int64) * step


@triton.jit
def _element(v, KIND: tl.constexpr, power):
    """What is added for one element. Powers go through float64."""
    if KIND == "abs":
        return tl.abs(v)
    elif KIND == "square":
        return v * v
    elif KIND == "nonzero":
        return (v != 0).to(v.dtype)
    elif KIND == "power":
        return tl.exp(tl.log(tl.abs(v).to(tl.float64)) * float_of(power)).to(v.dtype)
    else:
        return v


@triton.jit(**_ANY)
def row_sum(
    x, out, rows, size, inner, x_outer, x_step, factor, power,
    ROWS: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr, LAST: tl.constexpr,
    KIND: tl.constexpr, ROOT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The sum times `factor`, or a root of it: sqrt for squares, 1 / power for powers."""
    dtype = tl.float64 if WIDE else tl.float32
    r = _rows(ROWS)
    lane = tl.arange(0, LANES)[None, :]
    x += _start(r, inner, x_outer, x_step)
    units = tl.zeros([ROWS, LANES // 8], dtype)
    for start in range(0, size, LANES):
        there = _there(r, rows, start + lane, size, ROWS)
        v = _element(tl.load(x + start + lane, mask=there, other=0.0).to(dtype), KIND, power)
        if KIND == "power":
            v = tl.where(there, v, 0.0)
        units += pairs(v, _UNIT)
    found = total(units, LEVELS, LAST)
    if ROOT:
        if KIND == "power":
            found = tl.exp(tl.log(found.to(tl.float64)) * float_of(factor)).to(dtype)
        else:
            found = root(found)
    else:
        found = found * float_of(factor).to(dtype)
    tl.store(out + r, found.to(out.dtype.element_ty), mask=r < rows)


@triton.jit(**_ANY)
def row_extreme(
    x, out, rows, size, inner, x_outer, x_step,
    ROWS: tl.constexpr, LANES: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The largest (SIGN 1) or smallest (-1) absolute value; NaN if there is one."""
    dtype = tl.float64 if WIDE else tl.float32
    r = _rows(ROWS)
    lane = tl.arange(0, LANES)[None, :]
    x += _start(r, inner, x_outer, x_step)
    found = tl.full([ROWS, LANES], float("-inf"), dtype)
    bad = tl.zeros([ROWS, LANES], tl.int32)
    for start in range(0, size, LANES):
        there = _there(r, rows, start + lane, size, ROWS)
        v = tl.abs(tl.load(x + start + lane, mask=there, other=0.0).to(dtype)) * SIGN
        v = tl.where(there, v, float("-inf"))
        bad += (v != v).to(tl.int32)
        found = tl.where(v > found, v, found)
    top = tl.where(largest(bad) > 0, float("nan"), largest(found) * SIGN)
    tl.store(out + r, top.to(out.dtype.element_ty), mask=r < rows)


@triton.jit
def _shifted_exp(v, top, there):
    """exp(v - top), at most 1; 0 where there is no element."""
    away = v - top
    return tl.where(there, exp_nonpositive(tl.where(away > 0.0, 0.0, away)), 0.0)


@triton.jit
def _normalised(v, top, there, scale, KIND: tl.constexpr):
    if KIND == "softmax":
        return _shifted_exp(v, top, there) * scale
    else:
        return (v - top) - scale


@triton.jit(**_ANY)
def row_softmax(
    x, out, rows, size, inner, x_outer, x_step,
    ROWS: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr, LAST: tl.constexpr,
    KIND: tl.constexpr, KEPT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """KIND softmax, log_softmax, or logsumexp, whose output is one value a row."""
    dtype = tl.float64 if WIDE else tl.float32
    low = float("-inf")
    r = _rows(ROWS)
    lane = tl.arange(0, LANES)[None, :]
    x += _start(r, inner, x_outer, x_step)
    there = _there(r, rows, lane, size, ROWS)
    v = tl.load(x + lane, mask=there, other=low).to(dtype)
    if KEPT:
        top = largest(v)
    else:
        most = v
        for start in range(LANES, size, LANES):
            inside = _there(r, rows, start + lane, size, ROWS)
            v = tl.load(x + start + lane, mask=inside, other=low).to(dtype)
            most = tl.where(v > most, v, most)
        top = largest(most)
    if KIND == "logsumexp":
        shift = tl.where(tl.abs(top) == float("inf"), 0.0, top)
    else:
        shift = top
    if KEPT:
        units = 0.0 + pairs(_shifted_exp(v, shift, there), _UNIT)
    else:
        units = tl.zeros([ROWS, LANES // 8], dtype)
        for start in range(0, size, LANES):
            inside = _there(r, rows, start + lane, size, ROWS)
            v = tl.load(x + start + lane, mask=inside, other=low).to(dtype)
            units += pairs(_shifted_exp(v, shift, inside), _UNIT)
    found = total(units, LEVELS, LAST)
    if KIND == "logsumexp":
        # An infinite top is the answer, unless there is a NaN.
        found = tl.where(shift == top, log_positive(found) + shift, top + found)
        tl.store(out + r, found.to(out.dtype.element_ty), mask=r < rows)
    else:
        if KIND == "softmax":
            scale = inverse(found)
        else:
            scale = log_positive(found)
        out += r.to(tl.int64) * size
        if KEPT:
            y = _normalised(v, top, there, scale, KIND)
            tl.store(out + lane, y.to(out.dtype.element_ty), mask=there)
        else:
            for start in range(0, size, LANES):
                inside = _there(r, rows, start + lane, size, ROWS)
                v = tl.load(x + start + lane, mask=inside, other=low).to(dtype)
                y = _normalised(v, top, inside, scale, KIND)
                tl.store(out + start + lane, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _away(v, mean, there):
    """Distance from the mean; 0 where there is no element."""
    return tl.where(there, v - mean, 0.0)


@triton.jit
def _scaled(y, weight, bias, place, there, WEIGHT: tl.constexpr, BIAS: tl.constexpr):
    """A tile of layer_norm's output: times the weight, plus the bias."""
    if WEIGHT:
        y *= tl.load(weight + place, mask=there, other=0.0).to(y.dtype)
    if BIAS:
        y += tl.load(bias + place, mask=there, other=0.0).to(y.dtype)
    return y


@triton.jit(**_ANY)
def row_moments(
    x, out, first, second, weight, bias, rows, size, inner, x_outer, x_step, factor, eps,
    ROWS: tl.constexpr, LANES: tl.constexpr, LEVELS: tl.constexpr, LAST: tl.constexpr,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    KEPT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean to `first`, and to `second` the squares' sum / factor, or for NORM 1 / sqrt(var + eps).

    `out` is written for NORM only: (x - mean) * rstd * weight + bias.
    """
    dtype = tl.float64 if WIDE else tl.float32
    r = _rows(ROWS)
    lane = tl.arange(0, LANES)[None, :]
    x += _start(r, inner, x_outer, x_step)
    there = _there(r, rows, lane, size, ROWS)
    v = tl.load(x + lane, mask=there, other=0.0).to(dtype)
    units = 0.0 + pairs(v, _UNIT)
    for start in range(LANES, LANES if KEPT else size, LANES):
        inside = _there(r, rows, start + lane, size, ROWS)
        units += pairs(tl.load(x + start + lane, mask=inside, other=0.0).to(dtype), _UNIT)
    share = inverse(tl.cast(size, dtype))
    mean = total(units, LEVELS, LAST) * share
    away = _away(v, mean, there)
    units = pairs(away * away, _UNIT)
    for start in range(LANES, LANES if KEPT else size, LANES):
        inside = _there(r, rows, start + lane, size, ROWS)
        far = _away(tl.load(x + start + lane, mask=inside, other=0.0).to(dtype), mean, inside)
        units += pairs(far * far, _UNIT)
    spread = total(units, LEVELS, LAST)
    if NORM:
        spread = inverse(root(spread * share + float_of(eps).to(dtype)))
        out += r.to(tl.int64) * size
        if KEPT:
            y = _scaled(away * spread, weight, bias, lane, there, WEIGHT, BIAS)
            tl.store(out + lane, y.to(out.dtype.element_ty), mask=there)
        else:
            for start in range(0, size, LANES):
                place = start + lane
                inside = _there(r, rows, place, size, ROWS)
                v = tl.load(x + place, mask=inside, other=0.0).to(dtype)
                y = _away(v, mean, inside) * spread
                y = _scaled(y, weight, bias, place, inside, WEIGHT, BIAS)
                tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
    else:
        spread = (
            spread / float_of(factor) if WIDE else tl.div_rn(spread, float_of(factor).to(dtype))
        )
    tl.store(first + r, mean.to(first.dtype.element_ty), mask=r < rows)
    tl.store(second + r, spread.to(second.dtype.element_ty), mask=r < rows)
