"""Layout nodes around a kernel that reads only two contiguous dimensions, and one row stride."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import tensors
from layout_kernels import FLAT, KERNELS, LEADING, ROWS, llama, planned

from fxpass import printing
from fxpass.kernels import register, unregister


@pytest.fixture(autouse=True)
def kernels():
    with contextlib.ExitStack() as stack:
        for kernel in KERNELS:
            register(kernel)
            stack.callback(unregister, kernel.name)
        yield


def test_contiguous_input_is_only_viewed() -> None:
    _, nodes, copied = planned(llama, tensors("bf16[2,8,64]", "bf16[64]"), FLAT)
    assert nodes == [["rows(x)", "shape(out)"]]
    assert copied == [0]


def test_two_dims_need_nothing() -> None:
    _, nodes, _ = planned(llama, tensors("bf16[16,64]", "bf16[64]"), FLAT)
    assert nodes == [[]]


def test_a_slice_is_copied_and_its_bytes_are_counted() -> None:
    def function(x, w):
        return llama(x[..., :64], w)

    inputs = tensors("bf16[2,8,192]", "bf16[64]")
    _, nodes, copied = planned(function, inputs, FLAT)
    assert nodes == [["contiguous(x) 2048 bytes", "rows(x)", "shape(out)"]]
    assert copied == [2 * 8 * 64 * 2]


def test_a_slice_is_not_copied_where_rows_may_be_strided() -> None:
    def function(x, w):
        return llama(x[..., :64], w)

    _, nodes, copied = planned(function, tensors("bf16[2,8,192]", "bf16[64]"), ROWS)
    assert nodes == [["rows(x)", "shape(out)"]]
    assert copied == [0]


def test_rows_with_two_strides_are_copied() -> None:
    def function(x, w):
        return llama(x[:, ::2, :, :64], w)

    _, nodes, _ = planned(function, tensors("bf16[2,8,2,96]", "bf16[64]"), ROWS)
    assert nodes[0][0].startswith("contiguous(x)")


def test_sites_with_one_source_share_the_copy() -> None:
    def function(x, w, v):
        q = x[..., :64]
        inverse = torch.rsqrt(q.float().pow(2).mean(-1, keepdim=True) + 1e-3)
        return llama(q, w), v * (q.float() * inverse).to(v.dtype)

    made, nodes, _ = planned(function, tensors("bf16[2,8,192]", "bf16[64]", "bf16[64]"), FLAT)
    assert len(nodes) == 2
    lines = printing.text(made.graph).splitlines()
    assert sum(" = clone(" in line for line in lines) == 1
    assert sum(" = norm(" in line for line in lines) == 2


def test_transposed_result_keeps_its_strides() -> None:
    def function(x, w):
        return llama(x.transpose(1, 2), w), llama(x.permute(2, 0, 1, 3), w)

    _, nodes, copied = planned(function, tensors("bf16[2,8,4,16]", "bf16[16]"), FLAT)
    assert copied == [0, 0]
    assert nodes[0] == ["permute(x)", "rows(x)", "shape(out)", "permute(out)"]


def test_residual_and_its_sum_are_flattened_too() -> None:
    def function(x, r, w):
        h = x + r
        return llama(h, w), h

    inputs = tensors("bf16[2,8,64]", "bf16[2,8,64]", "bf16[64]")
    _, nodes, copied = planned(function, inputs, FLAT)
    assert nodes == [["rows(x)", "rows(residual)", "shape(out)", "shape(sum)"]]
    assert copied == [0]


def test_inverse_returned_in_its_own_shape() -> None:
    def function(x):
        inverse = torch.rsqrt(x.pow(2).mean(-1) + 1e-6)
        return x * inverse.unsqueeze(-1), inverse

    planned(function, tensors("f32[2,8,64]"), FLAT)


def test_several_normalised_dims_are_joined() -> None:
    def function(x, w):
        return torch.nn.functional.rms_norm(x, (4, 16), w, 1e-6)

    _, nodes, _ = planned(function, tensors("f32[2,3,4,16]", "f32[4,16]"), FLAT)
    assert nodes[0][0] == "flatten(x)"


def test_one_row() -> None:
    planned(lambda x, w: llama(x, w), tensors("f32[64]", "f32[64]"), FLAT)


@pytest.mark.parametrize("options", [FLAT, ROWS], ids=["flat", "rows"])
def test_dynamic_rows(options) -> None:
    def function(x, r, w):
        h = x + r
        return llama(h[:, :, :64], w), h

    inputs = tensors("bf16[2,8,96]", "bf16[2,8,96]", "bf16[64]")
    for tensor in inputs[:2]:
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    made, _, copied = planned(function, inputs, options)
    assert copied == ([None] if options is FLAT else [0])
    assert " = norm(" in printing.text(made.graph)


# ---- At most two row strides


def heads(x, w):
    return llama(x[..., :3, :], w)


HEADS = {
    "one slice of heads": ("bf16[8,12,16]", heads, []),
    "batch and time merge": ("bf16[2,4,12,16]", heads, []),
    "three strides": ("bf16[2,6,12,16]", lambda x, w: heads(x[:, :4], w), ["contiguous(x)"]),
    "last stride": ("bf16[8,12,32]", lambda x, w: heads(x[..., ::2], w), ["contiguous(x)"]),
    "a dim of size 1": ("bf16[2,1,12,16]", lambda x, w: heads(x[:, :, ::2], w), []),
}


@pytest.mark.parametrize("name", HEADS)
def test_up_to_two_row_strides_are_read_in_place(name) -> None:
    text, function, wanted = HEADS[name]
    _, nodes, _ = planned(function, tensors(text, "bf16[16]"), LEADING)
    assert [node.partition(" ")[0] for node in nodes[0]] == wanted


def test_x_and_residual_must_merge_alike() -> None:
    # x merges as (2 x 4) x 3 and the residual as 2 x (4 x 3): together that is three dims.
    def apart(x, r, w):
        return llama(x[..., :3, :] + r[:, :4], w)

    _, nodes, _ = planned(apart, tensors("bf16[2,4,6,16]", "bf16[2,9,3,16]", "bf16[16]"), LEADING)
    assert [node.partition(" ")[0] for node in nodes[0]] == ["contiguous(residual)"]
    same = tensors("bf16[2,4,6,16]", "bf16[2,4,5,16]", "bf16[16]")
    _, nodes, _ = planned(lambda x, r, w: heads(x, w) + heads(r, w), same, LEADING)
    assert nodes == [[], []]
    _, nodes, _ = planned(lambda x, r, w: llama(x[..., :3, :] + r[..., :3, :], w), same, LEADING)
    assert nodes == [[]]


def test_a_symbolic_number_of_tokens_needs_no_copy() -> None:
    x, w = tensors("bf16[2,8,12,16]", "bf16[16]")
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    _, nodes, _ = planned(heads, (x, w), LEADING)
    assert nodes == [[]]
