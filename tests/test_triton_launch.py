"""When Triton is asked for a kernel, and what the driver is given where it is not."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxpass.kernels import cuda_driver, cuda_launch, triton_direct, triton_launch
from fxpass.kernels.triton_launch import Launch

SIGNATURE = {"x": "*fp32", "out": "*fp32", "alpha": "fp32", "size": "i32", "eps": "fp32",
             "ROWS": "constexpr", "WIDE": "constexpr"}  # fmt: skip
PLACES = [(0, 8), (8, 8), (16, 4), (20, 4), (24, 4), (32, 8), (40, 8)]
"""Offset and size of the parameters of SIGNATURE, and of the scratch memory that Triton adds."""
WIDE_PLACES = [(0, 8), (8, 8), (16, 4), (24, 8), (32, 4), (40, 8), (48, 8)]
"""The same with a size of 64 bits."""
WIDE_FUNCTION = 100


class FakeTensor:
    """What a launch looks at of a tensor on a GPU."""

    def __init__(self, address: int, dtype: torch.dtype = torch.float32) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class FakeKernel:
    """A jitted function that says what it was asked, and the compiled one it gives."""

    arg_names = tuple(SIGNATURE)

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.by_triton: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **named: Any) -> Any:
            self.asked.append((grid, arguments, named))
            sizes = dict(zip(SIGNATURE, arguments, strict=False))
            size = sizes["size"]
            kind = "constexpr" if size == 1 else "i32" if abs(size) < 2**31 else "i64"
            return Compiled(self, {**SIGNATURE, "size": kind}, named["num_warps"])

        return run


class Compiled:
    def __init__(self, kernel: FakeKernel, signature: dict[str, str], warps: int) -> None:
        self.kernel, self.src = kernel, SimpleNamespace(signature=signature)
        self.function = WIDE_FUNCTION if signature.get("size") == "i64" else 99
        self.metadata = SimpleNamespace(
            num_ctas=1, num_warps=warps, shared=1024, launch_pdl=True,
            global_scratch_size=0, profile_scratch_size=0, launch_cooperative_grid=False,
        )  # fmt: skip

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments: self.kernel.by_triton.append((grid, *arguments))


@dataclasses.dataclass
class Launched:
    """One call of cuLaunchKernelEx."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    overlaps: bool
    stream: int
    parameters: list[bytes]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """What the driver is asked to launch; it knows the parameters as PLACES."""
    notes: list[Launched] = []

    def note(config: int, kernel: int, parameters: int, extra: None) -> int:
        assert extra is None
        asked = ctypes.cast(config, ctypes.POINTER(cuda_driver.Config)).contents
        at = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        read = [
            ctypes.string_at(at[i], size)
            for i, (_, size) in enumerate(triton_direct._places(kernel) or ())
        ]
        notes.append(
            Launched(
                kernel, (asked.grid_x, asked.grid_y, asked.grid_z), asked.block_x,
                asked.shared_bytes, asked.attribute_count == 1, asked.stream, read,
            )
        )  # fmt: skip
        return 0

    monkeypatch.setattr(cuda_driver, "launcher", lambda: note)
    monkeypatch.setattr(cuda_launch, "stream", lambda device: 70 + device)
    places = {99: PLACES, WIDE_FUNCTION: WIDE_PLACES}
    monkeypatch.setattr(triton_direct, "_places", places.get)
    monkeypatch.setattr(triton_launch, "_known", {})
    monkeypatch.setattr(torch.version, "hip", None)
    return notes


class Run:
    """Calls of launches of one kernel."""

    def __init__(self) -> None:
        self.kernel = FakeKernel()

    def launch(self, size=5, eps=0.5, rows=2, programs=3, warps=4, aligned=True) -> Launch:
        constants = {"WIDE": False, "ROWS": rows}
        options = {"num_warps": warps}
        return Launch(self.kernel, (programs,), (size, eps), constants, options, aligned=aligned)

    def __call__(self, dtype=torch.float32, device=0, **named) -> int:
        """How often Triton is asked by a new launch and its second call."""
        before = len(self.kernel.asked)
        launch = self.launch(**named)
        for _ in range(2):
            launch(device, (FakeTensor(4096, dtype), FakeTensor(8192)), 2.0)
        return len(self.kernel.asked) - before


