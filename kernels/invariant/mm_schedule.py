"""Which schedule computes a product: a table per device, and a rule for everything else.

A schedule changes no bit on a device of one `family`: every tile of it is computed by instructions
that add the same elements of K at once. `pick` knows that NVIDIA's `mma` and `wgmma` agree
(measured on an H200); where it does not know, all its tiles use one instruction.
"""

from __future__ import annotations

from typing import NamedTuple


class Schedule(NamedTuple):
    """Tiles and how they are walked."""

    kind: str
    """walk: a program takes all chunks of a tile. split: one chunk, and a second kernel adds them.
    tma: as walk, through tensor descriptors, `programs` to a multiprocessor."""
    block_m: int
    block_n: int
    block_k: int
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
    """Of an element: 16 or 32."""
    exact: bool
    """True float32."""
    tma: bool
    """Whether descriptors can be made of the operands and the result."""

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


def pick(device: Device, problem: Problem) -> Schedule:
    """The schedule for a product of at least one element."""
    if problem.exact:
        return _exact(problem)
    if device.family == "amd":
        return _one_instruction(device, problem, 64)
    if device.major >= 10:
        return _one_instruction(device, problem, 128 if device.major < 12 else 64)
    if problem.bits == 32:
        return _small(device, problem, 32)
    if device.major == 9 and problem.tma and problem.m >= 512:
        return _large(problem)
    return _small(device, problem, 64)


def _exact(problem: Problem) -> Schedule:
    """One multiply-add at a time, in order of k, whatever the tile."""
    if problem.m <= 16:
        return Schedule(_split(problem, 16, 32, 264), 16, 32, 32, 4, 3)
    return Schedule(_split(problem, 64, 64, 264), 64, 64, 32, 8, 2)


def _one_instruction(device: Device, problem: Problem, block: int) -> Schedule:
    """Tiles of one shape: nothing is known about whether other instructions add in this order."""
    block_k = 64 if problem.bits == 16 else 32
    kind = _split(problem, block, block, device.processors)
    return Schedule(kind, block, block, block_k, 4 if block == 64 else 8, 2)


def _large(problem: Problem) -> Schedule:
    if problem.chunks == 1:
        return Schedule("tma", 128, 256, 64, 8, 4)
    return Schedule("tma", 128, 128, 64, 8, 5)


def _small(device: Device, problem: Problem, block_k: int) -> Schedule:
    """Few rows: weights stream from memory. More: tiles, split over chunks to fill the device."""
    if problem.m <= 16:
        return Schedule("walk", 16, 32, 2 * block_k, 4, 4)
    if problem.m <= 64:
        block_m = 32 if problem.m <= 32 else 64
        block_n = 128 if problem.chunks > 1 else 64
        return Schedule(
            _split(problem, block_m, block_n, device.processors), block_m, block_n, block_k, 4, 4
        )
    return Schedule(_split(problem, 128, 128, device.processors), 128, 128, block_k, 8, 3)


def _split(problem: Problem, block_m: int, block_n: int, processors: int) -> str:
    """Whether tiles alone would leave multiprocessors idle."""
    tiles = problem.batch * -(-problem.m // block_m) * -(-problem.n // block_n)
    return "split" if problem.chunks > 1 and tiles < processors else "walk"
