"""`cuda.row`: the CUDA C++ row kernel, built with NVRTC for each spec and hidden."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fxpass.kernels import cuda_build, cuda_driver, cuda_source, gpu_rows
from fxpass.kernels.build_cache import BuildError, Once
from fxpass.kernels.contract import Kernel, Outputs
from fxpass.kernels.cuda_call import RowKernel
from fxpass.kernels.cuda_launch import is_current
from fxpass.kernels.cuda_source import Schedule
from fxpass.kernels.gpu_contract import contract
from fxpass.spec import NormSpec

CONTRACT = contract("cuda")
_LEAST_CAPABILITY = (8, 0)  # cvt.rn.bf16.f32

_SIZES = ((128, "alone"), (1024, "few"), (4096, "some"))
"""Rows up to, and their word. alone: each has a multiprocessor of its own (132 on an H200). few:
multiprocessors wait for rows. some: the grid is over so soon that the next kernel may come in at
once. More are many: multiprocessors wait for memory."""
_EACH: dict[tuple[str, bool], tuple[tuple[int, int], ...]] = {
    ("alone", False): ((512, 1), (1024, 2)),
    ("alone", True): ((512, 1), (1024, 2)),
    ("few", False): ((512, 1), (768, 2), (1024, 4)),
    ("few", True): ((32, 1), (64, 2), (128, 4), (256, 2), (512, 1), (896, 5), (1024, 4)),
    ("some", False): ((32, 1), (64, 2), (1024, 4)),
    ("some", True): ((32, 1), (64, 2), (128, 4), (512, 1), (1024, 2)),
    ("many", False): ((32, 1), (64, 2), (1024, 4)),
    ("many", True): ((32, 1), (64, 2), (128, 4), (512, 1), (1024, 2)),
}
"""Units of a thread, by rows and whether a thread reads more than one 16-bit unit at a place (a
residual, or float32): (units of the row up to, units of a thread). From sweeps on an H200 over
hidden 128 to 16,384 and 1 to 32,768 rows; the best of up to 40 schedules is at most 7 % faster."""

_kernels: Once[RowKernel] = Once()


def schedule(spec: NormSpec, hidden: int, rows: int) -> Schedule:
    """Threads of a row and rows of a block: a choice of speed, no bit depends on it."""
    units = -(-hidden // gpu_rows.VECTOR)
    heavy = spec.residual is not None or spec.normed == torch.float32
    size = next((word for most, word in _SIZES if rows <= most), "many")
    eager = size != "many"
    if hidden > gpu_rows.MOST_LANES:
        threads = 1024 if heavy else 256 if size == "few" else 512
        return Schedule(threads, 1, eager=eager and size != "some")
    each = next(each for most, each in _EACH[size, heavy] if units <= most)
    threads = _threads(-(-units // each))
    return Schedule(threads, max(1, _block(size, units, threads) // threads), eager=eager)


def _block(size: str, units: int, threads: int) -> int:
    """Threads of a block that takes several rows."""
    if size in ("alone", "few"):
        return 128
    if size == "some":
        return 512 if threads <= 32 else 128
    return 512 if units <= 64 or threads == 256 else 256


def _threads(count: int) -> int:
    """At least `count`: a power of two below 32, a multiple of 32 above."""
    return 1 << (count - 1).bit_length() if count <= 32 else -(-count // 32) * 32


def row_kernel(spec: NormSpec, hidden: int, device: int) -> RowKernel:
    """The kernel for one device, made once. Raises BuildError."""
    key = (spec, hidden, device)
    return _kernels.get(key, lambda: RowKernel(spec, hidden, device, schedule))


def entry(spec: NormSpec) -> Callable[..., Any]:
    """(x, residual, weight, bias, eps) -> a tensor, or a tuple if the spec has more outputs."""
    known: dict[tuple[int, int], RowKernel] = {}

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
        if kernel is None:
            if not x.is_cuda:
                raise TypeError(f"x is on {x.device}, needs a CUDA device")
            kernel = known[key] = row_kernel(spec, *key)
        if is_current(device):
            return kernel(x, residual, weight, bias, eps, over)
        with torch.cuda.device(device):
            return kernel(x, residual, weight, bias, eps, over)

    return call


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
        row_kernel(spec, hidden, torch.cuda.current_device()).prepare()
    except BuildError as error:
        return str(error)
    return None


def unavailable() -> str | None:
    """None, or why no kernel can run here."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]}, needs 8.0"
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
