"""What the GPU reductions and attention hand to Triton, and when they ask it again."""

import pytest
import torch

from fxpass.kernels.invariant import triton_launch


class FakeTensor:
    """What a launch looks at of a tensor on a GPU."""

    def __init__(self, address, dtype=torch.float32):
        self.address, self.dtype = address, dtype

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.address


class FakeKernel:
    """A jitted function that says what it was asked, and a compiled one that was launched."""

    arg_names = ("x", "out", "size", "eps", "ROWS", "WIDE")

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def run(*arguments, **named):
            self.asked.append((grid, arguments, named))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, *arguments))


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(triton_launch, "_compiled", {})
    kernel = FakeKernel()

    def call(x=4096, size=5, eps=0.5, dtype=torch.float32, rows=2, programs=3, warps=4):
        """(times Triton was asked, direct launches) of this call."""
        before = len(kernel.asked), len(kernel.launched)
        triton_launch.launch(
            kernel,
            (programs,),
            (FakeTensor(x, dtype), FakeTensor(8192)),
            (size, eps),
            {"WIDE": False, "ROWS": rows},
            {"num_warps": warps},
        )
        return len(kernel.asked) - before[0], len(kernel.launched) - before[1]

    call.kernel = kernel
    return call


def test_second_launch_is_direct(run):
    assert run() == (1, 0)
    ((grid, arguments, named),) = run.kernel.asked
    assert grid == (3, 1, 1)
    assert arguments[2:] == (5, 0.5)
    assert named == {"ROWS": 2, "WIDE": False, "num_warps": 4}
    assert run(x=64, size=7, eps=1.5, programs=9) == (0, 1)
    # Constants stand where the kernel has them, whatever order they were given in.
    assert run.kernel.launched == [((9, 1, 1), 64, 8192, 7, 1.5, 2, False)]


@pytest.mark.parametrize(
    "other",
    [
        {"size": 1},
        {"size": 32},
        {"size": 2**31 + 1},
        {"size": 2**31},
        {"dtype": torch.bfloat16},
        {"rows": 4},
        {"warps": 8},
    ],
    ids=str,
)
def test_what_triton_compiles_again_for(run, other):
    run()
    assert run(**other) == (1, 0)
    assert run(**other) == (0, 1)
    assert run() == (0, 1)


def test_unaligned_tensors_are_triton_s(run):
    run()
    assert run(x=4098) == (1, 0)
    assert run(x=4098) == (1, 0)


def test_amd_is_triton_s(run, monkeypatch):
    """Its kernels follow the size of the memory that a tensor is a view of."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert run() == (1, 0)
    assert run() == (1, 0)


def test_kinds_are_triton_s_own():
    """Integers of one kind have one type and one specialization in Triton."""
    triton = pytest.importorskip("triton")
    backend = triton.compiler.make_backend(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    special = getattr(triton._C.libtriton, "native_specialize_impl", None)
    if special is None:
        pytest.skip("this Triton specializes in Python")
    seen = {}
    for number in (0, 1, 2, 3, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), 2**40):
        found = special(type(backend), number, False, True, True)
        seen.setdefault(triton_launch._kind(number), set()).add(str(found))
    assert all(len(found) == 1 for found in seen.values()), seen
