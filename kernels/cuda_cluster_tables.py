"""Rows that `cuda.row` gives several blocks, and rows of several chunks: tables as `cuda_tables`.

The first entry that fits is taken. Rows that fit none have their schedule from `cuda_tables`, or
`LONG`.
"""

from __future__ import annotations

from typing import NamedTuple

from fxpass.kernels.cuda_source import AT_ONCE, LOADED, STORED, SUMMED

LONG = {"light": 512, "float": 1024, "heavy": 1024}
"""Threads of a row of several chunks that fits no entry, by kind."""
LONG_AT_ONCE = 1024
"""Its rows up to which the next kernel may come in at once."""


class Cluster(NamedTuple):
    """Of rows of one chunk that several blocks share."""

    most: int
    """Blocks of all rows together up to which that gains."""
    segment: int
    """Units that one block takes."""
    threads: int
    """Of a block."""
    weight: int
    above: int = 0
    up_to: int = 1024
    """Units of the rows that gain: more than, and at most."""
    release: int = AT_ONCE
    registers: int = 0
    """Of a thread at most, as of `cuda_tables.Whole`."""
    again: bool = True
    """As of the same."""


EVERY = 1 << 31
"""More rows than there are."""
CAPABILITY = (9, 0)
"""From which on there are clusters."""
_FEW = (
    Cluster(132, 128, 128, 0, 384, 512),
    Cluster(92, 256, 128, 1, 384, 512, LOADED),
    Cluster(180, 128, 128, 0, 512, 640),
    Cluster(100, 128, 128, 0, 640, 896),
    Cluster(66, 256, 128, 0, 640, 768),
    Cluster(132, 256, 128, 1, 640, 768, LOADED),
    Cluster(180, 128, 128, 1, 768, 896, LOADED),
    Cluster(180, 256, 128, 0, 640, 896),
    Cluster(72, 128, 128, 0, 896, release=LOADED),
)
"""What light and float begin with."""
_MORE = (
    Cluster(264, 256, 256, 0, 896),
    Cluster(264, 512, 256, 1, 896),
)
"""And end with."""
CLUSTERS: dict[str, tuple[Cluster, ...]] = {
    "light": (
        *_FEW,
        Cluster(200, 256, 128, 0, 512, 640),
        Cluster(132, 256, 128, 1, 896, release=LOADED),
        *_MORE,
    ),
    "float": (
        *_FEW,
        Cluster(200, 256, 128, 1, 512, 640),
        Cluster(80, 256, 256, 1, 896, release=LOADED),
        *_MORE,
    ),
    "heavy": (
        Cluster(64, 32, 32, 1, 96, 256),
        Cluster(132, 64, 64, 1, 256, 448),
        Cluster(72, 128, 128, 1, 256, 640),
        Cluster(132, 128, 128, 1, 256, 512, LOADED),
        Cluster(132, 256, 128, 1, 256, 512, LOADED),
        Cluster(240, 128, 128, 1, 512, 640, LOADED),
        Cluster(60, 128, 128, 1, 640, 768),
        Cluster(180, 128, 128, 1, 640, 768, LOADED),
        Cluster(264, 256, 128, 1, 640, 768),
        Cluster(90, 128, 128, 1, 768, 896),
        Cluster(165, 128, 128, 1, 768, 896, LOADED),
        Cluster(400, 128, 128, 1, 256, 896),
        Cluster(132, 512, 512, 1, 768, 896),
        Cluster(72, 128, 128, 1, 896, release=LOADED),
        Cluster(66, 256, 128, 1, 896, release=LOADED),
        Cluster(528, 256, 256, 1, 896),
    ),
}
"""By kind, of rows of one chunk."""


class Long(NamedTuple):
    """Of rows of several chunks."""

    most: int
    """Rows up to which that gains."""
    segment: int
    """Units of a chunk that one block takes."""
    threads: int
    """Of a block."""
    weight: int
    release: int = AT_ONCE
    registers: int = 0
    """As above."""
    up_to: int = EVERY
    """Units of the rows that gain, at most."""
    again: bool = True
    """As of `cuda_tables.Whole`."""
    above: int = 0
    """They have more units than this."""


