"""`cuda.row` without a GPU: it compiles, its schedules are legal, and what a launch would pass."""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import itertools
import math
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import LLAMA, SPECS, Inputs, inputs
from triton_cases import MORE_SPECS

from fxpass.kernels import (
    build_cache,
    cuda_build,
    cuda_call,
    cuda_driver,
    cuda_launch,
    cuda_row,
    cuda_schedule,
    cuda_source,
    gpu_rows,
)
from fxpass.kernels.build_cache import BuildError
from fxpass.kernels.cuda_source import Schedule
from fxpass.spec import NormSpec

ALL = {name: NormSpec.parse(text) for name, text in {**SPECS, **MORE_SPECS}.items()}
ALONE, SHARED, FEW, MANY = 1, 64, 512, 1 << 20
"""Numbers of rows, each with schedules of its own."""
NUMBERS = (ALONE, SHARED, FEW, MANY)
HIDDEN = (1, 31, 128, 257, 1000, 4096, 5120, 16_384, 65_536)
CAPABILITIES = {"sm_80": (8, 0), "sm_90": (9, 0), "sm_100": (10, 0)}
ARCHITECTURES = tuple(CAPABILITIES)
MAIN = ("llama", "residual")
CLUSTERS_FIT = cuda_driver.clusters_fit


# ---- Compilation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvrtc() -> None:
    try:
        cuda_build.nvrtc()
    except BuildError as error:
        pytest.skip(str(error))


def scheduled(name: str, hidden: int, rows: int, arch: str = "sm_90") -> Schedule:
    return cuda_schedule.schedule(ALL[name], hidden, rows, CAPABILITIES[arch])


def source_of(name: str, hidden: int, rows: int, arch: str) -> str:
    return cuda_source.source(ALL[name], hidden, scheduled(name, hidden, rows, arch))


def points() -> list[tuple[str, int, int, str]]:
    """Every spec whole and with a part missing; the main ones at every size; all GPUs."""
    sizes = [(4096, ALONE), (4096, MANY), (257, FEW), (1000, MANY)]
    every = {(name, *size, "sm_90") for name in ALL for size in sizes}
    every |= {(name, 1000, FEW, arch) for name in ALL for arch in ARCHITECTURES}
    every |= set(itertools.product(MAIN, HIDDEN, NUMBERS, ARCHITECTURES))
    every |= {("llama_f32", hidden, MANY, "sm_90") for hidden in HIDDEN[:-1]}
    return sorted(every)


@pytest.fixture(scope="module")
def cubins(nvrtc) -> dict[tuple[str, int, int, str], bytes]:
    """NVRTC compiles on all cores: it runs without Python's lock."""
    wanted = {point: (source_of(*point), point[3]) for point in points()}
    different = set(wanted.values())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(lambda one: cuda_build._compile(*one), different)
        built = dict(zip(different, made, strict=True))
    return {point: built[one] for point, one in wanted.items()}


def test_every_spec_size_schedule_and_gpu_compiles(cubins):
    assert all(cubin.startswith(b"\x7fELF") and b"fxpass_run" in cubin for cubin in cubins.values())


