"""The kernels in order of preference, and the public extension point `register`."""

from __future__ import annotations

import threading

from fxpass.errors import FxpassError
from fxpass.kernels import aiter, cpu, cuda_row, inductor, reference, triton_row
from fxpass.kernels.contract import Kernel

_BUILT_IN = (
    cpu.KERNEL,
    *aiter.KERNELS,
    cuda_row.KERNEL,
    triton_row.KERNEL,
    reference.KERNEL,
    inductor.KERNEL,
)
_registered: list[Kernel] = []
_lock = threading.Lock()


def kernels() -> tuple[Kernel, ...]:
    """All kernels in order of preference: registered ones (latest first), then built-in ones."""
    return (*_registered, *_BUILT_IN)


def register(kernel: Kernel) -> Kernel:
    """Offer a kernel to selection, before the built-in ones.

    Raises FxpassError if the name is taken or has no provider part (`provider.kernel`).
    """
    if "." not in kernel.name:
        raise FxpassError(f"kernel name {kernel.name!r} has no provider; use 'provider.kernel'")
    with _lock:
        if any(kernel.name == other.name for other in kernels()):
            raise FxpassError(f"kernel {kernel.name!r} is already registered")
        _registered.insert(0, kernel)
    return kernel


def unregister(name: str) -> None:
    """Take back a kernel given to `register`; unknown names are ignored."""
    with _lock:
        _registered[:] = [kernel for kernel in _registered if kernel.name != name]


def by_name(name: str) -> Kernel:
    """The kernel of that name. Raises FxpassError if there is none."""
    for kernel in kernels():
        if kernel.name == name:
            return kernel
    known = ", ".join(kernel.name for kernel in kernels())
    raise FxpassError(f"kernel {name!r} is not registered in this process; known: {known}")