ALL = 1024
"""Units of a chunk: one block takes the row whole."""
_NOT_HEAVY = (
    Long(9, 128, 128, 0, LOADED),
    Long(33, 128, 128, 0),
    Long(80, 256, 256, 1, SUMMED, up_to=2560, again=False, above=2048),
    Long(132, 512, 512, 1, SUMMED, up_to=2560, again=False, above=2048),
    Long(66, 512, 512, 0, up_to=1536),
    Long(132, ALL, 512, 2, up_to=1536),
    Long(264, ALL, 512, 1, SUMMED, up_to=1536),
    Long(396, ALL, 512, 1, SUMMED, 40, up_to=1536),
    Long(528, ALL, 512, 1, AT_ONCE, 40, up_to=1280),
    Long(528, ALL, 256, 0, LOADED, 64, up_to=1536),
    Long(4096, ALL, 512, 1, AT_ONCE, 40, up_to=1536),
    Long(EVERY, ALL, 512, 1, SUMMED, 40, up_to=1536),
    Long(132, 512, 512, 0, AT_ONCE, 64, up_to=1792, again=False),
    Long(132, 256, 128, 1),
    Long(264, ALL, 512, 0, SUMMED, 64, up_to=3072, above=2048),
    Long(792, ALL, 256, 1, SUMMED, 64, up_to=2560, above=2048),
    Long(1024, ALL, 256, 0, up_to=2560, above=2048),
    Long(1024, 256, 256, 0, LOADED, up_to=3072, above=2560),
)
"""What light and float begin with. Up to 1,536 units the second chunk is half full at most: where
blocks share the row, some have no part of it and wait (4,096 rows of 9,216: 56 us, 37 whole)."""
SEVERAL_CHUNKS: dict[str, tuple[Long, ...]] = {
    "light": (
        *_NOT_HEAVY,
        Long(264, ALL, 512, 1, AT_ONCE, up_to=1792, again=False),
        Long(264, ALL, 512, 0, STORED, up_to=2048),
        Long(528, ALL, 512, 0, LOADED, up_to=1792, again=False),
        Long(1024, 256, 128, 0),
        Long(EVERY, 512, 256, 2, SUMMED, 48, up_to=1792),
        Long(4096, 512, 512, 2, SUMMED, 32, up_to=2048),
        Long(EVERY, ALL, 512, 0, SUMMED, 64, up_to=3072, above=2048),
        Long(EVERY, 256, 256, 0, SUMMED, 48, up_to=4096, above=3072),
    ),
    "float": (
        *_NOT_HEAVY,
        Long(1024, 256, 128, 0),
        Long(4096, 512, 512, 0, SUMMED),
        Long(EVERY, ALL, 512, 0, SUMMED, 64, up_to=3072, above=2048),
        Long(EVERY, 512, 128, 0, SUMMED),
    ),
    "heavy": (
        Long(9, 128, 128, 1, LOADED),
        Long(33, 128, 128, 1),
        Long(132, 512, 512, 1),
        Long(198, 512, 256, 1),
        Long(264, ALL, 512, 0, LOADED, up_to=1280),
        Long(264, ALL, 512, 0, STORED, up_to=2048),
        Long(264, ALL, 512, 2, SUMMED, 64, up_to=2560, above=2048),
        Long(EVERY, 128, 128, 0, SUMMED, 48, up_to=2560, above=2048),
        Long(1024, ALL, 512, 2, AT_ONCE, 40, up_to=1536),
        Long(528, 128, 128, 0),
        Long(1024, 256, 256, 1, up_to=1792),
        Long(1024, 128, 128, 0),
        Long(EVERY, ALL, 512, 0, SUMMED, up_to=1792),
        Long(EVERY, 128, 128, 0, SUMMED),
    ),
}
"""By kind, of rows of more."""
MOST_BLOCKS = 8  # of a cluster on every GPU that has clusters