def dump(option: str, cubin: bytes, folder: Path) -> str:
    """What the CUDA tools in Triton's wheel say about machine code."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("Triton's wheel has no cuobjdump here")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [tool, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", MAIN)
def test_nothing_is_spilled(cubins, name, arch, tmp_path):
    for hidden, rows in itertools.product(HIDDEN[:-1], NUMBERS):
        text = dump("--dump-resource-usage", cubins[name, hidden, rows, arch], tmp_path)
        (stack, local) = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", text).groups()
        assert (stack, local) == ("0", "0"), (hidden, rows, text)
        schedule = scheduled(name, hidden, rows, arch)
        registers = int(re.search(r"REG:(\d+)", text)[1])
        # All threads of a block at once; registers are handed out by eights.
        assert -(-registers // 8) * 8 * schedule.threads * schedule.rows <= 65_536


@pytest.mark.usefixtures("nvrtc")
def test_nothing_is_contracted(monkeypatch, tmp_path):
    source = 'extern "C" __global__ void k(float* p) { p[0] = p[1] * p[2] + p[3]; }'
    text = dump("-sass", cuda_build._compile(source, "sm_90"), tmp_path)
    assert "FMUL" in text
    assert "FFMA" not in text
    without = tuple(flag for flag in cuda_build._FLAGS if "fmad" not in flag)
    monkeypatch.setattr(cuda_build, "_FLAGS", without)
    assert "FFMA" in dump("-sass", cuda_build._compile(source, "sm_90"), tmp_path)


@pytest.mark.parametrize("name", MAIN)
@pytest.mark.parametrize("hidden", [128, 4096, 16_384])
def test_reads_and_writes_16_bytes(cubins, name, hidden, tmp_path):
    text = dump("-sass", cubins[name, hidden, MANY, "sm_90"], tmp_path)
    assert "LDG.E.128" in text
    assert "STG.E.128" in text


def test_generated_source_is_the_same_every_time(golden):
    text = source_of("residual", 4096, MANY, "sm_90")
    for name in ("cuda_pairs.h", "cuda_row.h"):
        text = text.replace(cuda_source.header(name), f"... {name}")
    golden(text)


# ---- Schedules ----------------------------------------------------------------------------------

KINDS = ("llama", "llama_f32", "residual", "residual_f32_sum")


def units_of(hidden: int) -> int:
    """UNITS of cuda_row.h."""
    lanes = gpu_rows.lanes(hidden)
    return lanes // 8 if hidden > lanes else -(-hidden // 8)


def partial_sums(units: int, schedule: Schedule) -> int:
    """PARTIALS of cuda_row.h."""
    segment = schedule.segment if schedule.blocks > 1 else units
    mine = -(-segment // schedule.threads)
    return schedule.blocks * mine * max(1, schedule.threads // 32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", KINDS)
def test_every_schedule_is_legal(name, arch):
    seen = set()
    for hidden in range(1, 65_537):
        units = units_of(hidden)
        if (units, hidden > gpu_rows.MOST_LANES) in seen:
            continue
        seen.add((units, hidden > gpu_rows.MOST_LANES))
        for rows in cuda_schedule.changes(hidden):
            schedule = scheduled(name, hidden, rows, arch)
            threads, block = schedule.threads, schedule.threads * schedule.rows
            whole_warps = threads % 32 == 0
            assert whole_warps or (threads < 32 and threads & (threads - 1) == 0), (hidden, rows)
            assert block <= 1024
            assert block % 32 == 0  # a shuffle names all lanes of its warp
            assert partial_sums(units, schedule) <= 32, (hidden, rows)
            if schedule.blocks == 1:
                continue
            assert arch != "sm_80"
            assert schedule.blocks <= 8  # more are for some GPUs only
            # A subtree each, none without a unit.
            assert schedule.segment & (schedule.segment - 1) == 0
            assert (schedule.segment % threads, schedule.rows) == (0, 1)
            assert (schedule.blocks - 1) * schedule.segment < units
            assert units <= schedule.blocks * schedule.segment


@pytest.mark.parametrize("name", [*KINDS, "nn_rms_norm"])
@pytest.mark.parametrize("hidden", [64, 128, 1000, 2048, 2056, 5120, 8192, 16_384, 65_536])
def test_all_schedules_are_built_before_a_launch(name, hidden):
    changes = cuda_schedule.changes(hidden)
    for rows in range(1, 5000):
        last = max(change for change in changes if change <= rows)
        assert scheduled(name, hidden, rows) == scheduled(name, hidden, last), rows


def test_a_schedule_follows_from_spec_hidden_rows_and_capability():
    parameters = inspect.signature(cuda_schedule.schedule).parameters
    assert list(parameters) == ["spec", "hidden", "rows", "capability"]
    # Nor from what a device has at the moment: another one would give other plans.
    assert "torch.cuda" not in inspect.getsource(cuda_schedule)


@pytest.mark.usefixtures("nvrtc")
def test_an_illegal_schedule_does_not_compile():
    text = cuda_source.source(ALL["llama"], 8192, Schedule(96, 1))
    with pytest.raises(BuildError, match="the last step of the tree is one warp's"):
        cuda_build._compile(text, "sm_90")
    text = cuda_source.source(ALL["llama"], 5120, Schedule(96, 1, blocks=5, segment=128))
    with pytest.raises(BuildError, match="a segment is a subtree"):
        cuda_build._compile(text, "sm_90")
    text = cuda_source.source(ALL["llama"], 8192, Schedule(128, 1, blocks=7, segment=128))
    with pytest.raises(BuildError, match="one row, all of it"):
        cuda_build._compile(text, "sm_90")


# ---- Launches, with a driver that only takes notes ----------------------------------------------

TYPES = {
    "const void *": ctypes.c_void_p,
    "void *": ctypes.c_void_p,
    "i64 ": ctypes.c_int64,
    "float ": ctypes.c_float,
    "u32 ": ctypes.c_uint32,
}


def fx_args() -> type[ctypes.Structure]:
    """`struct FxArgs` as cuda_row.h declares it."""
    body = re.search(r"struct FxArgs \{\n(.*?)\n\};", cuda_source.header("cuda_row.h"), re.DOTALL)[
        1
    ]
    fields = []
    for line in re.sub(r"//.*", "", body).splitlines():
        kind = next(kind for kind in TYPES if line.strip().startswith(kind))
        names = line.strip().removeprefix(kind).rstrip("; ").split(",")
        fields += [(name.strip(" *"), TYPES[kind]) for name in names]
    return type("FxArgs", (ctypes.Structure,), {"_fields_": fields})


@dataclasses.dataclass
class Launched:
    """One call of cuLaunchKernelEx."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    stream: int
    overlaps: bool
    kernel: Schedule
    args: ctypes.Structure


