"""Random views of tensors: what the planner plans is legal for the kernel and changes no bit.

The kernels check every tensor they get (`layout_kernels`, `aiter_standin`), so a run is the proof.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import aiter_standin
import pytest
import torch
from cases_rounding import unit
from helpers import Level, changed, flat, layout, rewritten
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layout_kernels import FLAT, KERNELS, LEADING, ROWS
from torch.fx.experimental.proxy_tensor import make_fx

from fxpass.kernels import register, unregister
from fxpass.options import Options

HIDDEN = 16
AITER = Options(providers=("aiter",), platform="rocm:gfx942", strict=True)
OPTIONS = {"flat": FLAT, "rows": ROWS, "leading": LEADING, "aiter": AITER}

View = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    aiter_standin.install(monkeypatch, "gemma_norm before the flag")
    with contextlib.ExitStack() as stack:
        for kernel in KERNELS:
            register(kernel)
            stack.callback(unregister, kernel.name)
        yield


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], list[View]]:
    """The shape of a tensor, and views of it that end in (..., HIDDEN)."""
    lead = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    wide = draw(st.sampled_from([HIDDEN, HIDDEN + 8, 2 * HIDDEN]))
    shape, steps = (*lead, wide), [_cut(draw, wide)]
    for _ in range(draw(st.integers(0, 3))):
        steps.append(
            draw(st.sampled_from([_transposed, _skipped, _first, _repeated, _split]))(draw)
        )
    order = draw(st.permutations(range(len(shape))))
    inverse = [order.index(dim) for dim in range(len(shape))]
    if draw(st.booleans()):  # memory in another order than the dims, as channels-first has it
        stored = tuple(shape[dim] for dim in order)
        return stored, [lambda x: x.permute(inverse), *steps]
    return shape, steps


def _cut(draw: st.DrawFn, wide: int) -> View:
    if wide == 2 * HIDDEN and draw(st.booleans()):
        return lambda x: x[..., ::2]
    start = draw(st.integers(0, wide - HIDDEN))
    return lambda x: x[..., start : start + HIDDEN]


def _transposed(draw: st.DrawFn) -> View:
    a, b = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    return lambda x: x.transpose(a % (x.dim() - 1), b % (x.dim() - 1))


def _skipped(draw: st.DrawFn) -> View:
    start, step = draw(st.integers(0, 1)), draw(st.integers(1, 3))
    return lambda x: x[..., start::step, :]


def _first(draw: st.DrawFn) -> View:
    return lambda x: x[:1]


def _repeated(draw: st.DrawFn) -> View:
    times = draw(st.integers(1, 3))
    return lambda x: x.unsqueeze(0).expand(times, *x.shape)


def _split(draw: st.DrawFn) -> View:
    parts = draw(st.sampled_from([1, 2]))
    return lambda x: x.unflatten(-2, (-1, parts)) if x.shape[-2] and not x.shape[-2] % parts else x


def _through(steps: list[View], x: torch.Tensor) -> torch.Tensor:
    for step in steps:
        x = step(x)
    return x


def _hf(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return w * unit(x).to(w.dtype)


def _w32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (unit(x) * w.float()).to(w.dtype)


@pytest.mark.parametrize("kind", OPTIONS)
@given(views(), st.sampled_from([_hf, _w32]))
@settings(max_examples=40)
def test_any_view_of_x(kind, made, norm) -> None:
    shape, steps = made
    _check(lambda x, w: norm(_through(steps, x), w), [shape], OPTIONS[kind])


@pytest.mark.parametrize("kind", OPTIONS)
@given(views(), views())
@settings(max_examples=40)
def test_any_views_of_x_and_residual(kind, one, other) -> None:
    shapes, steps = [one[0], other[0]], [one[1], other[1]]
    seen = [_through(s, torch.empty(shape)) for shape, s in zip(shapes, steps, strict=True)]
    if seen[0].shape != seen[1].shape:  # the second as a view of the first's shape
        shapes[1], steps[1] = seen[0].transpose(0, 1).shape, [lambda r: r.transpose(0, 1)]

    def add(x, r, w):
        total = _through(steps[0], x) + _through(steps[1], r)
        return _hf(total, w), total

    _check(add, shapes, OPTIONS[kind])


def _check(function, shapes, options) -> None:
    seed = torch.Generator().manual_seed(0)
    # Whole numbers: their squares add up to the same sum in any order.
    tensors = [torch.randint(-9, 9, shape, generator=seed).half() for shape in shapes]
    inputs = (*tensors, torch.randn(HIDDEN, generator=seed).half())
    with torch.no_grad():
        graph_module = make_fx(function, tracing_mode="fake")(*inputs)
    level = Level("aten", graph_module, inputs)
    assume(_strides_as_traced(level))
    _, report = rewritten(level, options)
    assert report.rewritten, str(report)
    assert not changed(level, options)


def _strides_as_traced(level: Level) -> bool:
    """False where a fake tensor has other strides than eager's (a sum with an expanded one)."""
    (traced,) = next(n for n in level.graph_module.graph.nodes if n.op == "output").args
    nodes = [traced] if not isinstance(traced, (list, tuple)) else traced
    real = flat(level.graph_module(*level.inputs))
    return all(layout(n.meta["val"]) == layout(r) for n, r in zip(nodes, real, strict=True))