@pytest.fixture
def run() -> Run:
    return Run()


def test_second_launch_is_direct(run: Run, driver: list[Launched]) -> None:
    launch = run.launch()
    launch(0, (FakeTensor(4096), FakeTensor(8192)), 2.0)
    ((grid, arguments, named),) = run.kernel.asked
    assert (grid, arguments[2:]) == ((3, 1, 1), (2.0, 5, 0.5))
    assert named == {"ROWS": 2, "WIDE": False, "num_warps": 4}
    assert driver == []
    launch(0, (FakeTensor(64), FakeTensor(128)), 3.0)
    assert len(run.kernel.asked) == 1
    packed = [struct.pack(code, value) for code, value in
              zip("QQfifQQ", (64, 128, 3.0, 5, 0.5, 0, 0), strict=True)]  # fmt: skip
    assert driver == [Launched(99, (3, 1, 1), 128, 1024, True, 70, packed)]


def test_a_kernel_is_known_to_other_launches(run: Run, driver: list[Launched]) -> None:
    assert run() == 1
    assert run(size=7, eps=1.5, programs=9) == 0
    assert driver[-1].grid == (9, 1, 1)
    assert driver[-1].parameters[3:5] == [struct.pack("i", 7), struct.pack("f", 1.5)]


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize(
    "other",
    [
        {"size": 32},
        {"size": 2**31 + 1},
        {"size": 2**31},
        {"dtype": torch.bfloat16},
        {"device": 1},
        {"rows": 4},
        {"warps": 8},
    ],
    ids=str,
)
def test_what_triton_compiles_again_for(run: Run, other: dict[str, Any]) -> None:
    run()
    assert run(**other) == 1
    assert run(**other) == 0
    assert run() == 0


@pytest.mark.usefixtures("driver")
def test_nothing_is_kept_of_a_kernel_that_was_not_compiled(run: Run, monkeypatch) -> None:
    """Triton interprets, or a hook of its cache says that compiling was not needed."""
    monkeypatch.setattr(FakeKernel, "__getitem__", lambda self, grid: self.asked_only)
    monkeypatch.setattr(FakeKernel, "asked_only", lambda self, *a, **k: self.asked.append(a),
                        raising=False)  # fmt: skip
    assert run() == 2
    assert run() == 2


def test_a_profiler_sees_triton_s_launches(run: Run, driver: list[Launched]) -> None:
    knobs = pytest.importorskip("triton").knobs
    knobs.runtime.launch_enter_hook.add(print)
    try:
        assert run() == 1
        assert (len(run.kernel.by_triton), driver) == (1, [])
    finally:
        knobs.runtime.launch_enter_hook.remove(print)
    assert run() == 0
    assert len(driver) == 2


def test_a_refused_launch_is_a_runtime_error(driver, monkeypatch) -> None:
    found = triton_direct.direct(Compiled(FakeKernel(), SIGNATURE, 4), 3, 2)
    assert found is not None
    monkeypatch.setattr(found._prepared, "_go", lambda *_: 700)
    monkeypatch.setattr(cuda_driver, "driver", lambda: SimpleNamespace(cuGetErrorName=_named))
    with pytest.raises(RuntimeError, match=r"^cuLaunchKernelEx: CUDA_ERROR_ILLEGAL_ADDRESS$"):
        found.launch((1, 1, 1), (5, 0.5))(0, [64, 128, 2.0])
    assert driver == []


def _named(status: int, text: Any) -> int:
    assert status == 700
    ctypes.cast(text, ctypes.POINTER(ctypes.c_char_p))[0] = b"CUDA_ERROR_ILLEGAL_ADDRESS"
    return 0