@pytest.fixture
def launches(monkeypatch) -> Iterator[list[Launched]]:
    """Launches of CPU tensors, written down instead of run."""
    notes: list[Launched] = []
    schedules: list[Schedule] = []

    def note(config: int, kernel: int, parameters: int, extra: None) -> int:
        assert extra is None
        found = ctypes.cast(config, ctypes.POINTER(cuda_driver.Config)).contents
        pointer = ctypes.cast(parameters, ctypes.POINTER(ctypes.c_void_p))[0]
        args = fx_args().from_buffer_copy(ctypes.string_at(pointer, ctypes.sizeof(fx_args())))
        grid = (found.grid_x, found.grid_y, found.grid_z)
        block = (found.block_x, found.block_y, found.block_z)
        overlaps = found.attribute_count == 1
        notes.append(
            Launched(grid, block, found.stream or 0, overlaps, schedules[kernel - 1], args)
        )
        return 0

    def kernel(self, schedule: Schedule) -> cuda_launch.Prepared:
        schedules.append(schedule)
        threads = schedule.threads * schedule.rows
        layout = cuda_call._ARGUMENTS
        return cuda_launch.Prepared(len(schedules), threads, layout, (0,), overlap=True)

    monkeypatch.setattr(cuda_driver, "launcher", lambda: note)
    monkeypatch.setattr(cuda_driver, "clusters_fit", lambda kernel, config: True)
    monkeypatch.setattr(cuda_call.RowKernel, "kernel", kernel)
    monkeypatch.setattr(cuda_call, "check", lambda *_: None)
    monkeypatch.setattr(cuda_launch, "stream", lambda device: 77)
    monkeypatch.setattr(cuda_call, "empty_strided", _empty)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return notes


def _empty(device, size, stride, dtype) -> torch.Tensor:
    assert device == 0
    return torch.empty_strided(size, stride, dtype=dtype)


def row_kernel(spec: NormSpec, hidden: int) -> cuda_call.RowKernel:
    return cuda_call.RowKernel(spec, hidden, 0, cuda_schedule.schedule)


def call(given: Inputs, spec: NormSpec) -> tuple[torch.Tensor, ...]:
    kernel = row_kernel(spec, given.x.shape[-1])
    made = kernel(given.x, given.residual, given.weight, given.bias, given.eps)
    return made if isinstance(made, tuple) else (made,)


def test_arguments_have_the_layout_of_the_struct():
    struct = fx_args()
    kinds = {ctypes.c_void_p: "Q", ctypes.c_int64: "q", ctypes.c_float: "f", ctypes.c_uint32: "I"}
    layout = cuda_call._ARGUMENTS
    wanted = re.sub(r"(\d+)(\w)", lambda match: int(match[1]) * match[2], layout.format)
    assert "".join(kinds[kind] for _, kind in struct._fields_) == wanted
    assert ctypes.sizeof(struct) == layout.size


