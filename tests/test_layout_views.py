"""Every way rows can lie in memory: the plan is legal, copies only what it must, changes no bit."""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import capture, differences, rewritten, tensors
from layout_kernels import FLAT, KERNELS, LEADING, ROWS, llama, planned

from fxpass.kernels import register, unregister


@pytest.fixture(autouse=True)
def kernels():
    with contextlib.ExitStack() as stack:
        for kernel in KERNELS:
            register(kernel)
            stack.callback(unregister, kernel.name)
        yield


def _of(view):
    return lambda x, w: llama(view(x), w)


VIEWS = {
    "expanded rows": ("bf16[1,64]", lambda x: x.expand(6, 64)),
    "expanded batch": ("bf16[8,64]", lambda x: x.expand(3, 8, 64)),
    "expanded last dim": ("bf16[8,1]", lambda x: x.expand(8, 64)),
    "overlapping rows": ("bf16[128]", lambda x: x.unfold(0, 64, 8)),
    "last dim sliced": ("bf16[4,8,128]", lambda x: x[..., ::2]),
    "last dim cut": ("bf16[4,8,128]", lambda x: x[..., 32:96]),
    "heads transposed": ("bf16[2,8,4,64]", lambda x: x.transpose(1, 2)),
    "heads of a packed projection": (
        "bf16[2,8,768]",
        lambda x: x.view(2, 8, 3, 4, 64)[:, :, 0].transpose(1, 2),
    ),
    "channels first": ("bf16[2,64,5,6]", lambda x: x.permute(0, 2, 3, 1)),
    "channels first, flattened": ("bf16[2,64,5,6]", lambda x: x.flatten(2).transpose(1, 2)),
    "every second token": ("bf16[2,8,64]", lambda x: x[:, ::2]),
    "no rows": ("bf16[0,64]", lambda x: x * 1),
    "no batch": ("bf16[0,8,64]", lambda x: x.transpose(0, 1)),
    "no tokens": ("bf16[2,0,4,64]", lambda x: x.transpose(1, 2)),
    "no tokens of a slice": ("bf16[2,8,128]", lambda x: x[:, 8:, :64]),
    "one token": ("bf16[4,1,3,64]", lambda x: x.transpose(1, 2)),
    "one row": ("bf16[128]", lambda x: x[::2]),
}
COPIED = {
    # name: (2-D contiguous, 2-D with a row stride, two row strides)
    "expanded rows": (1, 1, 0),
    "expanded batch": (1, 1, 0),
    "expanded last dim": (1, 1, 1),
    "overlapping rows": (1, 1, 0),
    "last dim sliced": (1, 1, 1),
    "last dim cut": (1, 0, 0),
    "heads transposed": (0, 0, 0),
    "heads of a packed projection": (1, 1, 0),
    "channels first": (1, 1, 1),
    "channels first, flattened": (1, 1, 1),
    "every second token": (1, 0, 0),
    "no tokens of a slice": (0, 0, 0),
    "one row": (1, 1, 1),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["flat", "rows", "leading"])
def test_views(name: str, kind: int) -> None:
    text, view = VIEWS[name]
    options = (FLAT, ROWS, LEADING)[kind]
    _, nodes, _ = planned(_of(view), tensors(text, "bf16[64]"), options)
    inputs = [node for node in nodes[0] if node.startswith("contiguous(x)")]
    assert len(inputs) == COPIED.get(name, (0, 0, 0))[kind], nodes


@pytest.mark.parametrize("options", [FLAT, LEADING], ids=["flat", "leading"])
def test_normalised_dims_of_no_rows(options) -> None:
    def function(x, w):
        return torch.nn.functional.rms_norm(x, (4, 16), w, 1e-6)

    planned(function, tensors("f32[0,3,4,16]", "f32[4,16]"), options)


GUARDED = {
    "batch": (lambda x, w: llama(x, w), (0,)),
    "batch and tokens": (lambda x, w: llama(x, w), (0, 1)),
    "a slice": (lambda x, w: llama(x[..., :64], w), (0, 1)),
    "transposed": (lambda x, w: llama(x[..., :64].transpose(0, 1), w), (0, 1)),
    "joined dims": (lambda x, w: torch.nn.functional.rms_norm(x, (4, 96), w, 1e-6), (0,)),
}


@pytest.mark.parametrize("options", [FLAT, ROWS, LEADING], ids=["flat", "rows", "leading"])
@pytest.mark.parametrize("name", GUARDED)
def test_symbolic_sizes_get_no_guard(name: str, options) -> None:
    function, dims = GUARDED[name]
    joined = name == "joined dims"
    inputs = tensors("bf16[6,4,96]", "bf16[4,96]" if joined else "bf16[96]")
    inputs = inputs if joined or name.startswith("batch") else (inputs[0], inputs[1][:64].clone())
    for dim in dims:
        torch._dynamo.mark_dynamic(inputs[0], dim)
    with torch.no_grad():
        level = capture(function, inputs).graphs("aten")[-1]
    before = _guards(level.graph_module)
    made, report = rewritten(level, options)
    assert report.rewritten, str(report)
    assert _guards(level.graph_module) == before
    for batch in (1, 0, 9):  # sizes the graph was not captured with
        arguments = [_resized(value, 6, batch) for value in level.inputs]
        assert not differences(level.graph_module(*arguments), made(*arguments))


def _guards(graph_module) -> int:
    found = next(
        value
        for node in graph_module.graph.nodes
        if isinstance(value := node.meta.get("val"), torch.SymInt)
    )
    return len(found.node.shape_env.guards)


def _resized(value, old: int, new: int):
    """An input of another batch: its size, or a tensor with that many rows."""
    if isinstance(value, int):
        return new if value == old else value
    if value.dim() == 3 and value.shape[0] == old:
        return torch.randn(new, *value.shape[1:]).to(value.dtype)
    return value