def test_a_one_is_compiled_in(run: Run, driver: list[Launched], monkeypatch) -> None:
    places = [*PLACES[:3], (20, 4), (24, 8)]
    monkeypatch.setattr(triton_direct, "_places", lambda function: places)
    assert run(size=1) == 1
    assert driver[-1].parameters[3] == struct.pack("f", 0.5)


@pytest.mark.usefixtures("driver")
def test_unaligned_tensors_are_triton_s(run: Run) -> None:
    assert run(aligned=False) == 2
    assert run(aligned=False) == 2


@pytest.mark.usefixtures("driver")
def test_amd_is_triton_s(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels follow the size of the memory that a tensor is a view of."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert run() == 2


@pytest.mark.parametrize(
    "places",
    [None, PLACES[:4], [*PLACES, (48, 8)], [*PLACES[:3], (24, 8), *PLACES[4:]], []],
    ids=["driver cannot say", "too few", "too many", "another size", "none"],
)
def test_unexpected_parameters_are_triton_s(run, driver, monkeypatch, places) -> None:
    """Constants stand where the kernel has them, whatever order they were given in."""
    monkeypatch.setattr(triton_direct, "_places", lambda function: places)
    assert run() == 1
    assert driver == []
    assert run.kernel.by_triton == [((3, 1, 1), 4096, 8192, 2.0, 5, 0.5, 2, False)]


@pytest.mark.parametrize(
    "special",
    [{"num_ctas": 2}, {"global_scratch_size": 8}, {"profile_scratch_size": 8},
     {"launch_cooperative_grid": True}],
    ids=str,
)  # fmt: skip
def test_special_launches_are_triton_s(driver, special) -> None:
    compiled = Compiled(FakeKernel(), SIGNATURE, 4)
    assert triton_direct.direct(compiled, 3, 2) is not None
    compiled.metadata.__dict__.update(special)
    assert triton_direct.direct(compiled, 3, 2) is None
    assert driver == []


def test_descriptors_are_a_map_a_shape_and_strides(driver, monkeypatch) -> None:
    places = [(0, 128), (128, 4), (132, 4), (136, 8), (144, 8), (152, 8), (160, 8), (168, 8)]
    monkeypatch.setattr(triton_direct, "_places", lambda function: places)
    signature = {"a": "tensordesc<bf16[64, 128]>", "out": "*bf16", "K": "constexpr"}
    found = triton_direct.direct(Compiled(FakeKernel(), signature, 8), 2, 0)
    assert found is not None
    read = []

    def note(config, kernel, parameters, extra):
        at = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))
        assert at[0] % 64 == 0
        read.extend(ctypes.string_at(at[i], size) for i, (_, size) in enumerate(places))
        return 0

    found._prepared._go = note
    found.launch((1, 1, 1), ())(0, [b"m" * 128, 3, 4, 5, 1, 4096])
    assert read[0] == b"m" * 128
    assert read[1:] == [struct.pack(c, n) for c, n in zip("iiqqQQQ", (3, 4, 5, 1, 4096, 0, 0),
                                                           strict=True)]  # fmt: skip
    assert driver == []


def test_kinds_are_triton_s_own() -> None:
    """Integers of one kind have one type and one specialization in Triton."""
    triton = pytest.importorskip("triton")
    backend = triton.compiler.make_backend(triton.backends.compiler.GPUTarget("cuda", 90, 32))
    special = getattr(triton._C.libtriton, "native_specialize_impl", None)
    if special is None:
        pytest.skip("this Triton specializes in Python")
    seen: dict[int, set[str]] = {}
    for number in (0, 1, 2, 3, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), 2**40):
        found = special(type(backend), number, False, True, True)
        seen.setdefault(triton_launch._kind_of(number), set()).add(str(found))
    assert all(len(found) == 1 for found in seen.values()), seen