def test_every_argument_is_in_its_place(launches):
    spec = NormSpec.parse(SPECS["residual"].replace("weight=bf16", "weight=bf16 bias=bf16"))
    given = inputs(spec, 6, 5, 1024, weight_rows=5)
    x = torch.zeros(6, 48, 1024).bfloat16()[:, 8:13]
    residual = torch.zeros(5, 6, 1024).bfloat16().transpose(0, 1)
    out, total, row = call(dataclasses.replace(given, x=x, residual=residual), spec)
    (launch,) = launches
    found = {name: getattr(launch.args, name) for name, _ in launch.args._fields_}
    pointers = {"x": x, "residual": residual, "weight": given.weight, "bias": given.bias}
    pointers |= {"out": out, "sum": total, "row": row}
    assert {name: found.pop(name) for name in pointers} == {
        name: tensor.data_ptr() for name, tensor in pointers.items()
    }
    assert math.isclose(found.pop("eps"), 1e-6, rel_tol=1e-7)
    assert found == {
        "rows": 30,
        "inner": 5,
        "x_outer": 48 * 1024,
        "x_step": 1024,
        "residual_outer": 1024,
        "residual_step": 6 * 1024,
        "weight_rows": 5,
        "bias_rows": 5,
        "wide": 1,
    }
    assert (launch.stream, launch.overlaps) == (77, True)
    assert (out.shape, total.shape, row.shape) == ((6, 5, 1024), (6, 5, 1024), (6, 5, 1))


@pytest.mark.parametrize("dense", [True, False])
def test_over_writes_to_the_inputs_if_they_are_contiguous(launches, monkeypatch, dense):
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    monkeypatch.setattr(cuda_row, "is_current", lambda device: True)
    spec = NormSpec.parse(SPECS["residual"] + " outputs=out,sum")
    monkeypatch.setattr(cuda_row, "row_kernel", lambda *_: row_kernel(spec, 128))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    given = inputs(spec, 6, 128)
    x = given.x if dense else torch.zeros(6, 256, dtype=given.x.dtype)[:, :128]
    cuda_row.KERNEL.overwriting(spec)(x, given.residual, given.weight, None, 1e-6)
    (launch,) = launches
    same = launch.args.out == launch.args.x, launch.args.sum == launch.args.residual
    assert same == (dense, dense)


@pytest.mark.parametrize(
    ("rows", "hidden"), [(1, 4096), (37, 128), (5000, 128), (5000, 4096), (7, 5120)]
)
def test_grid_covers_the_rows(launches, rows, hidden):
    spec = ALL["llama"]
    call(inputs(spec, rows, hidden), spec)
    (launch,) = launches
    assert launch.kernel == scheduled("llama", hidden, rows)
    assert launch.block == (launch.kernel.threads * launch.kernel.rows, 1, 1)
    assert launch.grid == (math.ceil(rows / launch.kernel.rows) * launch.kernel.blocks, 1, 1)


@pytest.mark.parametrize(("answers", "blocks"), [((0, 16), 5), ((0, 0), 1), ((1, 0), 5), (None, 5)])
def test_a_device_without_room_for_a_cluster_runs_a_row_in_one_block(
    launches, monkeypatch, answers, blocks
):
    """answers: the driver's status and the number of clusters; None: it has no such call."""
    asked = []

    def ask(count, kernel, config) -> int:
        found = ctypes.cast(config, ctypes.POINTER(cuda_driver.Config)).contents
        asked.append((found.grid_x, found.block_x))
        status, clusters = answers
        ctypes.cast(count, ctypes.POINTER(ctypes.c_int))[0] = clusters
        return status

    monkeypatch.setattr(cuda_driver, "clusters_fit", CLUSTERS_FIT)
    driver = type("Driver", (), {"cuOccupancyMaxActiveClusters": staticmethod(ask)})
    monkeypatch.setattr(cuda_driver, "driver", lambda: driver if answers else object())
    kernel, given = row_kernel(ALL["llama"], 5120), inputs(ALL["llama"], 7, 5120)
    for _ in range(2):
        kernel(given.x, None, given.weight, None, 1e-6)
    assert asked == ([(5, 128)] if answers else [])  # once per layout
    assert [(launch.kernel.blocks, launch.grid[0]) for launch in launches] == [
        (blocks, 7 * blocks)
    ] * 2


def test_no_rows_no_launch(launches):
    (out,) = call(inputs(ALL["llama"], 0, 128), ALL["llama"])
    assert out.shape == (0, 128)
    assert not launches


def test_a_thread_without_a_context_gets_one(launches, monkeypatch):
    launch, asked = cuda_driver.launcher(), []

    def without(*arguments):
        return launch(*arguments) if asked else cuda_driver.INVALID_CONTEXT

    monkeypatch.setattr(cuda_driver, "launcher", lambda: without)
    monkeypatch.setattr(cuda_driver, "make_current", asked.append)
    call(inputs(ALL["llama"], 3, 128), ALL["llama"])
    assert (asked, len(launches)) == ([0], 1)


