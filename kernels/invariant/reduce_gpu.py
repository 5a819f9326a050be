"""Reductions over the last dim on a GPU; the bits of a row depend on that row alone.

Sums follow the tree of `gpu_rows`, whatever the number of rows, strides and alignment, so
`row_mean(x.float().pow(2))` has the bits of the norm in `triton.row` and `cuda.row`. Everything is
computed in float32, in float64 if x or `dtype` is, and rounded once to `dtype`. x is not rounded to
`dtype` first; where ATen means that, the caller casts.

Accuracy besides the sums': softmax and log_softmax use an exp of 2 ulp and a log of 1 ulp, softmax
multiplies by a rounded inverse (one more rounding); norms other than 0, 1, 2 and infinities take
their powers through float64.

Every function raises TypeError for a dtype that is not bfloat16, float16, float32 or float64.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fxpass.kernels import gpu_rows
from fxpass.kernels.cuda_launch import empty_strided, on_device
from fxpass.kernels.gpu_call import addressed, keep
from fxpass.kernels.triton_launch import ALIGNED, Launch

Tensor = torch.Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_WIDEST = torch.float64
_OF_A_WARP = 512
"""Elements of a row (or of several short rows) for one warp: 16 for each thread."""
_FEW_ROWS = 264
"""Twice the multiprocessors of an H200: below that a long row is spread over more threads."""
_EXCHANGED = 5
"""Levels of the tree that are left when several warps exchange their sums of units."""


class _Plan(NamedTuple):
    """What follows from the shapes, strides, dtypes and alignment of x and of what goes with it."""

    launch: Launch | None
    """None if there are no elements."""
    device: int
    copies: bool
    """Whether x has to be made contiguous."""
    outputs: list[tuple[Any, ...]]
    """Arguments of `empty_strided`, without the device."""
    order: tuple[int, ...]
    """Which of x, the outputs and what goes with x each of the kernel's pointers is."""
    dtype: torch.dtype | None
    """What the outputs are rounded to, if they are not of it."""


_plans: dict[Any, _Plan] = {}


def row_sum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...); 0 for R = 0."""
    return _summed(x, dtype, 1.0)


def row_mean(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...): the sum times the float32 inverse of R, as eager; NaN for R = 0."""
    return _summed(x, dtype, 1.0 / x.shape[-1] if x.shape[-1] else math.nan)


def row_norm(x: Tensor, p: float, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...). p: 0, 1, 2, an infinity, or another float.

    Raises RuntimeError for R = 0 where p is negative or infinite: there is no value to start from.
    """
    if x.shape[-1] == 0 and (p < 0 or math.isinf(p)):
        raise RuntimeError(f"a norm of order {p} needs at least one element, R is 0")
    if math.isinf(p):
        meta = {"SIGN": 1 if p > 0 else -1}
        return _one("row_extreme", x, dtype, (), lambda: meta, p)
    kind = {0.0: "nonzero", 1.0: "abs", 2.0: "square"}.get(float(p), "power")
    if kind in ("nonzero", "abs"):
        return _summed(x, dtype, 1.0, kind)
    return _summed(x, dtype, 1.0 / p, kind, p)


def row_logsumexp(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> (...); -inf for R = 0, and infinities as in torch."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -math.inf, dtype=dtype)
    return _one("row_softmax", x, dtype, (), lambda: _softmax_of(x, "logsumexp"))


def row_softmax(x: Tensor, *, dtype: torch.dtype, log: bool) -> Tensor:
    """(..., R) -> contiguous (..., R)."""

    def plan(aligned: bool) -> _Plan:
        meta = _softmax_of(x, "log_softmax" if log else "softmax")
        return _plan("row_softmax", x, [tuple(x.shape)], [dtype], (), meta, aligned)

    return _run(("softmax", dtype, log), x, (), plan)[0]


def row_var_mean(x: Tensor, correction: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., R) -> two of (...): the mean, then the squared distances' sum / max(0, R - correction).

    NaN for R = 0.
    """
    size = x.shape[-1]
    if size == 0:
        _is_wide(x, dtype)
        empty = x.new_full(x.shape[:-1], math.nan, dtype=dtype)
        return empty, empty.clone()

    def plan(aligned: bool) -> _Plan:
        rows = tuple(x.shape[:-1])
        numbers = (_bits(max(0.0, size - correction)), 0)
        meta = _moments_of(x, NORM=False, WEIGHT=False, BIAS=False)
        # The kernel's pointers: x, out, mean, second moment, weight, bias; not all are read.
        order = (0, 2, 2, 1, 2, 2)
        return _plan("row_moments", x, [rows] * 2, [dtype] * 2, numbers, meta, aligned, order)

    var, mean = _run(("var_mean", dtype, correction), x, (), plan)
    return var, mean


