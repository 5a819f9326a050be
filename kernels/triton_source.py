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

from fxpass.kernels import gpu_rows, steps
from fxpass.kernels.triton_words import TYPES, lines, rounded
from fxpass.spec import NormSpec, is_narrow

IN_REGISTERS = 16384
"""Most elements of a row that are kept between the two passes; a longer row is read twice."""
NAME = "fxpass_row"
_MOST_GROUPS = 32
"""Most sums that the warps exchange at once; every thread reads all of them."""


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


def source(spec: NormSpec, hidden: int, rows_per_program: int) -> str:
    """The Python text of the kernel, without imports."""
    return "\n".join(_Writer(spec, hidden, rows_per_program).text()) + "\n"


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
    """Writes one kernel. Tiles are (rows_per_program, lanes); row values (rows_per_program, 1)."""

    def __init__(self, spec: NormSpec, hidden: int, rows_per_program: int) -> None:
        self.spec = spec
        self.hidden = hidden
        self.rows = rows_per_program
        self.lanes = gpu_rows.lanes(hidden)
        self.units = self.lanes // gpu_rows.VECTOR
        self.chunks = -(-hidden // self.lanes)
        self.kept = self.lanes * self.chunks <= IN_REGISTERS
        of_a_warp = 32 * 16 // spec.x.itemsize  # lanes, each thread having read 16 bytes
        groups = min(_MOST_GROUPS, self.lanes // of_a_warp)
        self.groups = groups if self.rows == 1 and groups > 1 else None

    def text(self) -> list[str]:
        body = self._kept() if self.kept else self._read_twice()
        return [
            "@triton.jit",
            f"def {NAME}({', '.join(parameters(self.spec))}):",
            *_indented([f"# {self.spec} hidden={self.hidden}", *self._addresses(), *body]),
        ]

    def _kept(self) -> Iterator[str]:
        """Each chunk is read once and named by its number."""
        starts = [chunk * self.lanes for chunk in range(self.chunks)]
        for chunk, start in enumerate(starts):
            yield from self._read(f"x{chunk}", start)
        for chunk, start in enumerate(starts):  # before the reduction, whose wait hides them
            yield from self._read_shared(f"{chunk}", start)
        for chunk in range(self.chunks):
            yield from self._accumulate(f"x{chunk}", first=chunk == 0)
        yield from self._row_value()
        for chunk, start in enumerate(starts):
            yield from self._finish(f"x{chunk}", f"{chunk}", start)

    def _read_twice(self) -> Iterator[str]:
        """The row is read for its squares, and again for its elements."""
        yield from self._read("x0", 0)
        yield from self._accumulate("x0", first=True)
        yield f"for start in range({self.lanes}, {self.hidden}, {self.lanes}):"
        yield from _indented(self._read("xs", "start", write_sum=False))
        yield from _indented(self._accumulate("xs", first=False))
        yield from self._row_value()
        yield f"for start in range(0, {self.hidden}, {self.lanes}):"
        yield from _indented(self._read("xs", "start"))
        yield from _indented(self._read_shared("s", "start"))
        yield from _indented(self._finish("xs", "s", "start"))

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
        yield f"lane = tl.arange(0, {self.lanes})[None, :]"
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

    def _mask(self, start: int | str, rows: bool = True) -> list[str]:
        """The conditions under which an element of a chunk exists."""
        found = ["present"] if rows and self.rows > 1 else []
        if start == "start" and self.hidden % self.lanes:
            found.append(f"(start + lane < {self.hidden})")
        elif isinstance(start, int) and start + self.lanes > self.hidden:
            found.append(f"(lane < {self.hidden - start})")
        return found

    def _load(self, name: str, start: int | str, rows: bool = True) -> str:
        """Raw elements of a chunk; absent ones are 0."""
        mask = self._mask(start, rows)
        guard = f", mask={' & '.join(mask)}, other=0.0" if mask else ""
        return f"tl.load({name} + {_plus(start)}lane{guard})"

    def _store(self, name: str, start: int | str, value: str, dtype: torch.dtype) -> str:
        mask = self._mask(start)
        guard = f", mask={' & '.join(mask)}" if mask else ""
        # In one row the pointer is a scalar and the tile (1, lanes), like `lane`.
        return f"tl.store({name} + {_plus(start)}lane, {value}.to({TYPES[dtype]}){guard})"

    def _read(self, name: str, start: int | str, write_sum: bool = True) -> Iterator[str]:
        """`name`: the float32 value of what is normalised."""
        spec = self.spec
        yield f"{name} = {self._load('x', start)}.to(tl.float32)"
        if spec.residual is None:
            return
        yield f"{name} += {self._load('residual', start)}.to(tl.float32)"
        if is_narrow(spec.normed):
            yield f"{name} = {name}.to({TYPES[spec.normed]}).to(tl.float32)  # sum"
        if write_sum and "sum" in spec.outputs:
            yield self._store("sum", start, name, spec.normed)

    def _read_shared(self, suffix: str, start: int | str) -> Iterator[str]:
        for name in ("weight", "bias"):
            if getattr(self.spec, name) is not None:
                yield f"{name}{suffix} = {self._load(name, start, rows=False)}"

    def _accumulate(self, name: str, first: bool) -> Iterator[str]:
        """Add the squares of a chunk to `acc`, one sum per unit."""
        statement = steps.square(self.spec)
        width = self.lanes // 2
        if is_narrow(self.spec.normed) and not statement.narrow:
            # The square of a 16-bit value is exact, so `cuda.row`'s fma may be written here too.
            yield f"even, odd = tl.split(tl.reshape({name}, [{self.rows}, {width}, 2]))"
            yield f"unit = tl.fma(odd, odd, even * even)  # {statement.comment}"
        else:
            squares = f"tl.fma({name}, {name}, minus_zero){rounded(statement)}"
            yield f"unit = {squares}  # {statement.comment}"
            yield self._pairs("unit", width)
        while width > self.units:
            width //= 2
            yield self._pairs("unit", width)
        yield f"acc {'=' if first else '+='} unit"

    def _pairs(self, name: str, width: int) -> str:
        """Neighbours are added; `width` sums are left."""
        return f"{name} = tl.sum(tl.reshape({name}, [{self.rows}, {width}, 2]), axis=2)"

    def _row_value(self) -> Iterator[str]:
        """From `acc` to `row_value`, (rows, 1)."""
        width = self.units
        while width > 1:
            if width == self.groups:
                # What is left lies in several warps. A tile with one of them in each row, and
                # zeros, brings them all to every thread in one exchange instead of one a level.
                every = f"tl.arange(0, {width})"
                yield f"own = {every}[:, None] == {every}[None, :]"
                yield "acc = tl.sum(tl.where(own, acc, 0.0), axis=1)"
            width //= 2
            yield self._pairs("acc", width)
        yield "row_value = acc"
        yield from lines(steps.row(self.spec), "row_value", self.hidden)
        if "row" in self.spec.outputs:
            pointer = "row + r" if self.rows > 1 else "row + r + tl.arange(0, 1)[:, None]"
            guard = ", mask=present" if self.rows > 1 else ""
            yield f"tl.store({pointer}, row_value.to({TYPES[self.spec.row_dtype]}){guard})"

    def _finish(self, name: str, suffix: str, start: int | str) -> Iterator[str]:
        """The factor, the element program, and the store of one chunk."""
        if self.spec.weight is not None:
            yield f"factor = weight{suffix}.to(tl.float32)"
            yield from lines(steps.factor(self.spec), "factor", self.hidden)
        if self.spec.bias is not None:
            yield f"shift = bias{suffix}.to(tl.float32)"
        yield f"y = {name}"
        yield from lines(steps.element(self.spec), "y", self.hidden)
        yield self._store("out", start, "y", self.spec.out)


def _plus(start: int | str) -> str:
    return "" if start == 0 else f"{start} + "


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (f"    {line}" for line in lines)
