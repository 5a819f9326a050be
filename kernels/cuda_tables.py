"""How many threads `cuda.row` gives a row: what sweeps on an H200 found fastest.

Hidden 64 to 16,384, 1 to 32,768 rows, hot and cold, up to 40 schedules for a point. `cuda_schedule`
reads these tables.
"""

from __future__ import annotations

from typing import NamedTuple

SIZES = (
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

WHOLE: dict[tuple[str, str], tuple[tuple[int, int, int, int], ...]] = {
    ("alone", "light"): (
        (256, 1, 128, 0),
        (512, 1, 128, 1),
        (896, 2, 128, 1),
        (1024, 2, 128, 2),
    ),
    ("alone", "heavy"): (
        (32, 1, 128, 0),
        (640, 1, 128, 1),
        (896, 2, 128, 1),
        (1024, 2, 128, 2),
    ),
    ("pairs", "light"): (
        (96, 1, 128, 0),
        (128, 2, 128, 0),
        (256, 1, 128, 0),
        (512, 1, 128, 1),
        (896, 2, 128, 1),
        (1024, 2, 128, 2),
    ),
    ("pairs", "heavy"): (
        (32, 1, 128, 0),
        (640, 1, 128, 1),
        (896, 2, 128, 1),
        (1024, 1, 128, 2),
    ),
    ("threes", "light"): (
        (64, 1, 128, 0),
        (256, 1, 128, 1),
        (512, 2, 128, 1),
        (640, 1, 128, 1),
        (896, 2, 128, 1),
        (1024, 2, 128, 2),
    ),
    ("threes", "float"): (
        (64, 1, 128, 0),
        (256, 1, 128, 1),
        (512, 2, 128, 1),
        (640, 1, 128, 1),
        (896, 2, 128, 1),
        (1024, 4, 128, 1),
    ),
    ("threes", "heavy"): (
        (32, 1, 128, 0),
        (256, 1, 128, 1),
        (512, 2, 128, 1),
        (640, 1, 128, 1),
        (896, 2, 128, 1),
        (1024, 4, 128, 2),
    ),
    ("few", "light"): (
        (64, 1, 128, 0),
        (96, 3, 128, 0),
        (128, 1, 128, 1),
        (192, 2, 128, 0),
        (256, 1, 128, 1),
        (320, 2, 128, 0),
        (512, 1, 128, 2),
        (640, 2, 128, 1),
        (768, 2, 128, 2),
        (896, 4, 128, 1),
        (1024, 4, 128, 0),
    ),
    ("few", "float"): (
        (64, 1, 128, 0),
        (96, 3, 128, 0),
        (128, 1, 128, 1),
        (192, 2, 128, 0),
        (256, 1, 128, 1),
        (384, 2, 128, 0),
        (512, 1, 128, 2),
        (768, 2, 128, 0),
        (1024, 2, 128, 2),
    ),
    ("few", "heavy"): (
        (32, 1, 128, 0),
        (64, 2, 128, 1),
        (128, 1, 128, 1),
        (384, 2, 128, 1),
        (512, 1, 128, 1),
        (640, 5, 128, 2),
        (768, 2, 128, 2),
        (896, 7, 128, 0),
        (1024, 8, 128, 0),
    ),
    ("several", "light"): (
        (64, 1, 128, 0),
        (96, 3, 128, 1),
        (256, 1, 256, 1),
        (512, 2, 128, 0),
        (1024, 4, 128, 0),
    ),
    ("several", "heavy"): (
        (64, 1, 128, 0),
        (128, 1, 256, 1),
        (256, 2, 128, 1),
        (512, 1, 128, 0),
        (896, 2, 128, 2),
        (1024, 2, 128, 0),
    ),
    ("some", "light"): (
        (32, 1, 512, 0),
        (48, 2, 128, 0),
        (64, 2, 512, 0),
        (96, 3, 128, 1),
        (128, 4, 512, 1),
        (192, 2, 192, 0),
        (256, 2, 128, 0),
        (448, 4, 128, 0),
        (512, 2, 128, 0),
        (1024, 4, 128, 0),
    ),
    ("some", "float"): (
        (32, 1, 512, 0),
        (48, 2, 128, 0),
        (64, 2, 512, 0),
        (96, 3, 128, 1),
        (128, 4, 512, 1),
        (192, 2, 192, 0),
        (384, 2, 128, 0),
        (448, 4, 128, 0),
        (512, 2, 128, 0),
        (640, 4, 128, 0),
        (768, 2, 128, 0),
        (896, 4, 128, 0),
        (1024, 2, 128, 0),
    ),
    ("some", "heavy"): (
        (32, 1, 256, 0),
        (48, 3, 128, 0),
        (64, 2, 512, 0),
        (96, 3, 128, 1),
        (128, 4, 512, 1),
        (256, 2, 128, 2),
        (448, 2, 128, 0),
        (512, 1, 128, 0),
        (1024, 2, 128, 0),
    ),
    ("many", "light"): (
        (8, 1, 256, 0),
        (32, 2, 512, 0),
        (48, 3, 128, 0),
        (64, 4, 512, 0),
        (96, 3, 128, 0),
        (256, 2, 256, 0),
        (448, 4, 128, 0),
        (512, 2, 256, 0),
        (896, 4, 128, 0),
        (1024, 4, 512, 0),
    ),
    ("many", "float"): (
        (8, 1, 256, 0),
        (32, 2, 512, 0),
        (48, 3, 128, 0),
        (64, 2, 256, 0),
        (96, 3, 128, 0),
        (384, 2, 128, 0),
        (448, 4, 128, 0),
        (512, 2, 512, 0),
        (768, 4, 128, 0),
        (896, 2, 128, 2),
        (1024, 2, 128, 0),
    ),
    ("many", "heavy"): (
        (16, 1, 256, 0),
        (32, 2, 128, 0),
        (48, 3, 128, 0),
        (64, 1, 256, 0),
        (96, 3, 128, 0),
        (128, 2, 128, 0),
        (448, 1, 256, 0),
        (512, 1, 1024, 0),
        (1024, 1, 256, 0),
    ),
}
"""Rows that one block takes whole, by their number and kind (`cuda_schedule._kind`): (units of the
row up to, units of a thread, threads of a block that takes several rows, `Schedule.weight`). As
many units for each thread gain more than fewer threads lose: 96 units are 3 for each of 32, not 2
for 48 of 64. A kind without an entry has light's."""

FULL = {"light": 896, "float": 768, "heavy": 768}
"""Units, by kind: four longer rows leave a multiprocessor no room for blocks of the next kernel."""
LONG = {"light": 512, "float": 1024, "heavy": 1024}
"""Threads of a row of several chunks, by kind."""


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


EVERY = 1 << 31
"""More rows than there are."""
CAPABILITY = (9, 0)
"""From which on there are clusters."""
CLUSTERS: dict[str, tuple[Cluster, ...]] = {
    "light": (
        Cluster(180, 128, 128, 0, 384),
        Cluster(264, 128, 64, 1, 896),
        Cluster(180, 256, 128, 0, 640),
        Cluster(264, 512, 256, 1, 896),
    ),
    "heavy": (
        Cluster(64, 32, 32, 1, 96, 256),
        Cluster(132, 64, 64, 1, 256, 448),
        Cluster(448, 128, 128, 1, 256),
        Cluster(264, 256, 128, 1, 512),
        Cluster(528, 512, 256, 1, 896),
    ),
}
"""Of rows of one chunk; `most` counts blocks. Rows that fit none are taken whole."""
_LONG_PLAIN = (
    Cluster(33, 128, 128, 0),
    Cluster(132, 256, 128, 1),
    Cluster(1024, 256, 128, 0),
)
LONG_CLUSTERS: dict[str, tuple[Cluster, ...]] = {
    "light": _LONG_PLAIN,
    "float": (*_LONG_PLAIN, Cluster(EVERY, 512, 128, 0)),
    "heavy": (
        Cluster(33, 128, 128, 1),
        Cluster(132, 512, 512, 1),
        Cluster(264, 512, 256, 1),
        Cluster(1024, 128, 128, 0),
        Cluster(EVERY, 256, 256, 0),
    ),
}
"""Of rows of several chunks; `most` counts rows."""
MOST_BLOCKS = 8  # of a cluster on every GPU that has clusters
