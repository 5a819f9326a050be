"""A callable for a built row kernel: the C++ glue where Python.h exists, else ctypes.

The glue costs half a microsecond a call and ctypes ten, so ctypes is only for a Python installed
without its headers. Both give the same bits: the kernel is the same.
"""

from __future__ import annotations

import ctypes
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fxpass.dtypes import short
from fxpass.kernels import cpu_build, cpu_source
from fxpass.spec import NormSpec

Call = Callable[
    [torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", "torch.Tensor | None", float],
    "torch.Tensor | tuple[torch.Tensor, ...]",
]
"""(x, residual, weight, bias, eps) -> out, or a tuple if the spec has several outputs."""

_PARALLEL = 32_768  # elements; as in cpu_glue.cpp
_glue_lock = threading.Lock()
_glue: list[Any] = []


class _Args(ctypes.Structure):
    """`FxArgs` of cpu_args.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "x residual weight bias out sum row".split()),
        *((name, ctypes.c_int64) for name in "rows hidden weight_rows bias_rows dims".split()),
        *((name, ctypes.c_int64 * 8) for name in "size x_stride residual_stride".split()),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int64),
    )


def has_glue() -> bool:
    """True if the C++ glue can be built here and torch offers DLPack's exchange API."""
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return header.exists() and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


def load_glue() -> Any:
    """The compiled glue module. Raises BuildError."""
    with _glue_lock:  # a Python extension must be imported once
        if not _glue:
            source = cpu_source.header("cpu_args.h") + "\n" + cpu_source.header("cpu_glue.cpp")
            _glue.append(cpu_build.load_module("fxpass_cpu_glue", source))
        return _glue[0]


def through_glue(spec: NormSpec, run: Any) -> Call:
    """The fast callable. Raises BuildError."""
    address = ctypes.cast(run, ctypes.c_void_p).value
    inputs = (spec.x, spec.residual, spec.weight, spec.bias)
    call: Call = load_glue().bind(
        address,
        torch.Tensor.__dlpack_c_exchange_api__,
        _allocator(),
        torch.get_num_threads,
        tuple("" if dtype is None else short(dtype) for dtype in inputs),
        _made(spec),
    )
    return call


def through_ctypes(spec: NormSpec, run: Any) -> Call:
    """The callable that needs nothing compiled but the kernel."""
    run.argtypes, run.restype = [ctypes.c_void_p], None
    dtypes = dict(zip(cpu_source.OUTPUTS, _made(spec), strict=True))

    def call(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        shapes = {"out": x.shape, "sum": x.shape, "row": (*x.shape[:-1], 1)}
        made = {
            name: torch.empty(shapes[name], dtype=dtype)
            for name, dtype in dtypes.items()
            if dtype is not None
        }
        held = [_flat(x), _flat(residual, x), _dense(weight), _dense(bias)]
        args = _arguments(x.shape[-1], *held)
        for name, tensor in made.items():
            setattr(args, name, tensor.data_ptr())
        args.eps = eps
        run(ctypes.byref(args))
        return made["out"] if len(made) == 1 else tuple(made.values())

    return call


def _arguments(
    hidden: int,
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> _Args:
    assert x is not None
    args = _Args(rows=x.shape[0], hidden=hidden, dims=1)
    args.threads = torch.get_num_threads() if x.shape[0] * hidden >= _PARALLEL else 1
    args.size[0], args.x, args.x_stride[0] = x.shape[0], x.data_ptr(), x.stride(0)
    if residual is not None:
        args.residual, args.residual_stride[0] = residual.data_ptr(), residual.stride(0)
    if weight is not None:
        args.weight, args.weight_rows = weight.data_ptr(), weight.numel() // hidden
    if bias is not None:
        args.bias, args.bias_rows = bias.data_ptr(), bias.numel() // hidden
    return args


def _flat(value: torch.Tensor | None, like: torch.Tensor | None = None) -> torch.Tensor | None:
    """`value` as rows x hidden with last stride 1; a view where the strides allow it."""
    if value is None:
        return None
    hidden = value.shape[-1]
    flat = value.detach().reshape(value.numel() // hidden, hidden)
    return flat if hidden == 1 or flat.stride(1) == 1 else flat.contiguous()


def _dense(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else value.detach().contiguous()


def _made(spec: NormSpec) -> tuple[torch.dtype | None, ...]:
    dtypes = {"out": spec.out, "sum": spec.normed, "row": spec.row_dtype}
    return tuple(dtypes[o] if o in spec.outputs else None for o in cpu_source.OUTPUTS)


def _allocator() -> Callable[..., torch.Tensor]:
    """(size, stride, dtype) -> tensor. Inductor's own costs 0.45 us, torch.empty_strided 2 us."""
    try:
        from torch._C._dynamo.guards import _empty_strided_cpu  # type: ignore[attr-defined]
    except ImportError:
        return lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    fast: Callable[..., torch.Tensor] = _empty_strided_cpu
    return fast
