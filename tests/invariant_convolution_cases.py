"""Convolutions for the tests of both devices: geometries, layouts and an oracle in float64."""

from __future__ import annotations

import itertools

import torch

GEOMETRIES = {
    "same size": (3, 1, 1, 1),
    "patches": (2, 2, 0, 1),
    "strided and dilated": (3, 3, 2, 2),
    "one by one": (1, 1, 0, 1),
}
"""Kernel size, stride, padding, dilation; of every spatial dim."""
CHANNELS = 8
CASES = tuple(
    (rank, transposed, groups, geometry)
    for rank, transposed, groups, geometry in itertools.product(
        (1, 2, 3), (False, True), (1, 2, CHANNELS), GEOMETRIES
    )
)
LAYOUTS = ("contiguous", "channels innermost", "samples inside", "expanded")
ULPS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def tensors(rank, transposed, groups, geometry, dtype, device="cpu", samples=5):
    """(x, weight, bias) and the arguments of aten::convolution after them."""
    size, stride, padding, dilation = GEOMETRIES[geometry]
    made = torch.Generator().manual_seed(rank * 100 + groups)
    shapes = [
        (samples, CHANNELS, *(9, 8, 7)[:rank]),
        (CHANNELS, 2 * CHANNELS // groups, *[size] * rank)
        if transposed
        else (2 * CHANNELS, CHANNELS // groups, *[size] * rank),
        (2 * CHANNELS,),
    ]
    given = [torch.randn(s, generator=made, dtype=torch.float64).to(device, dtype) for s in shapes]
    more = [1] + [0] * (rank - 1) if transposed and stride > 1 else [0] * rank
    each = [[value] * rank for value in (stride, padding, dilation)]
    return given, (*each, transposed, more, groups)


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x in other memory; an expanded one has its first sample in every place."""
    if layout == "channels innermost":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "samples inside":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    return x[:1].expand_as(x) if layout == "expanded" else x


def check(case, layout, dtype, device="cpu", inputs_rounded=0.0):
    """Shape, strides and values beside torch's; the bits of rows beside those they have alone.

    `inputs_rounded`: the relative error of a term whose operands are cut to fewer bits.
    """
    import fxpass

    (x, weight, bias), arguments = tensors(*case, dtype, device)
    x = laid_out(x, layout)
    call = torch.ops.aten.convolution.default
    wanted = call(x, weight, bias, *arguments)
    oracle = call(x.double().cpu(), weight.double().cpu(), bias.double().cpu(), *arguments)
    with fxpass.batch_invariant_mode():
        found = call(x, weight, bias, *arguments)
        for rows in (slice(0, 1), slice(2, 5), slice(4, 5)):
            assert torch.equal(call(x[rows], weight, bias, *arguments), found[rows])
        plain = call(x.contiguous(), weight.contiguous(), bias, *arguments)
        assert torch.equal(plain, found), "memory order changes no bits"
    assert (found.shape, found.stride(), found.dtype) == (
        wanted.shape,
        wanted.stride(),
        wanted.dtype,
    )
    # One rounding of the result; the sum's own error is that of its terms, at most 217 of size 1.
    largest = oracle.abs().max()
    error = (found.double().cpu() - oracle).abs().max() / largest
    terms = call(x.double().cpu().abs(), weight.double().cpu().abs(), None, *arguments).max()
    rounded = inputs_rounded * terms / largest
    assert error <= ULPS[dtype] + 16 * min(ULPS[dtype], ULPS[torch.float32]) + rounded
