"""Which parts of a row the Triton kernel reads at once.

A tree over a padded row is the sum of the trees over two pieces of it, if each starts at a multiple
of its width: hidden 5120 takes 4096 + 1024 elements instead of 8192, with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxpass.kernels import gpu_rows

IN_REGISTERS = 16384
"""Most elements of a row that are kept between the two passes; a longer row is read twice."""
_LEAST_CUT = 2048
"""Fewest lanes of a row that is worth cutting: the sum of each piece is one more exchange."""


@dataclass(frozen=True)
class Tile:
    """Elements `start` and following: what one chunk has of one piece."""

    name: str
    start: int | str
    """Or a variable's name, in a loop over chunks."""
    piece: int
    width: int
    first: bool = False
    """The first of its piece."""


def kept(hidden: int) -> bool:
    """Whether a row is read once and kept in registers."""
    lanes = gpu_rows.lanes(hidden)
    return lanes * -(-hidden // lanes) <= IN_REGISTERS


def pieces(hidden: int) -> tuple[int, ...]:
    """Widths of the one or two parts of a chunk that are read apart, to read fewer absent elements.

    A third part takes as many instructions for its reduction as it saves (2816 against 2848 of all
    warps at hidden 7168).
    """
    lanes = gpu_rows.lanes(hidden)
    if lanes < _LEAST_CUT or not kept(hidden):
        return (lanes,)
    if hidden > lanes:
        half = lanes // 2
        return (half, half) if 0 < hidden % lanes <= half else (lanes,)
    second = gpu_rows.lanes(hidden - lanes // 2)
    return (lanes // 2, second) if second <= lanes // 4 else (lanes,)


def tiles(hidden: int, widths: tuple[int, ...]) -> list[Tile]:
    """The parts of a row that have elements, chunk by chunk, each in pieces of these widths."""
    lanes = gpu_rows.lanes(hidden)
    found = []
    for chunk, start in enumerate(range(0, hidden, lanes)):
        for piece, width in enumerate(widths):
            if start < hidden:
                found.append(Tile(f"{chunk}_{piece}", start, piece, width, chunk == 0))
            start += width
    return found
