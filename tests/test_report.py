"""The report: one object as text and as JSON, with a place and a reason for everything."""

from __future__ import annotations

import dataclasses
import html
import json
import pathlib
import re

import pytest
import torch
from cases_rounding import unit
from helpers import tensors

import fxpass
from fxpass import sampling


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
CPU = fxpass.Options(providers=("cpu",), strict=True)


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


def test_diff_of_explained(report) -> None:
    shown = report.diff()
    assert shown.data.report.to_dict() == report.to_dict()
    text = str(shown)
    assert text == repr(shown)
    assert "\n- %" in text
    assert "+ %" in text
    assert "@ reference.eager" in text
    assert "! declined %" in text
    assert "# graph 0" in shown.text(graph=True)
    assert shown.to_dict()["report"] == report.to_dict()


def test_diff_in_a_notebook_is_the_page(report) -> None:
    shown = report.diff()
    (page,) = re.findall(r'^<iframe [^<>]* srcdoc="([^"]*)"></iframe>$', shown._repr_html_())
    assert html.unescape(page) == shown.html()
    assert "mean is over dim -3" in shown.html()


def test_diff_of_rewritten_shows_what_was_there() -> None:
    x, w = tensors("bf16[2,8,64]", "bf16[64]")
    graph_module = torch.fx.symbolic_trace(mixed)
    report = fxpass.rewrite(graph_module, x, w, options=OPTIONS)
    (site,) = report.diff().data.sites
    assert any("rsqrt" in line for line in site.before)
    (made,) = [n for n in graph_module.graph.nodes if "reference.eager" in n.args]
    assert site.after[0].startswith(f"%{made.name}: bf16[2,8,64]")


def test_a_compile_keeps_no_graphs() -> None:
    fxpass.reset_report()
    fxpass.rewrite(torch.fx.symbolic_trace(llama), *tensors("bf16[2,8,64]", "bf16[64]"))
    found = fxpass.last_report()
    assert found.rewritten
    assert not found.kept
    with pytest.raises(fxpass.FxpassError, match=r"use fxpass.explain\(model, \*inputs\).diff"):
        found.diff()


def test_diffs_add_up(report) -> None:
    total = fxpass.Report()
    total.add(report)
    total.add(report)
    shown = total.diff().data
    assert [site.graph for site in shown.sites] == [0, 1]
    assert {row.site for row in shown.graphs[1] if row.mark != " "} == {1}


def test_verify_counts_in_the_diff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "difference", lambda plan: "verify: made up")
    options = dataclasses.replace(OPTIONS, verify=True)
    with torch.no_grad():
        found = fxpass.explain(llama, *tensors("bf16[2,8,64]", "bf16[64]"), options=options)
    assert not found.rewritten
    assert found.diff().data.report.to_dict() == found.to_dict()


def test_traffic_of_a_norm_counted_by_hand() -> None:
    """cast, pow, mean, add, rsqrt, mul, cast, mul: the two casts and all between in float32."""
    options = fxpass.Options(providers=("cpu",), strict=True)
    with torch.no_grad():
        found = fxpass.explain(llama, *tensors("bf16[2,8,64]", "bf16[64]"), options=options)
    (site,) = found.rewritten
    n, rows, w = 2 * 8 * 64, 2 * 8, 64
    reads = 2 * n + 4 * n + 4 * n + 4 * rows + 4 * rows + (4 * n + 4 * rows) + 4 * n + 2 * (n + w)
    writes = 4 * n + 4 * n + 4 * rows + 4 * rows + 4 * rows + 4 * n + 2 * n + 2 * n
    assert (site.launches_before, site.bytes_before) == (8, reads + writes)
    assert (site.launches_after, site.bytes_after) == (1, 2 * n + 2 * w + 2 * n)


def test_traffic_with_copies() -> None:
    """Each is a launch, which reads and writes what it copies; the transpose itself is none."""

    def across(x, w):
        return llama(x.transpose(1, 2), w)

    options = fxpass.Options(providers=("cpu",), strict=True)
    with torch.no_grad():
        found = fxpass.explain(across, *tensors("bf16[2,8,64]", "bf16[8]"), options=options)
    (site,) = found.rewritten
    size = 2 * 8 * 64 * 2
    assert [node.partition(" ")[0] for node in site.layout_nodes] == [
        "contiguous(x)",
        "restride(out)",
    ]
    assert (site.launches_before, site.launches_after) == (8, 3)
    assert site.bytes_after == (2 * size + 2 * 8) + 2 * size + 2 * size


def test_traffic_does_not_depend_on_when_it_is_asked() -> None:
    """A graph that has been rewritten no longer has the old nodes' inputs."""
    inputs = tensors("bf16[2,8,64]", "bf16[64]")
    rewritten = fxpass.rewrite(torch.fx.symbolic_trace(llama), *inputs, providers="cpu")
    with torch.no_grad():
        planned = fxpass.explain(llama, *inputs, options=fxpass.Options(providers=("cpu",)))
    (one,), (two,) = rewritten.rewritten, planned.rewritten
    assert (one.bytes_before, one.bytes_after) == (two.bytes_before, two.bytes_after)


def test_traffic_of_symbolic_sizes_is_unknown() -> None:
    with torch.no_grad():
        x, w = tensors("bf16[5,64]", "bf16[64]")
        torch._dynamo.mark_dynamic(x, 0)
        found = fxpass.explain(llama, x, w, options=fxpass.Options(providers=("cpu",)))
    (site,) = found.rewritten
    assert (site.launches_before, site.launches_after) == (8, 1)
    assert site.bytes_before is site.bytes_after is None


def test_traffic_is_unknown_where_the_kernel_is_not_one_launch(report) -> None:
    (site,) = report.rewritten
    assert site.launches_before == 8
    assert site.launches_after is site.bytes_after is None


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


def test_one_explain_does_not_depend_on_another() -> None:
    """Dynamo makes a size symbolic that was another one before; here each call is the first."""
    with torch.no_grad():
        sizes = [
            fxpass.explain(llama, *tensors(f"bf16[{rows},64]", "bf16[64]"), options=CPU)
            for rows in (4, 5, 6)
        ]
    assert [found.rewritten[0].bytes_after for found in sizes] == [
        2 * (2 * rows * 64 + 64) for rows in (4, 5, 6)
    ]
