"""How many threads `cuda.row` gives a row: what sweeps on an H200 found fastest.

Hidden 64 to 32,768, 1 to 32,768 rows, hot and cold, up to 120 schedules for a point.
`cuda_schedule` reads these tables.
"""

from __future__ import annotations

from typing import NamedTuple

from fxpass.kernels.cuda_source import AT_ONCE, LOADED, STORED, SUMMED

MULTIPROCESSORS = 132
"""Of an H200."""
SIZES = (
    (132, "alone"),
    (264, "pairs"),
    (396, "threes"),
    (528, "fours"),
    (660, "fives"),
    (792, "sixes"),
    (1024, "several"),
    (4096, "some"),
)
"""Rows up to, and their word. alone: each has a multiprocessor of its own (132 on an H200). pairs
to several: multiprocessors wait for rows. some: the grid is over so soon that the next kernel may
come in at once. More are many: multiprocessors wait for memory."""

FIT = -1
"""Registers for one wave: as many as let a multiprocessor have room for just the blocks it gets. Or
as many as a thread does well with, if those are fewer than FEWEST."""
MOST_REGISTERS = 128
"""That FIT stands for."""
FEWEST = {1: 32, 2: 32, 3: 40, 4: 48, 5: 56, 6: 64, 7: 80, 8: 80}
"""By the units of a thread."""


class Whole(NamedTuple):
    """Of rows that one block takes whole."""

    up_to: int
    """Units of the row."""
    each: int
    """Units of a thread. As many for each gain more than fewer threads lose: 96 units are 3 for
    each of 32 threads, not 2 for 48 of 64."""
    block: int
    """Threads of a block that takes several rows."""
    weight: int
    release: int = SUMMED
    registers: int = 0
    """Of a thread at most, or FIT; 0: as many as it does well with."""
    again: bool = True
    """Whether it widens the elements again after the sum."""


def _but(table: tuple[Whole, ...], *others: Whole) -> tuple[Whole, ...]:
    """`table` with other entries: more of them, or instead of those up to as many units."""
    entries = {one.up_to: one for one in (*table, *others)}
    return tuple(entries[up_to] for up_to in sorted(entries))