def row_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(..., R), weight and bias (R,) or None -> out (..., R) in x's dtype, mean and rstd (...).

    mean and rstd have x.shape[:-1] and are float32, float64 if x is.

    Raises:
        ValueError: weight or bias has another shape or device.
    """
    size = x.shape[-1]
    for name, shared in (("weight", weight), ("bias", bias)):
        if shared is not None and (shared.shape != (size,) or shared.device != x.device):
            raise ValueError(
                f"{name} is {tuple(shared.shape)} on {shared.device}, needs ({size},) on {x.device}"
            )
    if size == 0:
        single = _WIDEST if _is_wide(x, x.dtype) else torch.float32
        mean = x.new_zeros(x.shape[:-1], dtype=single)
        return torch.empty_like(x), mean, torch.full_like(mean, math.nan)

    def plan(aligned: bool) -> _Plan:
        single = _WIDEST if _is_wide(x, x.dtype) else torch.float32
        full, rows = tuple(x.shape), tuple(x.shape[:-1])
        meta = _moments_of(x, NORM=True, WEIGHT=weight is not None, BIAS=bias is not None)
        places = [4, 4 if weight is None else 5]
        found = [1 if t is None else p for t, p in zip((weight, bias), places, strict=True)]
        return _plan(
            "row_moments", x, [full, rows, rows], [x.dtype, single, single], (0, _bits(eps)),
            meta, aligned, (0, 1, 2, 3, *found),
        )  # fmt: skip

    factors = tuple(t.contiguous() for t in (weight, bias) if t is not None)
    key = ("layer_norm", eps, *(None if t is None else t.dtype for t in (weight, bias)))
    out, mean, rstd = _run(key, x, factors, plan)
    return out, mean, rstd


def row_cumsum(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    """(..., R) -> contiguous (..., R): element i depends on elements 0 to i alone."""

    def plan(aligned: bool) -> _Plan:
        from fxpass.kernels.invariant import scan_triton

        lanes = min(scan_triton.BLOCK, 1 << max(0, x.shape[-1] - 1).bit_length())
        together, warps = max(1, _OF_A_WARP // lanes), max(1, lanes // _OF_A_WARP)
        constants = {"ROWS": together, "LEVELS": lanes.bit_length() - 1}
        return _plan_of(
            scan_triton.row_cumsum, x, [tuple(x.shape)], [dtype], (), constants, warps, aligned
        )

    return _run(("cumsum", dtype), x, (), plan)[0]


# ---- Plans ---------------------------------------------------------------------------------------


def _run(
    key: tuple[Any, ...], x: Tensor, shared: Sequence[Tensor], make: Callable[[bool], _Plan]
) -> list[Tensor]:
    """The outputs of a plan. key: what the plan follows from besides x; shared: of aligned rows."""
    at = x.data_ptr()
    for tensor in shared:
        at |= tensor.data_ptr()
    aligned = at % ALIGNED == 0
    whole = (*key, aligned, x.get_device(), x.dtype, x.shape, x.stride())
    plan = _plans.get(whole)
    if plan is None:
        plan = keep(_plans, whole, make(aligned))
    device = plan.device
    with on_device(device):
        made = [empty_strided(device, *output) for output in plan.outputs]
        if plan.launch is not None:
            given = (x.contiguous() if plan.copies else x, *made, *shared)
            plan.launch(device, [given[place] for place in plan.order])
    return made if plan.dtype is None else [tensor.to(plan.dtype) for tensor in made]


def _summed(
    x: Tensor, dtype: torch.dtype, factor: float, kind: str = "", power: float = 1.0
) -> Tensor:
    if x.shape[-1] == 0:  # no program would write it
        return x.new_full(x.shape[:-1], 0.0 * factor, dtype=dtype)
    root = kind in ("square", "power")

    def meta() -> dict[str, Any]:
        return {"KIND": kind, "ROOT": root, **_tree(x)}

    return _one("row_sum", x, dtype, (factor, power), meta, kind)


def _one(
    name: str,
    x: Tensor,
    dtype: torch.dtype,
    numbers: tuple[float, ...],
    meta: Callable[[], dict[str, Any]],
    *key: Any,
) -> Tensor:
    """A kernel that writes one value a row. key: what `meta` follows from besides x."""

    def plan(aligned: bool) -> _Plan:
        bits = tuple(_bits(number) for number in numbers)
        return _plan(name, x, [tuple(x.shape[:-1])], [dtype], bits, meta(), aligned)

    return _run((name, dtype, *numbers, *key), x, (), plan)[0]


def _plan(
    name: str,
    x: Tensor,
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    numbers: tuple[int, ...],
    meta: dict[str, Any],
    aligned: bool,
    order: tuple[int, ...] = (0, 1),
) -> _Plan:
    """Of a kernel of `reduce_triton` on every row of x."""
    from fxpass.kernels.invariant import reduce_triton

    together, warps = schedule(x.shape[-1], math.prod(x.shape[:-1]))
    if together > 1 or warps == 1:
        meta = _without_exchange(meta)
    constants = {"ROWS": together, "LANES": gpu_rows.lanes(x.shape[-1]), **meta}
    kernel = getattr(reduce_triton, name)
    return _plan_of(kernel, x, shapes, dtypes, numbers, constants, warps, aligned, order)


def _plan_of(
    kernel: Any,
    x: Tensor,
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    numbers: tuple[int, ...],
    constants: dict[str, Any],
    warps: int,
    aligned: bool,
    order: tuple[int, ...] = (0, 1),
) -> _Plan:
    """Of any kernel whose first numbers are those of the way to the rows."""
    from fxpass.kernels.invariant.triton_math import FIXED

    wide = any([_is_wide(x, dtype) for dtype in dtypes])
    written = [_WIDEST if wide else dtype for dtype in dtypes]
    outputs = [
        (shape, gpu_rows.dense(shape), dtype) for shape, dtype in zip(shapes, written, strict=True)
    ]
    rounded = None if written == dtypes else dtypes[0]
    device = x.get_device()
    if not x.numel():
        return _Plan(None, device, False, outputs, order, rounded)
    rows, copies = addressed(x, None)
    launch = Launch(
        kernel,
        (-(-rows.count // constants["ROWS"]),),
        (rows.count, x.shape[-1], rows.inner, rows.outer[0], rows.step[0], *numbers),
        {**constants, "WIDE": wide},
        {"num_warps": warps, **FIXED},
        aligned=aligned,
    )
    return _Plan(launch, device, copies, outputs, order, rounded)


def schedule(size: int, rows: int) -> tuple[int, int]:
    """(rows per program, warps). Changes no bit."""
    lanes = gpu_rows.lanes(size)
    together = max(1, _OF_A_WARP // lanes)
    warps = min(8, max(1, lanes // _OF_A_WARP))
    return together, warps * 2 if rows <= _FEW_ROWS and lanes >= 2 * _OF_A_WARP else warps


def _softmax_of(x: Tensor, kind: str) -> dict[str, Any]:
    return {"KIND": kind, **_tree(x), **_kept(x)}


def _moments_of(x: Tensor, **flags: bool) -> dict[str, Any]:
    return {**flags, **_tree(x), **_kept(x)}


def _tree(x: Tensor) -> dict[str, int]:
    """How many levels the tree over a row's units has before and after the warps' exchange."""
    levels = (gpu_rows.lanes(x.shape[-1]) // gpu_rows.VECTOR).bit_length() - 1
    last = _EXCHANGED if levels > _EXCHANGED else 0
    return {"LEVELS": levels - last, "LAST": last}


def _without_exchange(meta: dict[str, Any]) -> dict[str, Any]:
    if "LAST" not in meta:
        return meta
    return {**meta, "LEVELS": meta["LEVELS"] + meta["LAST"], "LAST": 0}


def _kept(x: Tensor) -> dict[str, bool]:
    return {"KEPT": x.shape[-1] <= gpu_rows.MOST_LANES}


def _is_wide(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether to compute in float64."""
    for given in (x.dtype, dtype):
        if given not in _FLOATS:
            raise TypeError(f"a reduction of {x.dtype} to {dtype}; needs floating-point dtypes")
    return _WIDEST in (x.dtype, dtype)


def _bits(value: float) -> int:
    """A float64 as the integer that `triton_math.float_of` reads."""
    (bits,) = struct.unpack("q", struct.pack("d", value))
    return int(bits)