def _aligned(given: Inputs, name: str, offset: int) -> Inputs:
    """`given` with one tensor `offset` elements behind a multiple of 64 bytes."""
    old = getattr(given, name)
    space = torch.zeros(old.numel() + 64, dtype=old.dtype)
    first = (-space.data_ptr() % 64) // space.itemsize + offset
    return dataclasses.replace(given, **{name: space[first : first + old.numel()].view_as(old)})


@pytest.mark.parametrize("name", ["x", "residual", "weight"])
def test_wide_access_needs_all_tensors_aligned(launches, name):
    spec = ALL["residual"]
    given, kernel = inputs(spec, 3, 128), row_kernel(ALL["residual"], 128)
    for other in ("x", "residual", "weight"):
        given = _aligned(given, other, 0)
    wanted = {0: 1, 1: 0, 7: 0, 8: 1}
    for offset in (*wanted, *wanted):  # one plan, and its flag goes there and back
        moved = _aligned(given, name, offset)
        kernel(moved.x, moved.residual, moved.weight, None, 1e-6)
        assert launches[-1].args.wide == wanted[offset], offset
    assert len(kernel._plans) == 1


@pytest.mark.parametrize(("gap", "wide"), [(8, 1), (1, 0), (4, 0)])
def test_wide_access_needs_every_row_aligned(launches, gap, wide):
    given = _aligned(_aligned(inputs(ALL["llama"], 3, 128), "weight", 0), "x", 0)
    space = torch.zeros(3 * (128 + gap) + 64, dtype=torch.bfloat16)
    first = (-space.data_ptr() % 64) // 2
    x = space[first : first + 3 * (128 + gap)].view(3, -1)[:, :128]
    call(dataclasses.replace(given, x=x), ALL["llama"])
    assert launches[-1].args.wide == wide


def test_plans_are_kept_per_layout_and_kind(launches):
    spec = ALL["llama"]
    given, kernel = inputs(spec, 4, 128), row_kernel(spec, 128)
    for x in (given.x, given.x.clone(), given.x[:3], given.x.view(2, 2, 128), given.x.float()):
        kernel(x, None, given.weight, None, 1e-6)
    kernel(given.x, None, given.weight, None, 1e-5)
    kernel(given.x, None, given.weight.float(), None, 1e-6)
    assert len(launches) == 7
    assert len(kernel._plans) == 6


def test_wrong_tensors_are_named():
    spec = ALL["residual"]
    given = inputs(spec, 4, 128)
    tensors = [given.x, given.residual, given.weight]

    def fault(x, residual, weight, bias=None):
        with pytest.raises((TypeError, ValueError)) as error:
            cuda_call.check(spec, 128, "cuda:0", x, residual, weight, bias)
        return str(error.value)

    assert fault(*tensors) == "x is torch.bfloat16 on cpu, needs torch.bfloat16 on cuda:0"
    with pytest.raises(TypeError, match="x is on cpu, needs a CUDA device"):
        cuda_row.launch(spec, *tensors, None, 1e-6)


def test_driver_structures_have_the_layout_of_cuda_h(tmp_path):
    triton = pytest.importorskip("triton")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    if not (include / "cuda.h").exists():
        pytest.skip("Triton's wheel has no cuda.h here")
    names = {
        "grid_x": "gridDimX", "grid_y": "gridDimY", "grid_z": "gridDimZ", "block_x": "blockDimX",
        "block_y": "blockDimY", "block_z": "blockDimZ", "shared_bytes": "sharedMemBytes",
        "stream": "hStream", "attributes": "attrs", "attribute_count": "numAttrs",
    }  # fmt: skip
    config, attribute = cuda_driver.Config, cuda_driver.Attribute
    wanted = [f"sizeof(CUlaunchConfig) == {ctypes.sizeof(config)}"]
    wanted += [f"sizeof(CUlaunchAttribute) == {ctypes.sizeof(attribute)}"]
    wanted += [f"offsetof(CUlaunchAttribute, value) == {attribute.value.offset}"]
    wanted += [
        f"offsetof(CUlaunchConfig, {theirs}) == {getattr(config, ours).offset}"
        for ours, theirs in names.items()
    ]
    overlap = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
    wanted += [f"{overlap} == {cuda_driver._OVERLAP}"]
    lines = [f'static_assert({line}, "{line}");' for line in wanted]
    source = tmp_path / "layout.cpp"
    source.write_text("\n".join(["#include <cstddef>", "#include <cuda.h>", *lines, ""]))
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{include}", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- Where it does not run ----------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine with an H100 and its driver, as far as the kernel asks before it builds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(cuda_driver, "driver", lambda: None)


