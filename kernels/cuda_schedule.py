"""How `cuda.row` spreads rows over threads: a choice of speed, no bit depends on it.

Every table is from sweeps on an H200 (hidden 64 to 16,384, 1 to 32,768 rows, hot and cold): what is
taken is on average 1 % slower than the best of up to 40 schedules of a point.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fxpass.kernels import cuda_source, gpu_rows
from fxpass.kernels.cuda_source import Schedule
from fxpass.spec import NormSpec

_SIZES = (
    (132, "alone"),
    (264, "pairs"),
    (396, "threes"),
    (640, "few"),
    (1024, "several"),
    (4096, "some"),
)
"""Rows up to, and their word. alone: each has a multiprocessor of its own (132 on an H200). pairs
to several: multiprocessors wait for rows. some: the grid is over so soon that the next kernel may
come in at once. More are many: multiprocessors wait for memory."""


class Threads(NamedTuple):
    """Of rows that one block takes whole."""

    units: int
    """Of 8 elements, a row's: this entry is for rows up to that long."""
    each: int
    """Units of a thread."""
    block: int
    """Threads of a block that takes several rows; one of a longer row has more."""
    weight: int
    """When it is loaded (`Schedule.weight`)."""


_WHOLE: dict[tuple[str, str], tuple[Threads, ...]] = {
    ("alone", "light"): (
        Threads(64, 1, 128, 0),
        Threads(128, 2, 64, 0),
        Threads(256, 1, 128, 0),
        Threads(512, 1, 128, 1),
        Threads(896, 2, 128, 1),
        Threads(1024, 2, 128, 2),
    ),
    ("alone", "heavy"): (
        Threads(640, 1, 128, 1),
        Threads(896, 2, 128, 1),
        Threads(1024, 2, 128, 2),
    ),
    ("pairs", "light"): (
        Threads(64, 1, 128, 0),
        Threads(128, 2, 128, 0),
        Threads(256, 1, 128, 0),
        Threads(512, 1, 128, 1),
        Threads(896, 2, 128, 1),
        Threads(1024, 2, 128, 2),
    ),
    ("pairs", "heavy"): (
        Threads(640, 1, 128, 1),
        Threads(896, 2, 128, 1),
        Threads(1024, 1, 128, 2),
    ),
    ("threes", "light"): (
        Threads(64, 1, 128, 0),
        Threads(256, 1, 128, 2),
        Threads(512, 2, 128, 1),
        Threads(640, 1, 128, 1),
        Threads(896, 2, 128, 1),
        Threads(1024, 2, 128, 2),
    ),
    ("threes", "float"): (
        Threads(64, 1, 128, 0),
        Threads(256, 1, 128, 2),
        Threads(512, 2, 128, 1),
        Threads(640, 1, 128, 1),
        Threads(896, 2, 128, 1),
        Threads(1024, 4, 128, 1),
    ),
    ("threes", "heavy"): (
        Threads(256, 1, 128, 1),
        Threads(512, 2, 128, 1),
        Threads(640, 1, 128, 1),
        Threads(896, 2, 128, 1),
        Threads(1024, 4, 128, 2),
    ),
    ("few", "light"): (
        Threads(64, 1, 128, 0),
        Threads(128, 1, 256, 2),
        Threads(512, 1, 128, 2),
        Threads(640, 2, 128, 1),
        Threads(1024, 4, 128, 0),
    ),
    ("few", "float"): (
        Threads(64, 1, 128, 0),
        Threads(128, 1, 256, 2),
        Threads(512, 1, 128, 2),
        Threads(640, 2, 128, 0),
        Threads(1024, 2, 128, 2),
    ),
    ("few", "heavy"): (
        Threads(256, 1, 128, 2),
        Threads(512, 2, 128, 2),
        Threads(640, 5, 128, 2),
        Threads(896, 7, 128, 0),
        Threads(1024, 8, 128, 0),
    ),
    ("several", "light"): (
        Threads(256, 1, 256, 2),
        Threads(512, 2, 128, 0),
        Threads(1024, 4, 128, 0),
    ),
    ("several", "heavy"): (
        Threads(128, 1, 256, 2),
        Threads(256, 2, 128, 2),
        Threads(512, 1, 128, 0),
        Threads(896, 2, 128, 2),
        Threads(1024, 2, 128, 0),
    ),
    ("some", "light"): (
        Threads(32, 1, 512, 0),
        Threads(64, 2, 512, 0),
        Threads(128, 4, 128, 2),
        Threads(512, 2, 128, 0),
        Threads(1024, 4, 128, 0),
    ),
    ("some", "float"): (
        Threads(32, 1, 512, 0),
        Threads(64, 2, 512, 0),
        Threads(128, 4, 128, 2),
        Threads(512, 2, 128, 0),
        Threads(896, 4, 128, 0),
        Threads(1024, 2, 128, 0),
    ),
    ("some", "heavy"): (
        Threads(32, 1, 512, 0),
        Threads(256, 2, 128, 2),
        Threads(512, 1, 128, 0),
        Threads(1024, 2, 128, 0),
    ),
    ("many", "light"): (
        Threads(8, 1, 256, 0),
        Threads(512, 2, 256, 0),
        Threads(896, 4, 256, 0),
        Threads(1024, 4, 512, 0),
    ),
    ("many", "float"): (
        Threads(8, 1, 256, 0),
        Threads(64, 2, 256, 0),
        Threads(256, 2, 128, 0),
        Threads(512, 2, 512, 0),
        Threads(640, 4, 256, 0),
        Threads(896, 2, 256, 2),
        Threads(1024, 2, 256, 0),
    ),
    ("many", "heavy"): (
        Threads(64, 1, 256, 0),
        Threads(128, 2, 128, 0),
        Threads(256, 1, 256, 0),
        Threads(512, 1, 1024, 0),
        Threads(1024, 1, 256, 0),
    ),
}
"""By rows and kind (see `_kind`). A kind without an entry has light's."""

