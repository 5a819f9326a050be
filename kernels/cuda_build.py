"""Compiles generated CUDA C++ with NVRTC and keeps the machine code on disk.

NVRTC comes with every CUDA build of torch, so nothing more is installed. It is called through
ctypes: nine functions, whose signatures have not changed since CUDA 11.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fxpass.kernels import build_cache
from fxpass.kernels.build_cache import BuildError, Once
from fxpass.kernels.contract import arch_of

# Every operation is written out, roundings included: nothing may be contracted.
_FLAGS = ("--fmad=false", "--std=c++17", "-default-device")
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")

_library: Once[Any] = Once()
_cubins: Once[bytes] = Once()


def cubin(source: str, capability: tuple[int, int]) -> bytes:
    """Machine code of `source` for a compute capability. Raises BuildError."""
    major, minor = _version(nvrtc())
    arch = arch_of(capability)
    parts = (source, arch, f"nvrtc {major}.{minor}", *_FLAGS)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return _cubins.get(key, lambda: _cached(key, source, arch))


def nvrtc() -> Any:
    """The NVRTC library. Raises BuildError if there is none."""
    return _library.get("", _load)


def reset() -> None:
    """Forget the library and what was built (files on disk stay)."""
    _library.clear()
    _cubins.clear()


def _cached(key: str, source: str, arch: str) -> bytes:
    path = build_cache.cache_dir() / f"cuda-{key[:32]}.cubin"
    found = build_cache.unsealed(path)
    if found is not None:
        return found
    made = _compile(source, arch)
    with contextlib.suppress(OSError):  # not writable: the next process builds it again
        build_cache.keep(path, made)
    return made


def _compile(source: str, arch: str) -> bytes:
    library = nvrtc()
    program = ctypes.c_void_p()
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"fxpass.cu", 0, None, None
        ),
    )
    try:
        flags = [flag.encode() for flag in (f"--gpu-architecture={arch}", *_FLAGS)]
        array = (ctypes.c_char_p * len(flags))(*flags)
        failed = library.nvrtcCompileProgram(program, len(flags), array)
        if failed:
            log = _text(library, program, "ProgramLog").decode(errors="replace")
            raise BuildError(f"NVRTC for {arch}: {_first_error(log) or _message(library, failed)}")
        return _text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: Any, status: int) -> None:
    if status:
        raise BuildError(f"NVRTC: {_message(library, status)}")


def _message(library: Any, status: int) -> str:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return str(library.nvrtcGetErrorString(status).decode())


def _first_error(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if "error" in line]
    return lines[0] if lines else ""


def _version(library: Any) -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(library, library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _load() -> Any:
    """The library torch ships, or one on the loader's path."""
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError(
        "no NVRTC library (libnvrtc.so.12 or .13): a CUDA build of torch brings it, or"
        " pip install nvidia-cuda-nvrtc"
    )


def _candidates() -> list[str]:
    """Of torch's own CUDA version first: its machine code is what the driver certainly takes."""
    wanted = f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}"
    names = [*_packaged(), *_NAMES]
    return sorted(names, key=lambda name: os.path.basename(name) != wanted)


def _packaged() -> list[str]:
    """Libraries in the `nvidia` packages that torch's CUDA wheels depend on, newest first."""
    found: list[str] = []
    for folder in map(Path, sys.path):
        for pattern in ("nvidia/*/lib/libnvrtc.so.*", "nvidia/*/lib64/libnvrtc.so.*"):
            found += glob.glob(os.fspath(folder / pattern))
    return sorted(found, key=os.path.basename, reverse=True)
