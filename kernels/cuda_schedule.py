"""How `cuda.row` spreads rows over threads: a choice of speed, no bit depends on it.

Every table is from sweeps on an H200 (hidden 64 to 65,536, 1 to 1,048,576 rows, hot and cold): what
is taken is on average 1 % slower than the best of up to 40 schedules of a point.
"""

from __future__ import annotations

import torch

from fxpass.kernels import cuda_source, gpu_rows
from fxpass.kernels.cuda_source import Schedule
from fxpass.spec import NormSpec

_SIZES = (
    (128, "alone"),
    (264, "pairs"),
    (396, "threes"),
    (640, "few"),
    (1024, "several"),
    (4096, "some"),
)
"""Rows up to, and their word. alone: each has a multiprocessor of its own (132 on an H200). pairs
to several: multiprocessors wait for rows. some: the grid is over so soon that the next kernel may
come in at once. More are many: multiprocessors wait for memory."""

_EACH: dict[tuple[str, str], tuple[tuple[int, int], ...]] = {
    ("alone", "light"): ((512, 1), (1024, 2)),
    ("pairs", "light"): ((512, 1), (896, 2), (1024, 1)),
    ("pairs", "heavy"): ((640, 1), (896, 2), (1024, 1)),
    ("threes", "light"): ((512, 1), (640, 2), (896, 3), (1024, 2)),
    ("threes", "float"): ((512, 1), (1024, 2)),
    ("threes", "heavy"): ((32, 1), (64, 2), (128, 4), (256, 2), (512, 1), (896, 2), (1024, 4)),
    ("few", "light"): ((512, 1), (768, 2), (1024, 4)),
    ("few", "float"): ((512, 1), (640, 2), (896, 3), (1024, 2)),
    ("few", "heavy"): ((32, 1), (64, 2), (128, 4), (256, 2), (512, 1), (896, 5), (1024, 4)),
    ("several", "light"): ((256, 1), (640, 2), (1024, 4)),
    ("several", "heavy"): ((32, 1), (64, 2), (128, 4), (256, 1), (1024, 2)),
    ("some", "light"): ((32, 1), (64, 2), (1024, 4)),
    ("some", "heavy"): ((32, 1), (64, 2), (128, 4), (512, 1), (1024, 2)),
    ("many", "light"): ((8, 1), (32, 2), (1024, 4)),
    ("many", "float"): ((8, 1), (64, 2), (896, 4), (1024, 2)),
    ("many", "heavy"): ((32, 1), (64, 2), (128, 4), (512, 1), (1024, 2)),
}
"""Units of 8 elements of a thread, by rows and kind (see `_kind`): (units of the row up to, units
of a thread). A kind without an entry has light's."""
_LONG: dict[tuple[str, str], tuple[int, bool]] = {
    ("alone", "light"): (512, True),
    ("alone", "float"): (1024, True),
    ("pairs", "float"): (1024, False),
    ("threes", "float"): (256, True),
    ("few", "light"): (256, True),
    ("alone", "heavy"): (1024, True),
    ("pairs", "heavy"): (256, False),
    ("threes", "heavy"): (256, False),
    ("few", "heavy"): (1024, True),
    ("many", "float"): (1024, False),
}
"""Threads of a row of several chunks, and whether the next kernel may come in at once."""

_CAPABILITY = (9, 0)
"""From which on several blocks can share a row."""
_SEGMENTS: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "heavy": (240, ((128, 256), (256, 512), (512, 768))),
    "light": (180, ((128, 384), (256, 384), (512, 896))),
}
"""Blocks at most, of all rows (more than a multiprocessor each, yet no second wave of them), and
(units of a segment, units of the rows that are longer than what gains by segments of that)."""
_MOST_BLOCKS = 8  # of a cluster on every GPU that has clusters


def schedule(spec: NormSpec, hidden: int, rows: int, capability: tuple[int, int]) -> Schedule:
    """The schedule for so many rows on a device of that compute capability."""
    units, kind = -(-hidden // gpu_rows.VECTOR), _kind(spec)
    if capability >= _CAPABILITY:
        for rows_up_to, segment, blocks in _clusters(kind, units):
            if rows <= rows_up_to:
                return Schedule(segment, 1, eager=True, blocks=blocks, segment=segment)
    size = next((word for most, word in _SIZES if rows <= most), "many")
    if hidden > gpu_rows.MOST_LANES:
        threads, eager = _LONG.get((size, kind)) or (512 if kind != "heavy" else 1024, False)
        return Schedule(threads, 1, eager=eager)
    table = _EACH.get((size, kind)) or _EACH[size, "light"]
    each = next(each for most, each in table if units <= most)
    threads = _threads(-(-units // each))
    # Four long rows of a multiprocessor leave no room for blocks of the next kernel.
    full = size in ("few", "several") and kind == "light" and units > 896
    eager = size != "many" and not full
    return Schedule(threads, max(1, _block(size, units, threads) // threads), eager=eager)


def changes(hidden: int) -> list[int]:
    """The numbers of rows at which another schedule may begin, on any device."""
    units = -(-hidden // gpu_rows.VECTOR)
    ends = {end for kind in _SEGMENTS for end, *_ in _clusters(kind, units)}
    return sorted({1} | {end + 1 for end in ends | {most for most, _ in _SIZES}})


def _clusters(kind: str, units: int) -> list[tuple[int, int, int]]:
    """(rows up to, units of a segment, blocks of a row), most blocks first."""
    most, every = _SEGMENTS.get(kind) or _SEGMENTS["light"]
    lanes = min(units, gpu_rows.MOST_LANES // gpu_rows.VECTOR)
    found = [(segment, -(-lanes // segment)) for segment, above in every if units > above]
    return [
        (most // blocks, segment, blocks) for segment, blocks in found if blocks <= _MOST_BLOCKS
    ]


def _kind(spec: NormSpec) -> str:
    """How much a thread does with a unit.

    heavy: it reads more than one 16-bit unit at a place (a residual, or float32). float: the weight
    is multiplied in float32. light: it is a 16-bit product, two elements at a time.
    """
    if spec.residual is not None or spec.normed == torch.float32:
        return "heavy"
    return "float" if cuda_source.before_product(spec) is None else "light"


def _block(size: str, units: int, threads: int) -> int:
    """Threads of a block that takes several rows."""
    if size in ("some", "many") and threads <= 32:
        return 512 if size == "some" or 8 < units <= 64 else 256
    if size == "many":
        return 512 if threads == 256 else 256
    return 128


def _threads(count: int) -> int:
    """At least `count`: a power of two below 32, a multiple of 32 above."""
    return 1 << (count - 1).bit_length() if count <= 32 else -(-count // 32) * 32