_THREES = (
    Whole(64, 1, 128, 0, AT_ONCE),
    Whole(128, 1, 128, 1, AT_ONCE),
    Whole(256, 1, 128, 0, LOADED),
    Whole(384, 2, 128, 0, LOADED, FIT, again=False),
    Whole(512, 2, 128, 0, LOADED),
    Whole(640, 1, 128, 1, AT_ONCE),
    Whole(768, 2, 128, 1),
    Whole(896, 4, 128, 0),
    Whole(1024, 4, 128, 0, LOADED, FIT, again=False),
)
_FOURS_TO_256 = (
    Whole(64, 1, 128, 0, AT_ONCE),
    Whole(96, 3, 128, 0, AT_ONCE),
    Whole(128, 1, 128, 1, AT_ONCE),
    Whole(192, 2, 128, 0, AT_ONCE),
    Whole(256, 1, 128, 0, LOADED),
)
_SIXES = (
    Whole(64, 1, 128, 0, AT_ONCE),
    Whole(96, 3, 128, 1, AT_ONCE),
    Whole(128, 1, 256, 1, AT_ONCE),
    Whole(160, 3, 64, 1, AT_ONCE),
    Whole(192, 1, 512, 1, AT_ONCE, 40),
    Whole(256, 1, 128, 0, LOADED, FIT),
    Whole(320, 1, 128, 1, AT_ONCE),
    Whole(384, 3, 128, 0, LOADED, FIT, again=False),
    Whole(448, 2, 128, 0, LOADED, FIT, again=False),
    Whole(512, 4, 128, 0, LOADED, FIT, again=False),
    Whole(576, 3, 128, 0, AT_ONCE, FIT, again=False),
    Whole(640, 4, 128, 0, LOADED, FIT, again=False),
    Whole(768, 4, 128, 1, AT_ONCE),
    Whole(832, 5, 128, 0, SUMMED, FIT),
    Whole(896, 7, 128, 0, LOADED, FIT),
    Whole(1024, 4, 128, 0, LOADED, again=False),
)
_SIXES_FLOAT = _but(
    _SIXES,
    Whole(384, 2, 128, 0, LOADED, FIT),
    Whole(896, 5, 128, 0, LOADED, FIT),
)
_SIXES_HEAVY = (
    Whole(64, 1, 128, 0, AT_ONCE),
    Whole(128, 1, 256, 1, AT_ONCE),
    Whole(256, 1, 128, 0, LOADED, FIT),
    Whole(384, 3, 128, 1),
    Whole(512, 2, 128, 0, LOADED),
    Whole(640, 4, 128, 2, again=False),
    Whole(768, 5, 128, 0),
    Whole(896, 2, 128, 2),
    Whole(1024, 1, 128, 0, AT_ONCE),
)
WHOLE: dict[tuple[str, str], tuple[Whole, ...]] = {
    ("alone", "light"): (
        Whole(256, 1, 128, 0, AT_ONCE),
        Whole(320, 1, 128, 1, AT_ONCE),
        Whole(512, 2, 128, 0, LOADED),
        Whole(640, 1, 128, 1, AT_ONCE),
        Whole(896, 2, 128, 1, AT_ONCE),
        Whole(1024, 2, 128, 2, AT_ONCE),
    ),
    ("alone", "heavy"): (
        Whole(32, 1, 128, 0, AT_ONCE),
        Whole(640, 1, 128, 1, AT_ONCE),
        Whole(896, 1, 128, 2, AT_ONCE),
        Whole(1024, 2, 128, 2, AT_ONCE),
    ),
    ("pairs", "light"): (
        Whole(96, 1, 128, 0, AT_ONCE),
        Whole(128, 2, 128, 0, AT_ONCE),
        Whole(256, 1, 128, 0, AT_ONCE),
        Whole(384, 2, 128, 0, AT_ONCE),
        Whole(448, 3, 128, 0, AT_ONCE),
        Whole(512, 2, 128, 0, LOADED, FIT, again=False),
        Whole(768, 2, 128, 1, AT_ONCE),
        Whole(896, 3, 128, 1),
        Whole(1024, 2, 128, 1),
    ),
    ("pairs", "heavy"): (
        Whole(32, 1, 128, 0, AT_ONCE),
        Whole(512, 1, 128, 1, AT_ONCE),
        Whole(896, 2, 128, 1, AT_ONCE),
        Whole(1024, 1, 128, 1),
    ),
    ("threes", "light"): _THREES,
    ("threes", "float"): _but(
        _THREES,
        Whole(896, 3, 128, 1, again=False),
    ),
    ("threes", "heavy"): (
        Whole(32, 1, 128, 0, AT_ONCE),
        Whole(256, 1, 128, 1, AT_ONCE),
        Whole(512, 2, 128, 0, LOADED),
        Whole(640, 1, 128, 1, AT_ONCE),
        Whole(896, 2, 128, 1, AT_ONCE),
        Whole(1024, 4, 128, 1),
    ),
    ("fours", "light"): (
        *_FOURS_TO_256,
        Whole(320, 2, 128, 0, LOADED),
        Whole(384, 3, 128, 0, LOADED),
        Whole(512, 2, 128, 0, LOADED, FIT),
        Whole(576, 2, 128, 0, LOADED, FIT, again=False),
        Whole(640, 2, 128, 0, LOADED, again=False),
        Whole(768, 3, 128, 0, LOADED, again=False),
        Whole(1024, 4, 128, 0, LOADED, again=False),
    ),
    ("fours", "float"): (
        *_FOURS_TO_256,
        Whole(384, 3, 128, 0, LOADED),
        Whole(512, 1, 128, 0, LOADED),
        Whole(640, 3, 128, 1, again=False),
        Whole(1024, 2, 128, 2),
    ),
    ("fours", "heavy"): (
        Whole(32, 1, 128, 0, AT_ONCE),
        Whole(128, 1, 128, 1, AT_ONCE),
        Whole(256, 1, 128, 0, LOADED),
        Whole(384, 2, 128, 0, LOADED),
        Whole(512, 1, 128, 0, LOADED),
        Whole(640, 3, 128, 0, LOADED),
        Whole(768, 2, 128, 2, AT_ONCE),
        Whole(896, 7, 128, 1),
        Whole(1024, 4, 128, 1, AT_ONCE),
    ),
    ("fives", "light"): _but(
        _SIXES,
        Whole(320, 2, 128, 0, LOADED, FIT),
        Whole(896, 4, 128, 1, SUMMED, FIT),
    ),
    ("fives", "float"): _but(
        _SIXES_FLOAT,
        Whole(320, 2, 128, 0, LOADED, FIT),
    ),
    ("fives", "heavy"): _SIXES_HEAVY,
    ("sixes", "light"): _SIXES,
    ("sixes", "float"): _SIXES_FLOAT,
    ("sixes", "heavy"): _SIXES_HEAVY,
    ("several", "light"): (
        Whole(64, 1, 128, 0, AT_ONCE),
        Whole(80, 3, 128, 1, AT_ONCE),
        Whole(96, 3, 128, 1, SUMMED, again=False),
        Whole(128, 1, 256, 1, AT_ONCE),
        Whole(160, 3, 64, 1, AT_ONCE),
        Whole(192, 2, 128, 1, AT_ONCE),
        Whole(256, 1, 256, 1, AT_ONCE),
        Whole(320, 2, 128, 0, LOADED, FIT),
        Whole(384, 3, 128, 0, LOADED, FIT),
        Whole(448, 4, 128, 0, LOADED, FIT),
        Whole(512, 4, 128, 0, LOADED),
        Whole(640, 4, 128, 0, LOADED, FIT),
        Whole(768, 2, 128, 0, LOADED),
        Whole(896, 4, 128, 0),
        Whole(1024, 4, 128, 0, LOADED, again=False),
    ),
    ("several", "heavy"): _but(
        _SIXES_HEAVY,
        Whole(192, 1, 128, 1, AT_ONCE, 40),
        Whole(256, 1, 128, 0, LOADED),
        Whole(512, 4, 128, 2, AT_ONCE),
        Whole(576, 4, 128, 2, AT_ONCE, FIT, again=False),
        Whole(640, 2, 128, 2),
    ),
    ("some", "light"): (
        Whole(32, 1, 512, 0, AT_ONCE),
        Whole(48, 2, 128, 0, AT_ONCE),
        Whole(64, 2, 512, 0, AT_ONCE),
        Whole(80, 3, 128, 1),
        Whole(96, 3, 128, 0, STORED),
        Whole(112, 2, 128, 0, LOADED, 32),
        Whole(128, 1, 256, 2, AT_ONCE),
        Whole(192, 2, 192, 0, AT_ONCE),
        Whole(224, 2, 256, 0, LOADED),
        Whole(256, 2, 128, 0, LOADED, FIT),
        Whole(288, 3, 128, 0, LOADED, 40),
        Whole(320, 2, 128, 0, LOADED, again=False),
        Whole(384, 3, 128, 0, LOADED, again=False),
        Whole(448, 2, 128, 0, LOADED, again=False),
        Whole(512, 2, 128, 0, LOADED),
        Whole(1024, 4, 128, 0, AT_ONCE),
    ),
    ("some", "float"): (
        Whole(32, 1, 512, 0, AT_ONCE),
        Whole(48, 2, 128, 0, AT_ONCE),
        Whole(64, 2, 512, 0, AT_ONCE),
        Whole(96, 3, 128, 1, AT_ONCE),
        Whole(112, 2, 128, 0, LOADED),
        Whole(128, 1, 256, 1, AT_ONCE),
        Whole(192, 2, 192, 0, AT_ONCE),
        Whole(256, 2, 128, 0, LOADED),
        Whole(320, 5, 128, 0, LOADED, 64),
        Whole(384, 3, 128, 0, LOADED),
        Whole(448, 3, 128, 0, AT_ONCE),
        Whole(512, 2, 128, 0, LOADED),
        Whole(640, 4, 128, 0, AT_ONCE),
        Whole(768, 2, 128, 0, AT_ONCE),
        Whole(896, 4, 128, 0, AT_ONCE),
        Whole(1024, 2, 128, 0, AT_ONCE),
    ),
    ("some", "heavy"): (
        Whole(32, 1, 256, 0, AT_ONCE),
        Whole(48, 3, 128, 0, AT_ONCE),
        Whole(64, 2, 512, 2, AT_ONCE, 32),
        Whole(96, 3, 128, 1, AT_ONCE),
        Whole(128, 4, 512, 1, AT_ONCE),
        Whole(192, 2, 128, 2, AT_ONCE),
        Whole(256, 2, 128, 0, AT_ONCE),
        Whole(288, 3, 128, 0, LOADED, 56),
        Whole(448, 2, 128, 0, AT_ONCE),
        Whole(512, 1, 128, 0, AT_ONCE),
        Whole(1024, 2, 128, 0, AT_ONCE),
    ),
    ("many", "light"): (
        Whole(8, 1, 256, 0),
        Whole(32, 2, 512, 0),
        Whole(48, 3, 128, 0),
        Whole(64, 2, 160, 0, STORED),
        Whole(96, 3, 128, 0),
        Whole(256, 2, 256, 0),
        Whole(448, 4, 128, 0),
        Whole(512, 4, 256, 0),
        Whole(896, 4, 128, 0),
        Whole(1024, 4, 512, 0),
    ),
    ("many", "float"): (
        Whole(8, 1, 256, 0),
        Whole(32, 2, 512, 0),
        Whole(48, 3, 128, 0),
        Whole(64, 2, 256, 0),
        Whole(96, 3, 128, 0),
        Whole(384, 2, 128, 0),
        Whole(448, 4, 128, 0),
        Whole(512, 3, 128, 0),
        Whole(768, 4, 128, 0),
        Whole(896, 2, 128, 2),
        Whole(1024, 2, 128, 0),
    ),
    ("many", "heavy"): (
        Whole(16, 1, 256, 0),
        Whole(32, 2, 128, 0),
        Whole(48, 3, 128, 0),
        Whole(64, 4, 64, 1),
        Whole(96, 3, 128, 0),
        Whole(448, 1, 256, 0),
        Whole(512, 1, 1024, 0),
        Whole(1024, 1, 256, 0),
    ),
}
"""By the number of rows and their kind (`cuda_source.kind`). A kind without an entry has
light's."""

LAST_FROM = {"light": 128_000_000, "float": 128_000_000, "heavy": 64_000_000}
"""Bytes that are moved, by kind, from which on the L2 is to evict last what is read: 1 to 4 %
faster from 256 MB on, and the product after the norm takes as long as before."""
LAST_ON = (9, 0)
"""Where that was measured, with an L2 of 50 MB."""
