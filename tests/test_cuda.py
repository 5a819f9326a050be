"""`cuda.row` without a GPU: it compiles, its schedules are legal, and what a launch would pass."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cuda_cases import ALL, CAPABILITIES, scheduled

from fxpass.kernels import (
    cuda_build,
    cuda_schedule,
    cuda_source,
    gpu_rows,
)
from fxpass.kernels.build_cache import BuildError
from fxpass.kernels.cuda_source import AT_ONCE, LOADED, STORED, SUMMED, Schedule

ALONE, SHARED, FEW, MANY = 1, 64, 512, 1 << 20
"""Numbers of rows, each with schedules of its own."""
NUMBERS = (ALONE, SHARED, FEW, MANY)
HIDDEN = (1, 31, 128, 257, 1000, 4096, 5120, 16_384, 65_536)
ARCHITECTURES = tuple(CAPABILITIES)
MAIN = ("llama", "nn_rms_norm", "residual")


# ---- Compilation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nvrtc() -> None:
    try:
        cuda_build.nvrtc()
    except BuildError as error:
        pytest.skip(str(error))


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


def wide_path(cubin: bytes, folder: Path) -> str:
    """The instructions for rows at multiples of 16 bytes, from the wait on: the first path."""
    code = dump("-sass", cubin, folder).partition("ACQBULK")[2]
    assert code.index("LDG.E.128") < code.index("LDG.E.U16")
    return code.rpartition("STG.E.128")[0]


LONG = (9216, 12_288, 14_336, 16_384, 18_432, 20_480, 24_576, 32_768)
UNALIGNED_BYTES = 256
"""That a thread may keep elsewhere for rows that are not at multiples of 16 bytes."""


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("name", [*MAIN, "llama_f16", "one_over_sqrt"])
def test_registers_that_a_schedule_names_or_needs_suffice(name, tmp_path):
    spec = ALL[name]
    every = {
        (hidden, dataclasses.replace(scheduled(name, hidden, rows), last=False))
        for hidden in (896, 1792, 2304, *range(512, 8193, 512), 8200, *LONG)
        for rows in cuda_schedule.changes(spec, hidden)
    }
    few = [one for one in every if one[1].registers or not one[1].again]
    assert few
    folders = [tmp_path / str(number) for number in range(len(few))]

    def looked_at(one: tuple[int, Schedule], folder: Path) -> tuple[str, str]:
        folder.mkdir()
        cubin = cuda_build._compile(cuda_source.source(spec, *one), "sm_90")
        return wide_path(cubin, folder), dump("--dump-resource-usage", cubin, folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = pool.map(looked_at, few, folders)
        for (hidden, schedule), (path, text) in zip(few, made, strict=True):
            assert not re.search(r"\b(STL|LDL)\b", path), (hidden, schedule)
            (stack, local) = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", text).groups()
            assert (int(stack) <= UNALIGNED_BYTES, local) == (True, "0"), (hidden, schedule, stack)
            registers = int(re.search(r"REG:(\d+)", text)[1])
            assert registers <= (schedule.registers or registers), schedule


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
    for name in ("cuda_pairs.h", "cuda_lanes.h", "cuda_units.h", "cuda_row.h"):
        text = text.replace(cuda_source.header(name), f"... {name}")
    golden(text)


# ---- Schedules ----------------------------------------------------------------------------------

KINDS = ("llama", "nn_rms_norm", "llama_f32", "residual", "residual_f32_sum")


def units_of(hidden: int) -> int:
    """UNITS of cuda_lanes.h."""
    lanes = gpu_rows.lanes(hidden)
    return lanes // 8 if hidden > lanes else -(-hidden // 8)


def mine_of(units: int, schedule: Schedule) -> int:
    """MINE of cuda_lanes.h."""
    segment = schedule.segment if schedule.blocks > 1 else units
    return -(-segment // schedule.threads)


def spread_of(units: int, schedule: Schedule) -> int:
    """SPREAD of cuda_lanes.h."""
    return 1 << (mine_of(units, schedule) - 1).bit_length()


def partial_sums(units: int, schedule: Schedule) -> int:
    """PARTIALS of cuda_lanes.h."""
    return schedule.blocks * mine_of(units, schedule) * max(1, schedule.threads // 32)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", KINDS)
def test_every_schedule_is_legal(name, arch):
    seen = set()
    for hidden in range(1, 65_537):
        units = units_of(hidden)
        if (units, hidden > gpu_rows.MOST_LANES) in seen:
            continue
        seen.add((units, hidden > gpu_rows.MOST_LANES))
        for rows in cuda_schedule.changes(ALL[name], hidden):
            schedule = scheduled(name, hidden, rows, arch)
            threads, block = schedule.threads, schedule.threads * schedule.rows
            whole_warps = threads % 32 == 0
            assert whole_warps or (threads < 32 and threads & (threads - 1) == 0), (hidden, rows)
            assert block <= 1024
            assert block % 32 == 0  # a shuffle names all lanes of its warp
            assert partial_sums(units, schedule) <= 32, (hidden, rows)
            spread = spread_of(units, schedule)
            assert spread <= min(threads, 32), (hidden, rows)
            assert schedule.blocks * spread <= 32, (hidden, rows)
            if schedule.blocks == 1:
                continue
            assert arch != "sm_80"
            assert schedule.blocks <= 8  # more are for some GPUs only
            # A subtree each, none without a unit.
            assert schedule.segment & (schedule.segment - 1) == 0
            assert (schedule.segment % threads, schedule.rows) == (0, 1)
            assert (schedule.blocks - 1) * schedule.segment < units
            assert units <= schedule.blocks * schedule.segment


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("hidden", [64, 128, 1000, 2048, 2056, 5120, 8192, 16_384, 65_536])
def test_all_schedules_are_built_before_a_launch(name, hidden):
    changes = cuda_schedule.changes(ALL[name], hidden)
    around = {*changes, *(change - 1 for change in changes[1:]), changes[-1] + 1}
    for rows in {*range(1, 5000), *around}:
        begun = max(change for change in changes if change <= rows)
        assert scheduled(name, hidden, rows) == scheduled(name, hidden, begun), rows


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("hidden", [512, 2048, 3072, 6144, 8192, 16_384])
def test_the_next_kernel_comes_in_before_the_sum_only_where_its_blocks_spread_evenly(name, hidden):
    for rows in range(1, 5000):
        schedule = scheduled(name, hidden, rows)
        if schedule.release in (AT_ONCE, LOADED):
            blocks = -(-rows // schedule.rows) * schedule.blocks
            each = -(-blocks // 132)
            room = cuda_source.room(ALL[name], hidden, schedule)
            assert each >= room or 2 * each <= room, rows


def test_rows_that_leave_room_for_half_a_grid_wait_for_the_sum():
    # 384 threads of 32 registers: five blocks to a multiprocessor, three of them rows.
    assert scheduled("nn_rms_norm", 6144, 384).release == SUMMED  # at once: 1.4 times as long
    assert scheduled("residual", 2048, 512).release == LOADED  # summed: 1.2 times as long


@pytest.mark.parametrize(
    ("name", "row", "least"),
    [("llama", 4, 128), ("nn_rms_norm", 4, 128), ("residual", 8, 64), ("llama_f32", 8, 64)],
)
def test_what_is_far_larger_than_the_l2_is_evicted_last(name, row, least):
    rows = -(-least * 1_000_000 // (row * 4096))
    assert not scheduled(name, 4096, rows - 1).last
    assert scheduled(name, 4096, rows).last
    assert not scheduled(name, 4096, rows, "sm_80").last
    assert not scheduled(name, 4096, rows, "sm_100").last


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize(
    ("release", "wanted"),
    [
        (AT_ONCE, ["PREEXIT", "LDG.E.128", "BAR.SYNC", "STG.E.128"]),
        (LOADED, ["LDG.E.128", "PREEXIT", "BAR.SYNC", "STG.E.128"]),
        (SUMMED, ["BAR.SYNC", "PREEXIT", "STG.E.128"]),
        (STORED, ["BAR.SYNC", "STG.E.128", "PREEXIT"]),
    ],
)
def test_the_next_kernel_is_let_in_when_the_schedule_says(release, wanted, tmp_path):
    text = cuda_source.source(ALL["llama"], 4096, Schedule(256, 1, release))
    code = dump("-sass", cuda_build._compile(text, "sm_90"), tmp_path).partition("ACQBULK")[2]
    assert sorted(wanted, key=code.index) == wanted


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("name", ["llama", "nn_rms_norm", "residual"])
def test_a_weight_loaded_with_x_does_not_wait_for_it(name, tmp_path):
    # The assembler puts its load behind the squares where nothing keeps it from that.
    text = cuda_source.source(ALL[name], 4096, Schedule(256, 1, LOADED))
    code = wide_path(cuda_build._compile(text, "sm_90"), tmp_path)
    before_arithmetic = re.split("FMUL|FADD", code)[0]
    assert before_arithmetic.count("LDG.E.128") == (6 if name == "residual" else 4)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("again", [False, True])
def test_elements_are_widened_once_where_the_schedule_says(again, tmp_path):
    text = cuda_source.source(ALL["llama"], 4096, Schedule(256, 1, again=again))
    code = wide_path(cuda_build._compile(text, "sm_90"), tmp_path)
    halves = code.count("0xffff0000,")  # masks: one for two elements of each of two units
    assert halves == (16 if again else 8)


@pytest.mark.usefixtures("nvrtc")
@pytest.mark.parametrize("last", [False, True])
def test_no_load_waits_for_what_another_brings(last, tmp_path):
    # The policy of a load made in its condition parted units that not every thread has from the
    # others, and 16,384 rows took 1.17 times as long.
    spread = Schedule(192, 1, last=last)
    text = cuda_source.source(ALL["nn_rms_norm"], 4096, spread)
    code = dump("-sass", cuda_build._compile(text, "sm_90"), tmp_path)
    before_any_use = re.split("SHFL|BSSY", code.partition("ACQBULK")[2])[0]
    assert before_any_use.count("LDG.E.128") == 6  # three units and their weights


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
    text = cuda_source.source(ALL["llama"], 64, Schedule(4, 8, weight=1))
    cuda_build._compile(text, "sm_90")
    text = cuda_source.source(ALL["llama"], 64, Schedule(1, 32))
    with pytest.raises(BuildError, match="a value for every thread at most"):
        cuda_build._compile(text, "sm_90")
