"""Triangular systems for the tests of both devices."""

from __future__ import annotations

import itertools

import torch

import fxpass

SHAPES = ((7, 5, 4), (3, 64, 33), (5, 1, 1), (4, 9, 1), (4, 1, 9), (4, 100, 3), (3, 130, 7))
"""Systems, unknowns, right-hand sides."""
KINDS = tuple(itertools.product((False, True), (True, False), (False, True)))
"""upper, left, unitriangular."""


def system(shape, kind, dtype):
    """(a, b, options); the unused half of a is NaN, and so is a diagonal that is not read."""
    count, size, columns = shape
    upper, left, unit = kind
    made = torch.Generator().manual_seed(size)
    a = torch.randn(count, size, size, generator=made, dtype=dtype) / size**0.5
    a += 2 * torch.eye(size, dtype=dtype)
    unused = torch.ones(size, size, dtype=torch.bool)
    unused = unused.tril(0 if unit else -1) if upper else unused.triu(0 if unit else 1)
    a = a.masked_fill(unused, torch.nan)
    b = torch.randn(count, *((size, columns) if left else (columns, size)), generator=made).to(
        dtype
    )
    return a, b, {"upper": upper, "left": left, "unitriangular": unit}


def check(shape, kind, dtype, device):
    """Values and strides beside torch's, broadcasting, and the bits of one system alone."""
    solve = torch.linalg.solve_triangular
    a, b, options = system(shape, kind, dtype)
    oracle = solve(a.double(), b.double(), **options)
    a, b = a.to(device), b.to(device)
    wanted = solve(a, b, **options)
    with fxpass.batch_invariant_mode():
        found = solve(a, b, **options)
        assert torch.equal(solve(a.mT.contiguous().mT, b, **options), found)
        for rows in (slice(0, 1), slice(1, 3), slice(2, 3)):
            assert torch.equal(solve(a[rows], b[rows], **options), found[rows])
            assert torch.equal(solve(a[rows].clone(), b[rows].clone(), **options), found[rows])
        shared = solve(a[1], b, **options)
        assert torch.equal(shared[1], found[1])
        assert torch.equal(solve(a, b[1], **options)[1], found[1])
    assert (found.dtype, found.shape, found.stride()) == (
        wanted.dtype,
        wanted.shape,
        wanted.stride(),
    )
    # Backward stable: the error is that of one rounding a term, times the condition (below 50).
    ulp = torch.finfo(dtype).eps
    worst = (found.double().cpu() - oracle).abs().max() / oracle.abs().max()
    assert worst <= 50 * shape[1] ** 0.5 * ulp
