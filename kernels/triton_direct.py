"""Launching what Triton has compiled without Triton, whose own launch costs 9 us of host time.

How parameters lie in memory is Triton's business and changes between versions, so it is not taken
on trust: the driver is asked for the offset and size of each, and where they are not what the
kernel's signature means, or the driver is older than that question (CUDA 12.4), there is no direct
launch. Nor is there while a profiler hooks Triton's launches (`triton.knobs.runtime`); one that
does so later misses the kernels that are known by then. NVIDIA only.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fxpass.kernels import cuda_driver
from fxpass.kernels.build_cache import BuildError
from fxpass.kernels.cuda_launch import Prepared

MAP_BYTES = 128
"""sizeof(CUtensorMap)"""
_CODES = {
    "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
_DESCRIPTOR = (f"{MAP_BYTES}s", "i", "i", "q", "q")
"""A tensor descriptor of two dims: the map, the shape, the strides."""
_SCRATCH_MOST = 2
"""Pointers that Triton adds at the end: global and profiling scratch memory."""


class Direct:
    """A compiled kernel, for launches with any grid and numbers it was compiled for."""

    def __init__(
        self,
        compiled: Any,
        places: Sequence[tuple[int, int]],
        codes: Sequence[str],
        kept: Sequence[bool],
        scratch: int,
    ) -> None:
        """See `direct`."""
        metadata = compiled.metadata
        self._kept, self._scratch = tuple(kept), (0,) * scratch
        self._compiled = compiled  # which keeps the function loaded
        self._prepared = Prepared(
            int(compiled.function),
            32 * metadata.num_warps,
            struct.Struct(_format(codes, places)),
            [offset for offset, _ in places],
            shared=metadata.shared,
            overlap=bool(getattr(metadata, "launch_pdl", False)),
        )

    def launch(
        self, grid: tuple[int, int, int], numbers: Sequence[int | float]
    ) -> Callable[[int, Sequence[Any]], None]:
        """(device, leading parameters) -> a launch with this grid and these numbers."""
        fixed = [n for n, keep in zip(numbers, self._kept, strict=True) if keep]
        last = (*fixed, *self._scratch)
        return lambda device, leading: self._prepared(device, grid, leading, last)


def direct(compiled: Any, leading: int, numbers: int) -> Direct | None:
    """How to launch a kernel that has run once; None if that is left to Triton.

    Args:
        compiled: Triton's CompiledKernel.
        leading: how many of the kernel's first parameters are given with each call: addresses,
            numbers, and (map, *shape, *strides) for a descriptor.
        numbers: how many parameters follow that a launch keeps.
    """
    try:
        metadata, function = compiled.metadata, int(compiled.function)
        types = list(compiled.src.signature.values())
    except (AttributeError, TypeError):
        return None
    scratch = (getattr(metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    special = metadata.num_ctas != 1 or getattr(metadata, "launch_cooperative_grid", False)
    if special or any(scratch) or "constexpr" in types[:leading]:
        return None
    # Triton compiles an integer 1 into the kernel.
    kept = [kind != "constexpr" for kind in types[leading : leading + numbers]]
    codes = _codes([kind for kind in types[: leading + numbers] if kind != "constexpr"])
    places = _places(function)
    if codes is None or places is None:
        return None
    pointers = len(places) - len(codes)
    codes += ["Q"] * pointers
    sizes = [struct.calcsize(f"={code}") for code in codes]
    if not 0 <= pointers <= _SCRATCH_MOST or sizes != [size for _, size in places]:
        return None
    return Direct(compiled, places, codes, kept, pointers)


def _codes(types: Sequence[str]) -> list[str] | None:
    """The struct codes of the parameters; None if one of them has none here."""
    codes: list[str] = []
    for kind in types:
        if not isinstance(kind, str):
            return None
        if kind.startswith("*"):
            codes.append("Q")
        elif kind.startswith("tensordesc") and kind.count(",") == 1:
            codes += _DESCRIPTOR
        elif kind in _CODES:
            codes.append(_CODES[kind])
        else:
            return None
    return codes


def _places(function: int) -> list[tuple[int, int]] | None:
    """(offset, bytes) of every parameter, as the driver knows them; None if it cannot say."""
    try:
        ask = cuda_driver.driver().cuFuncGetParamInfo
    except (AttributeError, BuildError):
        return None
    ask.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
    return list(_asked(ask, function))


def _asked(ask: Any, function: int) -> Iterator[tuple[int, int]]:
    offset, size, index = ctypes.c_size_t(), ctypes.c_size_t(), 0
    while not ask(function, index, ctypes.byref(offset), ctypes.byref(size)):
        yield offset.value, size.value
        index += 1


def _format(codes: Sequence[str], places: Sequence[tuple[int, int]]) -> str:
    """The struct format of all parameters, with the driver's gaps between them."""
    parts, end = ["="], 0
    for code, (offset, size) in zip(codes, places, strict=True):
        parts.append(f"{offset - end}x{code}")
        end = offset + size
    return "".join(parts)
