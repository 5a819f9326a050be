"""The report: one object as text and as JSON, with a place and a reason for everything."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch
from cases_rounding import unit
from helpers import tensors

import fxpass


def llama(x, w):
    return w * unit(x).to(w.dtype)


def mixed(x, w):
    wrong = x * torch.rsqrt(x.float().pow(2).mean(0, keepdim=True) + 1e-6)
    return llama(x, w) + wrong


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.RMSNorm(64).bfloat16() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


OPTIONS = fxpass.Options(providers=("reference",), strict=True)


@pytest.fixture(scope="module")
def report():
    with torch.no_grad():
        return fxpass.explain(mixed, *tensors("bf16[2,8,64]", "bf16[64]"), options=OPTIONS)


def test_summary_counts_both(report) -> None:
    assert report.summary() == "rewrote 1 of 2 norms in 1 graph(s) (reference.eager x1)"
    assert report.kernels == {"reference.eager": 1}


def test_places_are_the_users_own_lines(report) -> None:
    (site,), (declined,) = report.rewritten, report.declined
    lines = pathlib.Path(__file__).read_text().splitlines()
    path, _, line = declined.location.rpartition(":")
    assert path == __file__
    assert lines[int(line) - 1].strip() == declined.source
    assert "mean is over dim -3" in declined.reason
    assert site.source == "return w * unit(x).to(w.dtype)"


def test_json_follows_the_schema(report) -> None:
    found = json.loads(report.to_json())
    assert found["version"] == 1
    assert found["graphs"] == 1
    (site,) = found["rewritten"]
    assert site["rounding"] == "cast_then_scale"
    assert site["inverse"] == "rsqrt"
    assert site["hidden"] == 64
    assert site["eps"] == 1e-6
    assert site["nodes_before"] > site["nodes_after"] == 1
    assert str(fxpass.NormSpec.parse(site["spec"])) == site["spec"]
    (declined,) = found["declined"]
    assert set(declined) == {"node", "reason", "location", "source", "module"}


def test_rows_are_flat_and_alike(report) -> None:
    assert report.sites == [*report.rewritten, *report.declined]
    rewritten, declined = report.rows()
    assert list(rewritten) == list(declined)
    assert (rewritten["status"], declined["status"]) == ("rewritten", "declined")
    assert rewritten["kernel"] == "reference.eager"
    assert rewritten["reason"] is None
    assert rewritten["layout_nodes"] == ""
    assert declined["kernel"] is None
    assert "mean is over dim -3" in declined["reason"]
    values = [value for row in (rewritten, declined) for value in row.values()]
    assert all(value is None or isinstance(value, (str, int, float)) for value in values)


def test_text_holds_both_tables(report) -> None:
    text = str(report)
    assert "rms_norm.cast_then_scale" in text
    assert "test_report.py:" in text
    assert "only the last dims can be fused" in text


def test_modules_are_named() -> None:
    with torch.no_grad():
        report = fxpass.explain(Model(), torch.randn(4, 64).bfloat16(), options=OPTIONS)
    assert [site.module for site in report.rewritten] == ["layers.0", "layers.1"]


def test_reports_add_up() -> None:
    fxpass.reset_report()
    total = fxpass.Report()
    for _ in range(2):
        graph_module = torch.fx.symbolic_trace(llama)
        inputs = tensors("bf16[2,8,64]", "bf16[64]")
        total.add(fxpass.rewrite(graph_module, *inputs, options=OPTIONS))
    assert len(total.rewritten) == 2
    assert total.graphs == 2
    assert fxpass.last_report().summary() == total.summary()
    assert fxpass.reset_report().summary() == total.summary()
    assert not fxpass.last_report().rewritten


def test_explain_changes_and_compiles_nothing() -> None:
    model = Model()
    x = torch.randn(4, 64).bfloat16()
    with torch.no_grad():
        before = model(x)
        first = fxpass.explain(model, x, options=OPTIONS)
        second = fxpass.explain(model, x, options=OPTIONS)
        assert torch.equal(before, model(x))
    assert first.to_dict() == second.to_dict()
