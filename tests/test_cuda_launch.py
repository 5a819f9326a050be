"""`cuda.row` without a GPU: what a launch would pass, and where it does not run."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from cuda_cases import ALL, scheduled
from hypothesis import strategies
from kernel_cases import LLAMA, SPECS, Inputs, inputs

from fxpass.kernels import (
    build_cache,
    cuda_build,
    cuda_call,
    cuda_driver,
    cuda_launch,
    cuda_row,
    cuda_schedule,
    cuda_source,
    gpu_call,
)
from fxpass.kernels.build_cache import BuildError
from fxpass.kernels.cuda_source import Schedule
from fxpass.spec import NormSpec

CLUSTERS_FIT = cuda_driver.clusters_fit
LAST_ROW = gpu_call.ROWS_MOST - 1


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
    fifth = {"factor": -(-(2**34) // 5), "shift": 2}
    assert found == {
        "rows": 30,
        "x_step": 1024,
        "x_skip": 43 * 1024,
        "residual_step": 6 * 1024,
        "residual_skip": 1024 - 30 * 1024,
        "inner": 5,
        "weight_rows": 5,
        "bias_rows": 5,
        **{f"{what}_{of}": n for what in ("inner", "weight", "bias") for of, n in fifth.items()},
        "wide": 1,
    }
    assert (launch.stream, launch.overlaps) == (77, True)
    assert (out.shape, total.shape, row.shape) == ((6, 5, 1024), (6, 5, 1024), (6, 5, 1))


@pytest.mark.parametrize(
    "view",
    [
        lambda wide: wide[:, 0, :128],
        lambda wide: wide[:, 3:4, 8:136],
        lambda wide: wide[:, 2:5, :128],
        lambda wide: wide.transpose(0, 1)[1:4, :, :128],
        lambda wide: wide[:1, :, :128].expand(4, -1, -1),
    ],
)
def test_every_row_starts_where_the_arguments_say(launches, view):
    spec = ALL["residual"]
    x, other = (view(torch.zeros(7, 6, size).bfloat16()) for size in (136, 200))
    call(Inputs(x, other, torch.ones(128).bfloat16(), None), spec)
    (launch,) = launches
    args = launch.args
    assert args.rows == x[..., 0].numel()
    for tensor, step, skip in (
        (x, args.x_step, args.x_skip),
        (other, args.residual_step, args.residual_skip),
    ):
        rows = (tensor[index] for index in itertools.product(*map(range, tensor.shape[:-1])))
        for r, row in enumerate(rows):
            start = r * step + ((r * args.inner_factor >> 32) >> args.inner_shift) * skip
            assert row.storage_offset() - tensor.storage_offset() == start


@hypothesis.given(
    n=strategies.integers(2, 2**33),
    r=strategies.integers(0, LAST_ROW),
    times=strategies.integers(0, LAST_ROW),
)
@hypothesis.example(n=2, r=LAST_ROW, times=1)
@hypothesis.example(n=2**31 - 2, r=LAST_ROW, times=1)
@hypothesis.example(n=7, r=LAST_ROW, times=306_783_378)
def test_a_divisor_divides_the_number_of_every_row(n: int, r: int, times: int) -> None:
    by, factor, shift = cuda_call.divisor(n)
    assert factor < 2**32
    assert shift < 32
    near = [row for row in (n * times - 1, n * times) if 0 <= row <= LAST_ROW]
    for row in (r, *near):
        assert row * factor < 2**64
        assert row - ((row * factor >> 32) >> shift) * by == row % n


def test_one_divides_nothing():
    assert cuda_call.divisor(1) == (1, 0, 0)


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


def test_such_a_device_has_all_kernels_before_a_launch(launches, monkeypatch):
    """What is chosen there is not in the list for GPUs of its generation."""
    monkeypatch.setattr(cuda_driver, "clusters_fit", lambda kernel, config: False)
    compiled = []
    monkeypatch.setattr(cuda_call.RowKernel, "_cubin", lambda self, one: compiled.append(one))
    spec = ALL["llama"]
    kernel = row_kernel(spec, 8192)
    kernel.prepare(cuda_schedule.changes(spec, 8192))
    for rows in range(1, 140):
        given = inputs(spec, rows, 8192)
        kernel(given.x, None, given.weight, None, 1e-6)
        assert launches[-1].kernel.blocks == 1
        assert launches[-1].kernel in compiled, rows


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
    refused("architecture sm_75, needs sm_80")


@pytest.mark.usefixtures("a_gpu")
def test_without_a_driver(monkeypatch):
    def missing():
        raise BuildError("no CUDA driver (libcuda.so.1)")

    monkeypatch.setattr(cuda_driver, "driver", missing)
    refused("no CUDA driver (libcuda.so.1)")


def test_nvrtc_is_found_wherever_the_environment_lies(monkeypatch, tmp_path):
    folder = tmp_path / "alt-builtins" / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    names = ("libnvrtc.so.13", "libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.0")
    for name in names:
        (folder / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "alt-builtins")])
    assert cuda_build._packaged() == [str(folder / names[0])]


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
