"""The two situations the aiter provider was made for: Qwen3's strided q and k, diffusion norms."""

from __future__ import annotations

import aiter_standin
import pytest
import torch
from helpers import Level, capture, changed, rewritten, tensor, tensors
from layout_kernels import llama
from torch.nn import functional

import fxpass
from fxpass import printing
from fxpass.options import Options

GFX942 = {"platform": "rocm:gfx942", "strict": True}
NAMED = Options(providers=("aiter",), **GFX942)


@pytest.fixture
def standin(monkeypatch: pytest.MonkeyPatch) -> aiter_standin.Standin:
    return aiter_standin.install(monkeypatch, "gemma_norm before the flag")


def nn_norm(x, w):
    return functional.rms_norm(x, (x.shape[-1],), w, 1e-6)


def _level(function, inputs) -> Level:
    with torch.no_grad():
        return capture(function, inputs).graphs("aten")[-1]


def _clones(made) -> int:
    return printing.text(made.graph).count(" = clone(")


def packed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k of Qwen3's packed projection: 32 heads of 128, rows 6144 apart."""
    return x[..., :4096].unflatten(-1, (32, 128)), x[..., 4096:5120].unflatten(-1, (8, 128))


@pytest.mark.parametrize("shape", ["2048", "2,1024"], ids=["tokens", "batch, time"])
@pytest.mark.parametrize("norm", [llama, nn_norm])
def test_qwen3_q_and_k(norm, shape: str, standin) -> None:
    def both(x, w, v):
        q, k = packed(x)
        return norm(q, w), norm(k, v)

    x, w, v = tensors(f"f16[{shape},6144]", "f16[128]", "f16[128]")
    assert packed(x)[0].stride()[-3:] == (6144, 128, 1)
    level = _level(both, (x, w, v))
    made, report = rewritten(level, NAMED)
    assert len(report.rewritten) == 2
    assert _clones(made) == 2  # one for q and one for k: 2-D rows cannot skip the other heads
    assert [site.bytes_copied for site in report.rewritten] == [2048 * 4096 * 2, 2048 * 1024 * 2]
    assert not changed(level, NAMED)
    assert {call.shape for call in standin.calls} == {(65536, 128), (16384, 128)}


def test_norms_of_one_slice_share_its_copy(standin) -> None:
    def twice(x, w, v):
        q, _ = packed(x)
        return llama(q, w), nn_norm(q, v)

    level = _level(twice, tensors("f16[64,6144]", "f16[128]", "f16[128]"))
    made, report = rewritten(level, NAMED)
    assert len(report.rewritten) == 2
    assert _clones(made) == 1
    assert not changed(level, NAMED)


def test_left_to_choose_q_and_k_go_where_no_copy_is_needed(standin) -> None:
    def both(x, w, v):
        q, k = packed(x)
        return llama(q, w), llama(k, v)

    inputs = tensors("f16[2048,6144]", "f16[128]", "f16[128]")
    report = fxpass.explain(both, *inputs, options=Options(**GFX942))
    assert [site.kernel for site in report.rewritten] == ["triton.row"] * 2
    assert [site.bytes_copied for site in report.rewritten] == [0, 0]
    for site in report.rewritten:
        assert "refused aiter.rms_norm_t5: copies 512 bytes a row, saves 0" in site.refusals


DIFFUSION = {
    "tokens": ("f16[1,512,1536]", lambda x: x, ["rows(x)", "shape(out)"]),
    "flat": ("f16[512,1536]", lambda x: x, []),
    "packed q": ("f16[512,4608]", lambda x: x[:, :1536], []),
    "packed q in a batch": ("f16[2,256,4608]", lambda x: x[..., :1536], ["rows(x)", "shape(out)"]),
}


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_norms_over_all_heads_need_no_copy(name: str, standin) -> None:
    text, view, nodes = DIFFUSION[name]
    level = _level(lambda x, w: nn_norm(view(x), w), (tensor(text), tensor("f16[1536]", 1)))
    made, report = rewritten(level, NAMED)
    (site,) = report.rewritten
    assert list(site.layout_nodes) == nodes
    assert site.bytes_copied == _clones(made) == 0
    assert not changed(level, NAMED)
    assert len(standin.calls) == 1


def test_a_version_without_row_strides_gets_a_copy_that_shows(monkeypatch) -> None:
    made = aiter_standin.install(monkeypatch, "composable kernel only")
    level = _level(lambda x, w: nn_norm(x[:, :64], w), tensors("f16[6,128]", "f16[64]"))
    graph, report = rewritten(level, NAMED)
    (site,) = report.rewritten
    assert site.kernel == "aiter.rms_norm_ck"
    assert site.bytes_copied == 6 * 64 * 2
    assert _clones(graph) == 1
    assert not changed(level, NAMED)
    assert [call.stride for call in made.calls] == [(64, 1)]
