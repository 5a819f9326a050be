"""The CUDA driver calls a launch needs, through ctypes.

Launches go through cuLaunchKernelEx, for its attribute that lets a kernel start while the one
before it still runs (programmatic dependent launch).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from fxpass.kernels.build_cache import BuildError


class Attribute(ctypes.Structure):
    """CUlaunchAttribute (cuda.h); the value is a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


class Config(ctypes.Structure):
    """CUlaunchConfig (cuda.h)."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in "grid_x grid_y grid_z block_x block_y block_z".split()),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class LaunchError(RuntimeError):
    """The driver refused a launch, or reports what an earlier one did."""


INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: a thread that has done nothing on a GPU yet
_OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


def overlap(config: Config) -> None:
    """Ask for programmatic dependent launch (compute capability 9.0)."""
    config.attributes = (Attribute * 1)(Attribute(id=_OVERLAP))
    config.attributes[0].value[0] = 1
    config.attribute_count = 1


@cache
def driver() -> Any:
    """The driver library. Raises BuildError if there is none."""
    for name in ("libcuda.so.1", "libcuda.so"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BuildError("no CUDA driver (libcuda.so.1)")


@cache
def launcher() -> Any:
    """`cuLaunchKernelEx(config, kernel, parameters, None)`, of plain addresses."""
    function = driver().cuLaunchKernelEx
    function.argtypes = [ctypes.c_void_p] * 4
    return function


def clusters_fit(kernel: int, config: Config) -> bool:
    """Whether the current device can run a cluster of that kernel at all.

    A slice of a GPU (MIG) or a limit on its multiprocessors (MPS) may leave too few next to each
    other. True if the driver cannot say, as before CUDA 12.
    """
    count = ctypes.c_int()
    try:
        ask = driver().cuOccupancyMaxActiveClusters
    except AttributeError:
        return True
    status = ask(ctypes.byref(count), ctypes.c_void_p(kernel), ctypes.byref(config))
    return bool(status or count.value)


def make_current(device: int) -> None:
    """Give this thread the device's context, as the first call of CUDA's runtime in it would."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    check(driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    check(
        driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle),
        "cuDevicePrimaryCtxRetain",
    )
    check(driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


def load(cubin: bytes, name: str) -> ctypes.c_void_p:
    """The kernel `name` of a cubin, usable in every context of the process. Raises BuildError.

    Needs an initialised driver: torch.cuda has done that where there is a tensor to normalise.
    """
    library, kernel = ctypes.c_void_p(), ctypes.c_void_p()
    check(
        driver().cuLibraryLoadData(ctypes.byref(library), cubin, None, None, 0, None, None, 0),
        "cuLibraryLoadData",
    )
    check(
        driver().cuLibraryGetKernel(ctypes.byref(kernel), library, name.encode()),
        "cuLibraryGetKernel",
    )
    # Loads the code now: a first launch inside the capture of a CUDA graph would have to, and may
    # not. Without a current context the first launch does it after all, so no status is looked at.
    driver().cuKernelGetFunction(ctypes.byref(ctypes.c_void_p()), kernel)
    return kernel


def check(status: int, what: str, error: type[Exception] = BuildError) -> None:
    """Raises `error` with the driver's own word for a status that is not success."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorName(status, ctypes.byref(text))
        raise error(f"{what}: {text.value.decode() if text.value else status}")
