"""Tensor maps: what a Hopper GPU's copy engine is told about a matrix in memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from fxpass.kernels import cuda_driver
from fxpass.kernels.triton_direct import MAP_BYTES

_DTYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
"""CUtensorMapDataType"""
_ALIGNED = 64
_NOT_INTERLEAVED, _L2_128_BYTES, _ZEROS_OUTSIDE = 0, 2, 0
_KEPT_MOST = 256


class MatrixMaps:
    """Tensor maps of matrices that differ in nothing but their address, kept by it."""

    def __init__(
        self,
        dtype: torch.dtype,
        shape: Sequence[int],
        row_step: int,
        box: Sequence[int],
        swizzle: int,
    ) -> None:
        """Of a matrix (rows, columns) with contiguous columns.

        Args:
            dtype: of its elements.
            shape: rows and columns.
            row_step: elements from one row to the next.
            box: rows and columns that one copy moves.
            swizzle: CUtensorMapSwizzle, how a box lies in shared memory.
        """
        self._dtype, self._swizzle = _DTYPES[dtype], swizzle
        self._sizes = (ctypes.c_uint64 * 2)(shape[1], shape[0])
        self._steps = (ctypes.c_uint64 * 1)(row_step * dtype.itemsize)
        self._box = (ctypes.c_uint32 * 2)(box[1], box[0])
        self._every = (ctypes.c_uint32 * 2)(1, 1)
        self._kept: dict[int, bytes] = {}

    def __call__(self, address: int) -> bytes:
        """The map for the matrix at an address. Raises LaunchError if the driver refuses."""
        found = self._kept.get(address)
        if found is None:
            if len(self._kept) >= _KEPT_MOST:
                self._kept.clear()
            found = self._kept[address] = self._encoded(address)
        return found

    def _encoded(self, address: int) -> bytes:
        memory = ctypes.create_string_buffer(MAP_BYTES + _ALIGNED)
        start = -ctypes.addressof(memory) % _ALIGNED
        status = _encode()(
            ctypes.addressof(memory) + start, self._dtype, 2, address, self._sizes, self._steps,
            self._box, self._every, _NOT_INTERLEAVED, self._swizzle, _L2_128_BYTES, _ZEROS_OUTSIDE,
        )  # fmt: skip
        cuda_driver.check(status, "cuTensorMapEncodeTiled", cuda_driver.LaunchError)
        return memory.raw[start : start + MAP_BYTES]


@cache
def _encode() -> Any:
    function = cuda_driver.driver().cuTensorMapEncodeTiled
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [
        pointer, number, ctypes.c_uint32, pointer, pointer, pointer, pointer, pointer,
        number, number, number, number,
    ]  # fmt: skip
    return function
