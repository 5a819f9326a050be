"""How the GPU kernels address rows, and the lanes of their tree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxpass.kernels import (
    gpu_rows,
)


@st.composite
def strided(draw):
    """A shape, and the strides of one or two tensors of it: permuted, padded, expanded, sliced."""
    shape = [*draw(st.lists(st.integers(1, 4), max_size=4)), draw(st.integers(1, 5))]
    tensors = []
    for _ in range(draw(st.integers(1, 2))):
        order = list(range(len(shape) - 1))
        if draw(st.booleans()):
            order = draw(st.permutations(order))
        last_is_last = draw(st.integers(0, 5)) > 0
        order = [*order, len(shape) - 1] if last_is_last else [len(shape) - 1, *order]
        strides, step = [0] * len(shape), 1
        for dim in reversed(order):
            strides[dim] = 0 if draw(st.integers(0, 9)) == 0 else step
            step *= shape[dim] + draw(st.sampled_from((0, 0, 0, 2)))
        tensors.append(strides)
    return shape, tensors


def strides_left(shape, tensors) -> int:
    """Leading dims that no neighbour continues, of all tensors together."""
    dims = [dim for dim, size in enumerate(shape[:-1]) if size != 1]
    continued = sum(
        all(strides[a] == strides[b] * shape[b] for strides in tensors)
        for a, b in itertools.pairwise(dims)
    )
    return len(dims) - continued


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 0, 16), (0, 3, 0, 5, 16)])
def test_no_rows_have_an_address(shape):
    found = gpu_rows.address(shape, [gpu_rows.dense(shape)] * 2)
    assert found == gpu_rows.Rows(0, 1, (0, 0), (0, 0))


@given(strided())
def test_address_is_where_the_rows_are(case):
    shape, tensors = case
    found = gpu_rows.address(shape, tensors)
    last = all(strides[-1] == 1 or shape[-1] == 1 for strides in tensors)
    assert (found is not None) == (last and strides_left(shape, tensors) <= gpu_rows.LEADING)
    if found is None:
        return
    assert found.count == math.prod(shape[:-1])
    for tensor, (outer, step) in enumerate(zip(found.outer, found.step, strict=True)):
        base = torch.zeros(4096)
        view = base.as_strided(shape, tensors[tensor])
        rows = itertools.product(*map(range, shape[:-1]))
        for r, place in enumerate(rows):
            offset = (view[place].data_ptr() - base.data_ptr()) // base.itemsize
            assert (r // found.inner) * outer + (r % found.inner) * step == offset


@given(st.integers(1, 70_000))
def test_lanes_are_a_power_of_two_that_holds_the_row(hidden):
    lanes = gpu_rows.lanes(hidden)
    assert lanes & (lanes - 1) == 0
    assert 8 <= lanes <= 8192
    assert lanes >= min(hidden, 8192)
    assert lanes == 8 or lanes // 2 < hidden
