"""Text of the Triton row kernel of one spec, and the text made into a kernel.

The kernel is one function without helpers and without constexpr arguments, so that Inductor can
copy it into the code it generates. Three things in the text are there for the bits:

Reduction. `tl.sum` over many elements adds in an order that depends on the layout, hence on
num_warps and on pointer alignment. Over an axis of two there is only one sum, so the tree of
`gpu_rows` is a chain of such sums.

Products. `minus_zero` keeps products from being contracted (see `triton_words`). LLVM drops an
addend that it knows to be -0.0, so this one is read off an address; Triton itself makes a literal
-0.0 into +0.0.

Rows. The row number is an int32 (a grid is no larger), so that divisions are, and becomes an int64
offset at once: rows * hidden may exceed 2**31.
"""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch

from fxpass.kernels import gpu_rows, steps, triton_tiles
from fxpass.kernels.triton_tiles import Tile
from fxpass.kernels.triton_words import TYPES, lines, rounded
from fxpass.spec import NormSpec, is_narrow

NAME = "fxpass_row"
_EXCHANGED = 32
"""Sums that are left when the warps exchange them: from there on each warp has one per lane."""
_LEAST_EXCHANGED = 1024
"""Fewest lanes of a row that is spread over several warps."""


def parameters(spec: NormSpec) -> tuple[str, ...]:
    """The kernel's arguments in the order of `contract.Inline.parameters`."""
    present = {
        "x": True,
        "residual": spec.residual is not None,
        "weight": spec.weight is not None,
        "bias": spec.bias is not None,
        "out": True,
        "sum": "sum" in spec.outputs,
        "row": "row" in spec.outputs,
        "rows": True,
        "inner": True,
        "x_outer": True,
        "x_step": True,
        "residual_outer": spec.residual is not None,
        "residual_step": spec.residual is not None,
        "weight_rows": spec.weight is not None,
        "bias_rows": spec.bias is not None,
        "eps": spec.has_eps,
    }
    return tuple(name for name, needed in present.items() if needed)


def source(
    spec: NormSpec, hidden: int, rows_per_program: int, cut: bool, last: bool = False
) -> str:
    """The Python text of the kernel, without imports.

    cut: in `triton_tiles.pieces`. last: caches are to evict x and the residual last.
    """
    return "\n".join(_Writer(spec, hidden, rows_per_program, cut, last).text()) + "\n"


def kernel(text: str) -> Any:
    """The `triton.JITFunction` of a text."""
    name = f"<fxpass triton.row {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    # Triton and Inductor read the text of a function through `inspect`, which asks linecache.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    triton, tl = import_module("triton"), import_module("triton.language")
    namespace: dict[str, Any] = {"__name__": __name__, "triton": triton, "tl": tl}
    exec(compile(text, name, "exec"), namespace)
    return namespace[NAME]


