"""What the driver is told about a matrix (cuTensorMapEncodeTiled), without a driver."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from fxpass.kernels import cuda_driver
from fxpass.kernels.invariant import tensor_map
from fxpass.kernels.invariant.tensor_map import MatrixMaps


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The driver's calls; each map holds its number."""
    calls: list[tuple[Any, ...]] = []

    def encode(memory: int, dtype: int, rank: int, address: int, *arrays: Any) -> int:
        assert memory % 64 == 0
        sizes, steps, box, every, *rest = arrays
        calls.append((dtype, rank, address, *map(list, (sizes, steps, box, every)), *rest))
        ctypes.memset(memory, len(calls), 128)
        return 0

    monkeypatch.setattr(tensor_map, "_encode", lambda: encode)
    return calls


@pytest.mark.parametrize(
    ("dtype", "kind"), [(torch.float16, 6), (torch.float32, 7), (torch.bfloat16, 9)]
)
def test_innermost_dim_comes_first_and_strides_are_bytes(asked, dtype, kind) -> None:
    make = MatrixMaps(dtype, (300, 80), 96, (64, 32), 3)
    assert make(4096) == b"\x01" * 128
    every, none, l2_128_bytes, zeros = [1, 1], 0, 2, 0
    steps = [96 * dtype.itemsize]
    wanted = (kind, 2, 4096, [80, 300], steps, [32, 64], every, none, 3, l2_128_bytes, zeros)
    assert asked == [wanted]


def test_a_map_is_kept_by_its_address(asked, monkeypatch) -> None:
    monkeypatch.setattr(tensor_map, "_KEPT_MOST", 2)
    make = MatrixMaps(torch.bfloat16, (8, 8), 8, (8, 8), 0)
    first, second = make(0), make(128)
    assert (make(0), make(128), len(asked)) == (first, second, 2)
    make(256)  # starts over
    make(0)
    assert len(asked) == 4


def test_a_refusal_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(tensor_map, "_encode", lambda: lambda *_: 1)

    class Driver:
        @staticmethod
        def cuGetErrorName(status: int, text: Any) -> None:  # noqa: N802 - the driver's
            ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_INVALID_VALUE"

    monkeypatch.setattr(cuda_driver, "driver", Driver)
    with pytest.raises(cuda_driver.LaunchError, match=r"^cuTensorMapEncodeTiled: CUDA_ERROR_INV"):
        MatrixMaps(torch.bfloat16, (8, 8), 8, (8, 8), 0)(0)
