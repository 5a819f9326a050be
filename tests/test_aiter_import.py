"""What the provider makes of the aiter it finds, or does not find: one clear line."""

from __future__ import annotations

import sys
import types

import aiter_standin
import pytest
import torch
from fake_gpu import captured

from fxpass import pipeline, platforms
from fxpass.kernels import aiter, aiter_api
from fxpass.options import Options
from fxpass.spec import NormSpec

SPEC = (
    "x=f16 row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,mul_weight:f32,cast:f16"
    " weight=f16"
)


def _module(monkeypatch, **functions):
    package, ops = types.ModuleType("aiter"), types.ModuleType("aiter.ops")
    vars(package).update(functions)
    monkeypatch.setitem(sys.modules, "aiter", package)
    monkeypatch.setitem(sys.modules, "aiter.ops", ops)
    aiter_standin.forget(monkeypatch)


def test_another_package_of_the_name(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", types.ModuleType("aiter"))
    monkeypatch.delitem(sys.modules, "aiter.ops", raising=False)
    aiter_standin.forget(monkeypatch)
    assert aiter_api.problem() == "the installed aiter is not AMD's (it has no aiter.ops)"


def test_no_aiter(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", None)
    aiter_standin.forget(monkeypatch)
    assert aiter_api.problem() == "aiter is not installed"


def test_an_unknown_signature_is_named(monkeypatch) -> None:
    def plain(x, gamma, eps): ...

    def add(*args): ...

    _module(monkeypatch, rmsnorm2d_fwd=plain, rmsnorm2d_fwd_with_add=add)
    assert aiter_api.problem() == (
        "unknown version of aiter: rmsnorm2d_fwd(x, gamma, eps); rmsnorm2d_fwd_with_add(?)"
    )


def test_too_old(monkeypatch) -> None:
    _module(monkeypatch, rmsnorm2d_fwd=lambda input, weight, epsilon: None)
    message = "the installed aiter is too old: it has no rmsnorm2d_fwd_with_add"
    assert aiter_api.problem() == message


def test_an_import_that_fails_is_one_line(monkeypatch, tmp_path) -> None:
    (tmp_path / "aiter").mkdir()
    (tmp_path / "aiter" / "__init__.py").write_text("raise RuntimeError('no hipcc\\nsee log')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    aiter_standin.forget(monkeypatch)
    assert aiter_api.problem() == "importing aiter failed: RuntimeError: no hipcc"


def test_without_an_amd_gpu_aiter_is_not_even_imported(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", None)
    assert aiter.unavailable() == "no AMD GPU"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    aiter_standin.forget(monkeypatch)
    assert aiter.prepare(NormSpec.parse(SPEC), 64) == "aiter is not installed"


def _norm(x, w):
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * w).to(x.dtype)


def _nothing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "aiter", None)
    aiter_standin.forget(monkeypatch)


def _old(monkeypatch) -> None:
    _module(monkeypatch, rmsnorm2d_fwd=lambda input, weight, epsilon: None)


UNUSABLE = {
    "missing": (_nothing, "aiter is not installed"),
    "old": (_old, "the installed aiter is too old: it has no rmsnorm2d_fwd_with_add"),
}


@pytest.mark.parametrize("providers", ["auto", "aiter,triton"])
@pytest.mark.parametrize("name", UNUSABLE)
def test_on_an_amd_gpu_the_next_provider_takes_over(name, providers, monkeypatch) -> None:
    """Left to choose or named: one line in the report, and no warning."""
    break_it, line = UNUSABLE[name]
    break_it(monkeypatch)
    _pretend_amd(monkeypatch)
    shapes = [((8, 64), torch.float16), ((64,), torch.float16)]
    graph_module, _ = captured(_norm, shapes)
    report = pipeline.dry_run(graph_module.graph, Options(providers=providers, strict=True))
    (site,) = report.rewritten
    assert site.kernel == "triton.row"
    assert [text for text in site.refusals if line in text] == [f"refused aiter.rms_norm: {line}"]


def _pretend_amd(monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(platforms, "_arch", lambda device: "gfx942")