_LONG = {"light": 512}
"""Threads of a row of several chunks, by kind: other kinds have 1024."""


class Cluster(NamedTuple):
    """Of rows that several blocks share."""

    most: int
    """Blocks of all rows together, or rows, up to which that gains."""
    segment: int
    """Units of a chunk that one block takes."""
    threads: int
    """Of a block."""
    weight: int
    above: int = 0
    up_to: int = 1024
    """Units of the rows that gain: more than, and at most."""


_CAPABILITY = (9, 0)
"""From which on there are clusters."""
_CLUSTERS: dict[str, tuple[Cluster, ...]] = {
    "light": (
        Cluster(264, 32, 32, 0, 128, 256),
        Cluster(264, 64, 64, 1, 128, 256),
        Cluster(180, 128, 128, 0, 384),
        Cluster(264, 128, 64, 1, 896),
        Cluster(180, 256, 128, 0, 640),
        Cluster(264, 512, 256, 1, 896),
    ),
    "heavy": (
        Cluster(264, 32, 32, 1, 64, 256),
        Cluster(448, 128, 128, 1, 256),
        Cluster(264, 256, 128, 1, 512),
        Cluster(528, 512, 256, 1, 896),
    ),
}
"""Of rows of one chunk; `most` counts blocks. Rows that fit none are taken whole."""
_LONG_CLUSTERS: dict[str, tuple[Cluster, ...]] = {
    "light": (
        Cluster(33, 128, 128, 0),
        Cluster(132, 256, 128, 1),
        Cluster(1024, 256, 128, 0),
    ),
    "heavy": (
        Cluster(33, 128, 128, 1),
        Cluster(132, 256, 128, 1),
        Cluster(264, 512, 256, 1),
        Cluster(1024, 128, 128, 0),
    ),
}
"""Of rows of several chunks; `most` counts rows."""
_MOST_BLOCKS = 8  # of a cluster on every GPU that has clusters


def schedule(spec: NormSpec, hidden: int, rows: int, capability: tuple[int, int]) -> Schedule:
    """The schedule for so many rows on a device of that compute capability."""
    units, kind = -(-hidden // gpu_rows.VECTOR), _kind(spec)
    if capability >= _CAPABILITY:
        for rows_up_to, blocks, found in _clusters(kind, units):
            if rows <= rows_up_to:
                return Schedule(found.threads, 1, True, blocks, found.segment, found.weight)
    size = next((word for most, word in _SIZES if rows <= most), "many")
    if hidden > gpu_rows.MOST_LANES:
        full = size in ("some", "many")
        return Schedule(_LONG.get(kind, 1024), 1, eager=not full, weight=0 if full else 2)
    table = _WHOLE.get((size, kind)) or _WHOLE[size, "light"]
    way = next(way for way in table if units <= way.units)
    threads = _threads(-(-units // way.each))
    # Four long rows of a multiprocessor leave no room for blocks of the next kernel.
    eager = size != "many" and not (size == "few" and units > 640)
    return Schedule(threads, max(1, way.block // threads), eager=eager, weight=way.weight)


def changes(hidden: int) -> list[int]:
    """The numbers of rows at which another schedule may begin, on any device."""
    units = -(-hidden // gpu_rows.VECTOR)
    ends = {end for kind in _CLUSTERS for end, *_ in _clusters(kind, units)}
    return sorted({1} | {end + 1 for end in ends | {most for most, _ in _SIZES}})


def _clusters(kind: str, units: int) -> list[tuple[int, int, Cluster]]:
    """(rows up to, blocks of a row, how): the first that fits is taken."""
    lanes = gpu_rows.MOST_LANES // gpu_rows.VECTOR
    if units > lanes:
        long = _LONG_CLUSTERS.get(kind) or _LONG_CLUSTERS["light"]
        return [(found.most, lanes // found.segment, found) for found in long]
    fitting = [
        (-(-units // found.segment), found)
        for found in _CLUSTERS.get(kind) or _CLUSTERS["light"]
        if found.above < units <= found.up_to
    ]
    return [(found.most // n, n, found) for n, found in fitting if n <= _MOST_BLOCKS]


def _kind(spec: NormSpec) -> str:
    """How much a thread does with a unit.

    heavy: it reads more than one 16-bit unit at a place (a residual, or float32). float: the weight
    is multiplied in float32. light: it is a 16-bit product, two elements at a time.
    """
    if spec.residual is not None or spec.normed == torch.float32:
        return "heavy"
    return "float" if cuda_source.before_product(spec) is None else "light"


def _threads(count: int) -> int:
    """At least `count`: a power of two below 32, a multiple of 32 above."""
    return 1 << (count - 1).bit_length() if count <= 32 else -(-count // 32) * 32
