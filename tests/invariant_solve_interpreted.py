"""The GPU's forward substitution in Triton's interpreter: the bits of `solve.by_columns`.

test_invariant_solve.py runs this file in a process of its own, because TRITON_INTERPRET=1 must be
set before Triton is imported.
"""

import pytest
import torch
from invariant_solve_cases import KINDS, system
from triton_cases import interpreted

from fxpass.kernels.invariant import solve


@pytest.fixture(scope="module", autouse=True)
def _interpreter():
    with interpreted():
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 64, 33), (1, 1, 1), (2, 17, 70)], ids=str)
def test_bits(shape, unit, dtype):
    a, b, _ = system(shape, (False, True, unit), dtype)
    wanted = solve.by_columns(a, b, unit)
    assert torch.equal(solve._on_gpu(a, b, unit), wanted)
    assert torch.equal(solve._on_gpu(a[1:], b[1:], unit), wanted[1:])


def test_no_systems():
    a, b, _ = system((2, 5, 4), KINDS[0], torch.float32)
    assert solve._on_gpu(a[:0], b[:0], False).shape == (0, 5, 4)