def refused(reason: str) -> None:
    assert cuda_row.KERNEL.unavailable() == reason
    assert cuda_row.KERNEL.prepare(NormSpec.parse(LLAMA), 64) == reason
    assert "\n" not in reason


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused("no NVIDIA GPU")


@pytest.mark.usefixtures("a_gpu")
def test_with_everything():
    assert cuda_row.KERNEL.unavailable() is None


@pytest.mark.usefixtures("a_gpu")
def test_on_an_amd_gpu(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    refused("no NVIDIA GPU")


@pytest.mark.usefixtures("a_gpu")
def test_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    refused("compute capability 7.5, needs 8.0")


@pytest.mark.usefixtures("a_gpu")
def test_without_a_driver(monkeypatch):
    def missing():
        raise BuildError("no CUDA driver (libcuda.so.1)")

    monkeypatch.setattr(cuda_driver, "driver", missing)
    refused("no CUDA driver (libcuda.so.1)")


@pytest.mark.usefixtures("a_gpu")
def test_without_nvrtc(monkeypatch):
    monkeypatch.setattr(cuda_build, "_packaged", list)
    monkeypatch.setattr(cuda_build, "_NAMES", ("libnvrtc-of-nobody.so",))
    monkeypatch.setattr(cuda_build, "_library", build_cache.Once())
    refused(
        "no NVRTC library (libnvrtc.so.12 or .13): a CUDA build of torch brings it, or"
        " pip install nvidia-cuda-nvrtc"
    )


def test_hidden_known_only_at_run_time():
    reason = "hidden is known only at run time"
    assert cuda_row.KERNEL.prepare(NormSpec.parse(LLAMA), None) == reason


# ---- Addresses of rows --------------------------------------------------------------------------


@st.composite
def strided(draw):
    """A shape, and the strides of one or two tensors of it: permuted, padded, expanded, sliced."""
    shape = [*draw(st.lists(st.integers(1, 4), max_size=4)), draw(st.integers(1, 5))]
    tensors = []
    for _ in range(draw(st.integers(1, 2))):
        order = list(range(len(shape) - 1))
        if draw(st.booleans()):
            order = draw(st.permutations(order))
        last_is_last = draw(st.integers(0, 5)) > 0
        order = [*order, len(shape) - 1] if last_is_last else [len(shape) - 1, *order]
        strides, step = [0] * len(shape), 1
        for dim in reversed(order):
            strides[dim] = 0 if draw(st.integers(0, 9)) == 0 else step
            step *= shape[dim] + draw(st.sampled_from((0, 0, 0, 2)))
        tensors.append(strides)
    return shape, tensors


def strides_left(shape, tensors) -> int:
    """Leading dims that no neighbour continues, of all tensors together."""
    dims = [dim for dim, size in enumerate(shape[:-1]) if size != 1]
    continued = sum(
        all(strides[a] == strides[b] * shape[b] for strides in tensors)
        for a, b in itertools.pairwise(dims)
    )
    return len(dims) - continued


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 0, 16), (0, 3, 0, 5, 16)])
def test_no_rows_have_an_address(shape):
    found = gpu_rows.address(shape, [gpu_rows.dense(shape)] * 2)
    assert found == gpu_rows.Rows(0, 1, (0, 0), (0, 0))


@given(strided())
def test_address_is_where_the_rows_are(case):
    shape, tensors = case
    found = gpu_rows.address(shape, tensors)
    last = all(strides[-1] == 1 or shape[-1] == 1 for strides in tensors)
    assert (found is not None) == (last and strides_left(shape, tensors) <= gpu_rows.LEADING)
    if found is None:
        return
    assert found.count == math.prod(shape[:-1])
    for tensor, (outer, step) in enumerate(zip(found.outer, found.step, strict=True)):
        base = torch.zeros(4096)
        view = base.as_strided(shape, tensors[tensor])
        rows = itertools.product(*map(range, shape[:-1]))
        for r, place in enumerate(rows):
            offset = (view[place].data_ptr() - base.data_ptr()) // base.itemsize
            assert (r // found.inner) * outer + (r % found.inner) * step == offset


@given(st.integers(1, 70_000))
def test_lanes_are_a_power_of_two_that_holds_the_row(hidden):
    lanes = gpu_rows.lanes(hidden)
    assert lanes & (lanes - 1) == 0
    assert 8 <= lanes <= 8192
    assert lanes >= min(hidden, 8192)
    assert lanes == 8 or lanes // 2 < hidden
