"""What the tests of the CPU's products, reductions and attention share."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxpass.kernels import cpu_build
from fxpass.kernels.invariant import cpu_library

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ROWS = (1, 2, 3, 7, 8, 31, 64, 255, 256, 257)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns, NaNs included: they must not move either."""
    return x.contiguous().view(_INTEGERS[x.element_size()])


def same(*pairs: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Equal shapes, dtypes and bits."""
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))
        for a, b in pairs
    )


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal values, the same for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed * 1000 + len(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same (..., R, C) values in memory in other ways."""
    wide = torch.full((*x.shape[:-2], x.shape[-2] + 2, 2 * x.shape[-1] + 3), torch.nan)
    wide = wide.to(x.dtype)
    sliced = wide[..., 1:-1, 1 : 1 + x.shape[-1]]
    spread = wide.clone()[..., 1:-1, 2 : 2 + 2 * x.shape[-1] : 2]
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)
    for target in (sliced, spread, shifted):
        target.copy_(x)
    return {
        "dense": x.contiguous(),
        "transposed": x.mT.contiguous().mT,
        "sliced": sliced,
        "spread": spread,
        "shifted": shifted,
    }


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's number of threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def without_library() -> Iterator[None]:
    """As where no kernel can be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "library", lambda name, element: None)
        yield


@contextlib.contextmanager
def built_for(machine: str, name: str, dtype: torch.dtype, folder: Path) -> Iterator[None]:
    """As on an x86 machine that has only the instructions of `machine`."""
    if platform.machine() != "x86_64":
        pytest.skip("needs an x86-64 machine")
    text, made = folder / f"{name}.cpp", folder / f"{name}.so"
    text.write_text(cpu_library.source(name, dtype))
    command = [*cpu_build.compiler().command, *cpu_build._FLAGS, f"-march={machine}", "-fopenmp"]
    subprocess.run([*command, str(text), "-o", str(made)], check=True)
    run = cpu_library.loaded(name, ctypes.CDLL(str(made)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_library, "library", lambda name, element: run)
        yield
