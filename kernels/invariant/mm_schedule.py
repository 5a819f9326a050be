"""Which schedule computes a product: tables of measured tiles, and a rule that picks from them.

A schedule changes no bit: a tile only has to be computed by instructions that add the same elements
of K at once. NVIDIA's `mma` and `wgmma` do (compared on an H200 for every tile below, and tested);
where that is not known, all tiles of a device have one shape, so that they use one instruction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Schedule(NamedTuple):
    """Tiles and how they are walked."""

    kind: str
    """walk: a program takes all chunks of a tile. split: one chunk, and a second kernel adds them.
    tma: as walk, through tensor descriptors, each multiprocessor `programs` that take turns."""
    block_m: int
    block_n: int
    block_k: int
    """In the tables below of 16-bit elements, half as many of 32 bits."""
    warps: int
    stages: int
    group: int = 8
    programs: int = 1


class Problem(NamedTuple):
    """What a schedule is picked by."""

    m: int
    n: int
    k: int
    batch: int
    chunk: int
    bits: int
    """Of an operand's element: 16 or 32."""
    out_bits: int
    exact: bool
    """True float32."""
    tma: bool
    """Whether descriptors can be made of the operands and the result."""
    full_bias: bool = False
    """A bias that is not the same for all rows."""

    @property
    def chunks(self) -> int:
        """How many sums are added."""
        return -(-self.k // self.chunk)


class Device(NamedTuple):
    """What a schedule is picked for."""

    family: str
    """nvidia or amd"""
    major: int
    processors: int
    shared: int
    """Most bytes of shared memory of a program."""

    @property
    def mixes_instructions(self) -> bool:
        """Whether tcgen05 computes large tiles and mma small ones: all have one size then."""
        return self.family == "nvidia" and self.major in (10, 11)


Menu = tuple[tuple[int, Schedule], ...]
"""(microseconds that a multiprocessor needs for a tile with K = 4096, schedule)."""

_HOPPER: Menu = (
    (12, Schedule("tma", 64, 32, 256, 4, 4)),
    (13, Schedule("tma", 64, 64, 128, 4, 5)),
    (16, Schedule("tma", 64, 128, 128, 4, 4)),
    (23, Schedule("tma", 128, 128, 64, 4, 6)),
    (44, Schedule("tma", 128, 256, 64, 8, 3)),
)
"""One chunk, 16 bits. Measured on an H200 with bfloat16; one wave of tiles."""

_POINTERS: Menu = (
    (14, Schedule("walk", 64, 32, 128, 4, 4)),
    (15, Schedule("walk", 64, 64, 128, 4, 4)),
    (20, Schedule("walk", 64, 128, 64, 4, 4)),
    (26, Schedule("walk", 128, 128, 64, 8, 4)),
)
"""Everything else. Measured like _HOPPER."""

_LEAST_STAGES = 3
"""A tile that leaves no room for them is not worth it."""
_FEW_ROWS = 16
MOST_ROWS_IN_PLACE = 4
"""True float32 with more rows is faster on a copy of b whose rows are contiguous."""
_HALF_A_TILE = 32
"""Up to that many rows pointers are faster: descriptors take long to fill a tile with zeros."""
_FINISH_US = 2.0
"""Least time of a second kernel."""
_FINISH_BYTES_US = 3e6
"""Bytes of sums, written and read again, that a microsecond takes."""


def pick(device: Device, problem: Problem) -> Schedule:
    """The schedule for a product of at least one element."""
    if device.family == "amd":
        found = _one_tile(device, problem, 64)
    elif problem.exact:
        found = _exact(device, problem)
    elif device.mixes_instructions:
        found = _one_tile(device, problem, 128)
    elif problem.m <= _FEW_ROWS:
        found = _few_rows(problem)
    else:
        found = _cheapest(device, problem, _HOPPER if _by_tma(device, problem) else _POINTERS)
    return _fitting(device, problem, found)


def _by_tma(device: Device, problem: Problem) -> bool:
    """With several chunks a tile through descriptors was slower than one through pointers."""
    fits = problem.tma and problem.chunks == 1 and problem.m > _HALF_A_TILE
    return device.major == 9 and fits


def _cheapest(device: Device, problem: Problem, menu: Menu) -> Schedule:
    choices = [
        choice
        for us, schedule in menu
        for choice in _choices(device, problem, us, schedule)
        if schedule.kind != "tma" or _fitting(device, problem, schedule).stages >= _LEAST_STAGES
    ]
    return min(choices)[1]


def _choices(
    device: Device, problem: Problem, us: int, schedule: Schedule
) -> Iterator[tuple[float, Schedule]]:
    """A menu's schedule, and the same with its chunks split, with the time each will take."""
    tiles = _tiles(problem, schedule.block_m, schedule.block_n)
    us_tile = us * problem.k / 4096
    yield -(-tiles // device.processors) * us_tile, schedule
    if problem.chunks > 1 and schedule.kind == "walk":
        waves = -(-tiles * problem.chunks // device.processors)
        moved = 8 * problem.batch * problem.m * problem.n * problem.chunks
        us_sums = _FINISH_US + moved / _FINISH_BYTES_US
        yield waves * us_tile / problem.chunks + us_sums, schedule._replace(kind="split")


def _few_rows(problem: Problem) -> Schedule:
    """Weights stream from memory: what counts is how many loads are under way."""
    if problem.chunks > 1:
        tiles = problem.batch * -(-problem.n // 16)
        kind = "split" if tiles * problem.chunks < 1024 else "walk"
        return Schedule(kind, 16, 16, 256, 2, 4)
    if problem.n * problem.batch <= 4224:
        return Schedule("walk", 16, 16, 256, 2, 6)
    if problem.n * problem.batch < 6144:
        return Schedule("walk", 16, 16, 128, 2, 6)
    return Schedule("walk", 16, 64, 128, 4, 6 if problem.n * problem.batch <= 8448 else 4)


def _exact(device: Device, problem: Problem) -> Schedule:
    """One multiply-add at a time in order of k, whatever the tile."""
    if problem.m <= MOST_ROWS_IN_PLACE:
        found = Schedule("walk", 1 if problem.m == 1 else 4, 64, 64, 2, 4)
    elif problem.m <= _FEW_ROWS:
        found = Schedule("walk", 16, 32, 64, 4, 3)
    else:
        found = Schedule("walk", 64, 64, 32, 4, 3)
    return _split_to_fill(device, problem, found)


def _one_tile(device: Device, problem: Problem, block: int) -> Schedule:
    found = Schedule("walk", block, block, 64, 4 if block == 64 else 8, 2)
    return _split_to_fill(device, problem, found)


def _split_to_fill(device: Device, problem: Problem, schedule: Schedule) -> Schedule:
    idle = _tiles(problem, schedule.block_m, schedule.block_n) < device.processors
    return schedule._replace(kind="split") if problem.chunks > 1 and idle else schedule


def _fitting(device: Device, problem: Problem, schedule: Schedule) -> Schedule:
    """With a block of K that chunks are a multiple of, and no more stages than memory holds."""
    block_k = schedule.block_k * 16 // problem.bits
    if problem.chunks > 1:
        while problem.chunk % block_k:
            block_k //= 2
    schedule = schedule._replace(block_k=block_k)
    while schedule.stages > 1 and _shared(problem, schedule) > device.shared:
        schedule = schedule._replace(stages=schedule.stages - 1)
    return schedule


def _tiles(problem: Problem, block_m: int, block_n: int) -> int:
    return problem.batch * -(-problem.m // block_m) * -(-problem.n // block_n)


def _shared(problem: Problem, schedule: Schedule) -> int:
    """Bytes of shared memory, as far as Triton lets one know: stages, and a tile to be stored."""
    _, block_m, block_n, block_k, _, stages, *_ = schedule
    used = stages * (block_m + block_n) * block_k * problem.bits // 8
    if schedule.kind != "tma":
        return used
    tile = block_m * block_n
    return used + tile * problem.out_bits // 8 + (4 * tile if problem.full_bias else 0) + 1024
