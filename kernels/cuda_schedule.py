"""How `cuda.row` spreads rows over threads: a choice of speed, no bit depends on it.

Every table is from sweeps on an H200 (hidden 64 to 65,536, 1 to 1,048,576 rows, hot and cold): what
is taken is on average 1 % slower than the best of up to 40 schedules of a point.
"""

from __future__ import annotations

import torch

from fxpass.kernels import cuda_source, gpu_rows
from fxpass.kernels.cuda_source import Schedule
from fxpass.spec import NormSpec

_SIZES = ((128, "alone"), (256, "pairs"), (512, "few"), (1024, "several"), (4096, "some"))
"""Rows up to, and their word. alone: each has a multiprocessor of its own (132 on an H200). pairs
to several: multiprocessors wait for rows. some: the grid is over so soon that the next kernel may
come in at once. More are many: multiprocessors wait for memory."""

_EACH: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {
    ("alone", "light"): ((512, 1), (1024, 2)),
    ("alone", "heavy"): ((512, 1), (1024, 2)),
    ("pairs", "light"): ((512, 1), (896, 2), (1024, 1)),
    ("pairs", "heavy"): ((640, 1), (896, 2), (1024, 1)),
    ("few", "light"): ((512, 1), (640, 2), (1024, 4)),
    ("few", "float"): ((512, 1), (1024, 2)),
    ("few", "heavy"): ((32, 1), (64, 2), (128, 4), (256, 2), (512, 1), (896, 2), (1024, 4)),
    ("several", "light"): ((256, 1), (640, 2), (1024, 4)),
    ("several", "heavy"): ((32, 1), (64, 2), (128, 4), (256, 1), (1024, 2)),
    ("some", "light"): ((32, 1), (64, 2), (1024, 4)),
    ("some", "heavy"): ((32, 1), (64, 2), (128, 4), (512, 1), (1024, 2)),
    ("many", "light"): ((8, 1), (32, 2), (1024, 4)),
    ("many", "float"): ((8, 1), (32, 2), (896, 4), (1024, 2)),
    ("many", "heavy"): ((32, 1), (64, 2), (128, 4), (512, 1), (1024, 2)),
}
"""Units of 8 elements of a thread, by rows and kind (see `_kind`): (units of the row up to, units
of a thread)."""

_CLUSTERS = (9, 0)
"""Compute capability from which several blocks can share a row."""
_SEGMENTS = (128, 256, 512)
"""Units of one of them."""
_MOST_BLOCKS = 8  # of a cluster on every GPU that has clusters
_WORTH_A_CLUSTER = 256
"""Units. One block adds up a shorter row before the blocks of a cluster have met."""
_AT_ONCE = 240
"""Blocks: more than a multiprocessor each, yet no second wave of them."""


def schedule(spec: NormSpec, hidden: int, rows: int, capability: tuple[int, int]) -> Schedule:
    """The schedule for so many rows on a device of that compute capability."""
    units = -(-hidden // gpu_rows.VECTOR)
    for segment, blocks in _clusters(units, capability):
        if rows * blocks <= _AT_ONCE:
            return Schedule(segment, 1, eager=True, blocks=blocks, segment=segment)
    kind = _kind(spec)
    size = next((word for most, word in _SIZES if rows <= most), "many")
    if hidden > gpu_rows.MOST_LANES:
        return _several_chunks(size, kind)
    each = next(each for most, each in _each(size, kind) if units <= most)
    threads = _threads(-(-units // each))
    # Blocks of the next kernel in the way of many that read memory only once they have one.
    eager = size != "many" and not (size in ("few", "several") and kind != "heavy" and units > 896)
    return Schedule(threads, max(1, _block(size, kind, units, threads) // threads), eager=eager)


def changes(hidden: int) -> list[int]:
    """The numbers of rows at which another schedule may begin."""
    every = _clusters(-(-hidden // gpu_rows.VECTOR), _CLUSTERS)
    ends = [_AT_ONCE // blocks for _, blocks in every] + [most for most, _ in _SIZES]
    return sorted({1, *(end + 1 for end in ends)})


def _clusters(units: int, capability: tuple[int, int]) -> list[tuple[int, int]]:
    """(units of a segment, blocks of a row), most blocks first."""
    if capability < _CLUSTERS or units <= _WORTH_A_CLUSTER:
        return []
    lanes = min(units, gpu_rows.MOST_LANES // gpu_rows.VECTOR)
    every = [(segment, -(-lanes // segment)) for segment in _SEGMENTS]
    return [(segment, blocks) for segment, blocks in every if 1 < blocks <= _MOST_BLOCKS]


def _kind(spec: NormSpec) -> str:
    """How much a thread does with a unit.

    heavy: it reads more than one 16-bit unit at a place (a residual, or float32). float: the weight
    is multiplied in float32. light: it is a 16-bit product, two elements at a time.
    """
    if spec.residual is not None or spec.normed == torch.float32:
        return "heavy"
    return "float" if cuda_source.before_product(spec) is None else "light"


def _each(size: str, kind: str) -> tuple[tuple[int, int], ...]:
    return _EACH.get((size, kind)) or _EACH[size, "light"]


def _several_chunks(size: str, kind: str) -> Schedule:
    if kind != "heavy":
        return Schedule(512, 1, eager=size == "alone")
    if size in ("pairs", "few"):
        return Schedule(256, 1)
    return Schedule(1024, 1, eager=size in ("alone", "several"))


def _block(size: str, kind: str, units: int, threads: int) -> int:
    """Threads of a block that takes several rows."""
    if size not in ("some", "many"):
        return 128
    if threads <= 32:
        return 256 if size == "some" or kind == "heavy" or units <= 8 else 512
    if size == "some":
        return 128
    return 512 if threads == 256 else 256


def _threads(count: int) -> int:
    """At least `count`: a power of two below 32, a multiple of 32 above."""
    return 1 << (count - 1).bit_length() if count <= 32 else -(-count // 32) * 32
