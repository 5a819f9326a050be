"""`cuda.row`: the CUDA C++ row kernel, built with NVRTC for each spec and hidden."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch

from fxpass.kernels import cuda_build, cuda_driver, cuda_schedule, cuda_source, reference
from fxpass.kernels.build_cache import BuildError, Once
from fxpass.kernels.contract import Kernel, Outputs, arch_of
from fxpass.kernels.cuda_call import RowKernel
from fxpass.kernels.cuda_launch import is_current
from fxpass.kernels.gpu_contract import contract
from fxpass.spec import NormSpec

CONTRACT = dataclasses.replace(contract("cuda"), least_sm=80)  # cvt.rn.bf16.f32

_kernels: Once[RowKernel] = Once()


def row_kernel(spec: NormSpec, hidden: int, device: int) -> RowKernel:
    """The kernel for one device, made once. Raises BuildError."""
    key = (spec, hidden, device)
    return _kernels.get(key, lambda: RowKernel(spec, hidden, device, cuda_schedule.schedule))


def entry(spec: NormSpec) -> Callable[..., Any]:
    """(x, residual, weight, bias, eps) -> a tensor, or a tuple if the spec has more outputs."""
    known: dict[tuple[int, int], Callable[..., Any]] = {}

    def call(
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        over: bool = False,
    ) -> Any:
        device: int = x.get_device()
        key = (x.size(-1), device)
        kernel = known.get(key)
        if kernel is None and not x.is_cuda:
            raise TypeError(f"x is on {x.device}, needs a CUDA device")
        if not is_current(device):
            with torch.cuda.device(device):
                return call(x, residual, weight, bias, eps, over)
        if kernel is None:
            kernel = known[key] = _first(spec, key, x, over)
        return kernel(x, residual, weight, bias, eps, over)

    return call


def _first(spec: NormSpec, key: tuple[int, int], x: torch.Tensor, over: bool) -> Callable[..., Any]:
    """What runs for a hidden and device from now on: the reference where nothing can be built.

    Not in place of `over`, whose callers want rows that are invariant.
    """
    kernel = row_kernel(spec, *key)
    if over or not x.numel():
        return kernel
    try:
        kernel.prepare([x.numel() // key[0]])
    except BuildError as error:
        eager = reference.instead_of("cuda.row", spec, error)
        return lambda *inputs: eager(*inputs[:5])
    return kernel


def over(spec: NormSpec) -> Callable[..., None]:
    """(x, residual, weight, bias, eps): the result over x, the sum over residual, contiguous."""
    return functools.partial(entry(spec), over=True)


def launch(
    spec: NormSpec,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Outputs:
    """Run the kernel of `spec`, building it if need be. Not differentiable."""
    made = entry(spec)(x, residual, weight, bias, eps)
    return made if isinstance(made, tuple) else (made,)


def prepare(spec: NormSpec, hidden: int | None) -> str | None:
    """Build the kernel for the current device. None, or one line saying why there is none."""
    if hidden is None:
        return "hidden is known only at run time"
    why_not = unavailable()
    if why_not is not None:
        return why_not
    try:
        kernel = row_kernel(spec, hidden, torch.cuda.current_device())
        kernel.prepare(cuda_schedule.changes(spec, hidden))
    except BuildError as error:
        return str(error)
    return None


def unavailable() -> str | None:
    """None, or why no kernel can run here."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU"
    too_old = CONTRACT.arch_refusal(arch_of(torch.cuda.get_device_capability()))
    if too_old is not None:
        return too_old
    try:
        cuda_driver.driver()
        cuda_build.nvrtc()
    except BuildError as error:
        return str(error)
    return None


KERNEL = Kernel(
    "cuda.row",
    CONTRACT,
    launch,
    prepare,
    unavailable,
    refuses=cuda_source.refusal,
    bound=entry,
    over=over,
)
