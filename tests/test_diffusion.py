"""The norms of diffusion models: which kernel `auto` takes on each GPU, and what is copied for it.

Planned on fake tensors as Inductor would ask, so no GPU is needed. The shapes and spellings are
those of diffusers' transformers; coverage of its classes is in benchmarks/coverage.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_gpu import captured
from helpers import DTYPES, NEEDS_ROUNDINGS, flat
from torch._inductor.utils import run_and_get_code

import fxpass
from fxpass import pipeline
from fxpass.options import Options
from fxpass.report import Report
from fxpass.torch_private import inside_inductor


def rms(x, w=None, b=None):
    """diffusers' RMSNorm."""
    y = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    if w is None:
        return y.to(x.dtype)
    y = (y.to(w.dtype) if w.dtype != torch.float32 else y) * w
    return y if b is None else y + b


def torch_rms(x, w):
    """torch.nn.RMSNorm, as compilers see it."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * w).to(x.dtype)


def heads(x):
    return x.unflatten(-1, (-1, 128))


def attention(q):
    """What reads q in the end is a product of matrices; which one does not matter here."""
    rows = q.flatten(0, -2)
    return rows @ rows.mT


def rotated(q, cos):
    left, right = q.chunk(2, -1)
    return attention(q * cos + torch.cat((-right, left), -1) * cos)


def modulated(y, scale, shift, v):
    return (y * (1 + scale) + shift).to(v.dtype) @ v


def first(x):
    """q of a packed projection."""
    return x.chunk(3, -1)[0]


def channels_first(x, w):
    return rms(x.movedim(1, -1), w).movedim(-1, 1)


SIZES = {
    "t": "2,512,3072", "q": "2,512,9216", "w": "128", "d": "3072", "s": "2,1,3072",
    "v": "3072,64", "c": "2,512,1,128", "i": "2,3072,16,16",
}  # fmt: skip
Row = tuple[Callable[..., torch.Tensor], str, str, str, str]
SITUATIONS: dict[str, Row] = {
    # (function, inputs by letter of SIZES, f16 on ROCm, bf16 on ROCm, either on CUDA)
    # A capital letter is float32 whatever the dtype.
    "q over heads": (
        lambda x, w: attention(rms(heads(x), w)), "t w", "aiter.rms_norm_t5", "triton.row",
        "cuda.row"),
    "q over heads, weight in float32": (
        lambda x, w: attention(torch_rms(heads(x), w)), "t w", "aiter.rms_norm", "triton.row",
        "cuda.row"),
    "q over heads, packed": (
        lambda x, w: attention(rms(heads(first(x)), w)), "q w", "triton.row", "triton.row",
        "cuda.row"),
    "q over heads, transposed": (
        lambda x, w: attention(rms(heads(x).transpose(1, 2), w).transpose(1, 2)), "t w",
        "aiter.rms_norm_t5", "triton.row", "cuda.row"),
    "q over all heads": (
        lambda x, w: attention(heads(torch_rms(x, w))), "t d", "aiter.rms_norm", "triton.row",
        "cuda.row"),
    "q over all heads, packed": (
        lambda x, w: attention(heads(torch_rms(first(x), w))), "q d", "aiter.rms_norm",
        "triton.row", "cuda.row"),
    "q, rotated": (
        lambda x, w, c: rotated(rms(heads(x), w), c), "t w c", "aiter.rms_norm_t5", "triton.row",
        "inductor.fused"),
    "modulated": (
        lambda x, w, s, t, v: modulated(rms(x, w), s, t, v), "t d s s v", "aiter.rms_norm_t5",
        "triton.row", "inductor.fused"),
    "modulated, no weight": (
        lambda x, s, t, v: modulated(rms(x), s, t, v), "t s s v", "triton.row", "triton.row",
        "inductor.fused"),
    "modulated in float32": (
        lambda x, w, s, t, v: modulated(rms(x.float(), w), s, t, v), "t D S S v", "triton.row",
        "triton.row", "inductor.fused"),
    "gated residual": (
        lambda x, w, g, r: r + g.tanh() * rms(x, w), "t d s t", "aiter.rms_norm_t5", "triton.row",
        "inductor.fused"),
    "float32": (
        lambda x, w, v: rms(x, w) @ v, "T D V", "triton.row", "triton.row", "cuda.row"),
    "no weight": (
        lambda x, v: rms(x) @ v, "t v", "triton.row", "triton.row", "cuda.row"),
    "bias": (
        lambda x, w, b, v: rms(x, w, b) @ v, "t d d v", "triton.row", "triton.row", "cuda.row"),
    "float32 weight": (
        lambda x, w, v: rms(x, w).to(x.dtype) @ v, "t D v", "triton.row", "triton.row",
        "cuda.row"),
    "float32 weight, cast by the model": (
        lambda x, w, v: rms(x, w.to(x.dtype)) @ v, "t D v", "aiter.rms_norm_t5", "triton.row",
        "cuda.row"),
    "channels first": (
        channels_first, "i d", "", "", "inductor.fused"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("platform", ["rocm:gfx942", "cuda:sm_90"])
@pytest.mark.parametrize("name", SITUATIONS)
def test_kernel_and_copies(name: str, platform: str, dtype: str) -> None:
    function, inputs, f16, bf16, cuda = SITUATIONS[name]
    wanted = cuda if platform.startswith("cuda") else {"f16": f16, "bf16": bf16}[dtype]
    report = planned(function, inputs, platform, dtype)
    assert len(report.rewritten) + len(report.declined) == 1
    if not wanted:
        assert "refused triton.row: copies 24576 bytes a row, saves 6144" in str(report.declined)
        return
    (site,) = report.rewritten
    assert site.kernel == wanted
    assert site.bytes_copied == 0


def planned(function: Callable[..., Any], inputs: str, platform: str, dtype: str) -> Report:
    """The dry run on fake CUDA tensors, inside Inductor."""
    given = [_input(letter, dtype) for letter in inputs.split()]
    graph_module, _ = captured(function, given)
    with inside_inductor():
        return pipeline.dry_run(graph_module.graph, Options(platform=platform, strict=True))


def _input(letter: str, dtype: str) -> tuple[tuple[int, ...], torch.dtype]:
    shape = tuple(map(int, SIZES[letter.lower()].split(",")))
    return shape, torch.float32 if letter.isupper() else DTYPES[dtype]


CHANNELS_FIRST = {
    "result": channels_first,
    "matmul": lambda x, w, v: rms(torch.relu(x).movedim(1, -1), w) @ v,
    "both": lambda x, w, v: (y := rms(x.movedim(1, -1), w), y @ v),
}


@NEEDS_ROUNDINGS
@pytest.mark.parametrize("name", CHANNELS_FIRST)
def test_inductor_copies_no_channels_first(name: str) -> None:
    """x is read in place, and the result computed in the memory order of eager's at once."""
    function = CHANNELS_FIRST[name]
    seed = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 9, (2, 16, 5, 6), generator=seed).half()  # sums exact in any order
    w, v = (torch.randn(*shape, generator=seed).half() for shape in [(16,), (16, 4)])
    given = (x, w) if name == "result" else (x, w, v)
    options = {"providers": ("inductor",), "strict": True, "expect": 1}
    _, plain = compiled(function, given)
    fxpass.reset_report()
    made, code = compiled(function, given, backend=fxpass.rmsnorm_backend, options=options)
    for found, wanted in zip(flat(made), flat(function(*given)), strict=True):
        assert torch.equal(found, wanted)
        assert found.stride() == wanted.stride()
    (site,) = fxpass.last_report().rewritten
    assert (site.kernel, site.bytes_copied) == ("inductor.fused", 0)
    assert site.layout_nodes == ("restride(out)",)
    assert code.count("= empty_strided_cpu(") <= plain.count("= empty_strided_cpu(")


def compiled(function: Any, given: Any, **how: Any) -> tuple[Any, str]:
    """The result and Inductor's wrapper code."""
    torch._dynamo.reset()
    with torch.no_grad():
        made, (code,) = run_and_get_code(torch.compile(function, **how), *given)
    return made, code