class _Writer:
    """Writes one kernel. Tiles are (rows_per_program, width); row values (rows_per_program, 1)."""

    def __init__(
        self, spec: NormSpec, hidden: int, rows_per_program: int, cut: bool, last: bool
    ) -> None:
        self.spec = spec
        self.hidden = hidden
        self.rows = rows_per_program
        self.hints = dict.fromkeys(("x", "residual"), ", eviction_policy='evict_last'" * last)
        self.lanes = gpu_rows.lanes(hidden)
        self.widths = triton_tiles.pieces(hidden) if cut else (self.lanes,)

    def text(self) -> list[str]:
        body = self._kept() if triton_tiles.kept(self.hidden) else self._read_twice()
        return [
            "@triton.jit",
            f"def {NAME}({', '.join(parameters(self.spec))}):",
            *_indented([f"# {self.spec} hidden={self.hidden}", *self._addresses(), *body]),
        ]

    def _kept(self) -> Iterator[str]:
        """Each tile is read once."""
        tiles = triton_tiles.tiles(self.hidden, self.widths)
        for tile in tiles:
            yield from self._read(tile)
        for tile in tiles:  # before the reduction, whose wait hides them
            yield from self._read_shared(tile)
        for tile in tiles:
            yield from self._accumulate(tile)
        yield from self._row_value()
        for tile in tiles:
            yield from self._finish(tile)

    def _read_twice(self) -> Iterator[str]:
        """The row is read for its squares, and again for its elements."""
        first = Tile("0", 0, 0, self.lanes, first=True)
        following = Tile("s", "start", 0, self.lanes)
        yield from self._read(first)
        yield from self._accumulate(first)
        yield f"for start in range({self.lanes}, {self.hidden}, {self.lanes}):"
        yield from _indented(self._read(following, write_sum=False))
        yield from _indented(self._accumulate(following))
        yield from self._row_value()
        yield f"for start in range(0, {self.hidden}, {self.lanes}):"
        yield from _indented(self._read(following))
        yield from _indented(self._read_shared(following))
        yield from _indented(self._finish(following))

    def _addresses(self) -> Iterator[str]:
        yield "sign_bit = tl.where(out.to(tl.int64) == 0, 1, -2147483648)"
        yield "minus_zero = sign_bit.to(tl.float32, bitcast=True)"
        if self.spec.has_eps:
            yield "eps = tl.cast(eps, tl.float32)"  # a launcher may pass a float64
        if self.rows == 1:
            yield "r = tl.program_id(0)"
        else:
            yield f"r = tl.program_id(0) * {self.rows} + tl.arange(0, {self.rows})[:, None]"
            yield "present = r < rows"
        for piece, width in enumerate(self.widths):
            yield f"lane{piece} = tl.arange(0, {width})[None, :]"
        yield "inner = tl.cast(inner, tl.int32)"
        yield "upper = (r // inner).to(tl.int64)"
        yield "lower = (r % inner).to(tl.int64)"
        for name in ("x", "residual") if self.spec.residual is not None else ("x",):
            yield f"{name} += upper * {name}_outer + lower * {name}_step"
        for name in ("weight", "bias"):
            if getattr(self.spec, name) is not None:
                yield f"{name} += (r % tl.cast({name}_rows, tl.int32)).to(tl.int64) * {self.hidden}"
        for name in ("out", "sum"):
            if name in self.spec.outputs:
                yield f"{name} += r.to(tl.int64) * {self.hidden}"

    def _mask(self, tile: Tile, rows: bool = True) -> list[str]:
        """The conditions under which an element of a tile exists."""
        found = ["present"] if rows and self.rows > 1 else []
        if isinstance(tile.start, str):
            if self.hidden % self.lanes:
                found.append(f"({tile.start} + lane{tile.piece} < {self.hidden})")
        elif tile.start + tile.width > self.hidden:
            found.append(f"(lane{tile.piece} < {self.hidden - tile.start})")
        return found

    def _load(self, name: str, tile: Tile, rows: bool = True) -> str:
        """Raw elements of a tile; absent ones are 0."""
        mask = self._mask(tile, rows)
        guard = f", mask={' & '.join(mask)}, other=0.0" if mask else ""
        return f"tl.load({name} + {_place(tile)}{guard}{self.hints.get(name, '')})"

    def _store(self, name: str, tile: Tile, value: str, dtype: torch.dtype) -> str:
        mask = self._mask(tile)
        guard = f", mask={' & '.join(mask)}" if mask else ""
        # In one row the pointer is a scalar and the tile (1, width), like `lane`.
        return f"tl.store({name} + {_place(tile)}, {value}.to({TYPES[dtype]}){guard})"

    def _read(self, tile: Tile, write_sum: bool = True) -> Iterator[str]:
        """`x` and the tile's name: the float32 value of what is normalised."""
        spec, name = self.spec, f"x{tile.name}"
        yield f"{name} = {self._load('x', tile)}.to(tl.float32)"
        if spec.residual is None:
            return
        yield f"{name} += {self._load('residual', tile)}.to(tl.float32)"
        if is_narrow(spec.normed):
            yield f"{name} = {name}.to({TYPES[spec.normed]}).to(tl.float32)  # sum"
        if write_sum and "sum" in spec.outputs:
            yield self._store("sum", tile, name, spec.normed)

    def _read_shared(self, tile: Tile) -> Iterator[str]:
        for name in ("weight", "bias"):
            if getattr(self.spec, name) is not None:
                yield f"{name}{tile.name} = {self._load(name, tile, rows=False)}"

    def _accumulate(self, tile: Tile) -> Iterator[str]:
        """Add the squares of a tile to its piece's `acc`, one sum per unit."""
        statement = steps.square(self.spec)
        name, count = f"x{tile.name}", tile.width // 2
        if is_narrow(self.spec.normed) and not statement.narrow:
            # The square of a 16-bit value is exact, so `cuda.row`'s fma may be written here too.
            yield f"even, odd = tl.split(tl.reshape({name}, [{self.rows}, {count}, 2]))"
            yield f"unit = tl.fma(odd, odd, even * even)  # {statement.comment}"
        else:
            squares = f"tl.fma({name}, {name}, minus_zero){rounded(statement)}"
            yield f"unit = {squares}  # {statement.comment}"
            yield self._pairs("unit", count)
        yield from self._tree("unit", count, tile.width // gpu_rows.VECTOR)
        yield f"acc{tile.piece} {'=' if tile.first else '+='} unit"

    def _pairs(self, name: str, count: int) -> str:
        """Neighbours are added; `count` sums are left."""
        return f"{name} = tl.sum(tl.reshape({name}, [{self.rows}, {count}, 2]), axis=2)"

    def _tree(self, name: str, count: int, left: int) -> Iterator[str]:
        """From `count` sums to the `left` that are left."""
        while count > left:
            count //= 2
            yield self._pairs(name, count)

    def _row_value(self) -> Iterator[str]:
        """From the sums of the pieces' units to `row_value`, (rows, 1)."""
        counts = [self._exchanged(width) for width in self.widths]
        for piece, width in enumerate(self.widths):
            yield from self._tree(f"acc{piece}", width // gpu_rows.VECTOR, counts[piece])
        for piece, count in enumerate(counts):
            if count > 1:
                # One exchange through shared memory, where the remaining levels would each be one.
                # 203 instructions at hidden 4096, 367 at 8192; 300 and 554 if every thread gets all
                # sums from a tile with one of them in each row and zeros (PTX, 8 warps).
                every = f"tl.arange(0, {count})[None, :]"
                yield f"acc{piece} = tl.gather(acc{piece}, {every}, axis=1)"
        for piece, count in enumerate(counts):
            yield from self._tree(f"acc{piece}", count, 1)
        # A scalar where there is one: a tile would force its layout upon the elements.
        total = "acc{}" if self.rows > 1 else "tl.sum(acc{})"
        yield f"row_value = {' + '.join(map(total.format, range(len(counts))))}"
        yield from lines(steps.row(self.spec), "row_value", self.hidden)
        if "row" in self.spec.outputs:
            guard = ", mask=present" if self.rows > 1 else ""
            yield f"tl.store(row + r, row_value.to({TYPES[self.spec.row_dtype]}){guard})"

    def _exchanged(self, width: int) -> int:
        """How many sums of a piece the warps exchange; 1 where a row is one or two warps'."""
        if self.rows > 1 or self.lanes < _LEAST_EXCHANGED:
            return 1
        of_a_warp = 32 * 16 // self.spec.x.itemsize  # elements, each thread having read 16 bytes
        return min(width // gpu_rows.VECTOR, max(_EXCHANGED, width // of_a_warp))

    def _finish(self, tile: Tile) -> Iterator[str]:
        """The factor, the element program, and the store of one tile."""
        if self.spec.weight is not None:
            yield f"factor = weight{tile.name}.to(tl.float32)"
            yield from lines(steps.factor(self.spec), "factor", self.hidden)
        if self.spec.bias is not None:
            yield f"shift = bias{tile.name}.to(tl.float32)"
        yield f"y = x{tile.name}"
        yield from lines(steps.element(self.spec), "y", self.hidden)
        yield self._store("out", tile, "y", self.spec.out)


def _place(tile: Tile) -> str:
    return f"lane{tile.piece}" if tile.start == 0 else f"{tile.start} + lane{tile.piece}"


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"    {line}" for line in lines)
