"""Artifacts of a compile: where tlparse and TORCH_COMPILE_DEBUG put them, and no cost elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases_rounding import unit
from helpers import tensors

import fxpass
from fxpass import artifacts, printing, torch_fakes, torch_private

NAMES = ["fxpass_before", "fxpass_after", "fxpass_report"]
SCRIPT = """
import torch, fxpass, sys
def norm(x, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)
def plain(x, w):
    return x + w
x, w = torch.randn(4, 64).bfloat16(), torch.ones(64).bfloat16()
options = {"providers": ("reference",)}
with torch.no_grad():
    if sys.argv[1] == "backend":
        torch.compile(norm, backend=fxpass.rmsnorm_backend, options=options)(x, w)
        torch.compile(plain, backend=fxpass.rmsnorm_backend, options=options)(x, w)
    else:
        with fxpass.install(providers=("reference",)):
            torch.compile(norm)(x, w)
"""


def _compile(how: str, folder: Path, **variables: str) -> None:
    command = [sys.executable, "-c", SCRIPT, how]
    environment = {**os.environ, **variables}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("how", ["backend", "hook"])
def test_both_places_get_the_graph_that_was_rewritten(how: str, tmp_path: Path) -> None:
    trace, debug = tmp_path / "trace", tmp_path / "debug"
    _compile(
        how,
        tmp_path,
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
        TORCH_TRACE=str(trace),
        TORCH_COMPILE_DEBUG="1",
        TORCH_COMPILE_DEBUG_DIR=str(debug),
    )
    (log,) = trace.iterdir()
    lines = log.read_text().splitlines()
    headers = [json.loads(line[line.index("{") :]) for line in lines if line.startswith("V")]
    ours = [h for h in headers if h.get("artifact", {}).get("name", "").startswith("fxpass")]
    assert [h["artifact"]["name"] for h in ours] == NAMES
    assert all("frame_id" in h for h in ours)  # so tlparse puts them under their compile
    files = {path.stem: path for path in debug.rglob("fxpass_*")}
    assert sorted(files) == sorted(NAMES)
    assert (files["fxpass_after"].parent / "output_code.py").exists()
    assert "rsqrt(" in files["fxpass_before"].read_text()
    after = files["fxpass_after"].read_text()
    assert "rsqrt(" not in after
    assert "@ reference.eager" in after
    assert len(json.loads(files["fxpass_report"].read_text())["rewritten"]) == 1


@pytest.fixture
def graph():
    graph_module = torch.fx.symbolic_trace(lambda x, w: w * unit(x).to(w.dtype))
    torch_fakes.propagate_fakes(graph_module, tensors("bf16[2,8,64]", "bf16[64]"))
    return graph_module.graph


def _pass(graph, **changes) -> fxpass.Report:
    rms_pass = fxpass.RMSNormPass(providers=("reference",), **changes)
    rms_pass(graph)
    return rms_pass.report


def test_nothing_is_printed_when_nobody_looks(monkeypatch, graph) -> None:
    monkeypatch.setattr(torch_private, "is_tracing", lambda: False)
    monkeypatch.setattr(printing, "lines", lambda graph: pytest.fail("printed"))
    assert len(_pass(graph, strict=True).rewritten) == 1


def test_second_graph_of_a_folder_gets_a_number(monkeypatch, graph, tmp_path: Path) -> None:
    monkeypatch.setattr(torch_private, "is_tracing", lambda: False)
    monkeypatch.setattr(torch_private, "debug_folder", lambda: str(tmp_path))
    found = _pass(graph, strict=True)
    for number in ("_1", "_2"):
        artifacts.recorded(graph, lambda: found, strict=True)
        assert (tmp_path / f"fxpass_report{number}.json").exists()
    assert len(list(tmp_path.iterdir())) == 9


def test_failing_to_write_breaks_strict_compiles_only(monkeypatch, graph, caplog) -> None:
    monkeypatch.setattr(torch_private, "is_tracing", lambda: False)
    monkeypatch.setattr(torch_private, "debug_folder", lambda: "/dev/null/none")
    assert len(_pass(graph).rewritten) == 1
    assert "artifacts not written: NotADirectoryError" in caplog.text
    report = fxpass.Report(errors=["the graph is rewritten already"])
    with pytest.raises(NotADirectoryError):
        artifacts.recorded(graph, lambda: report, strict=True)
