"""The pytest fixture, and the report in a notebook."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_models import make, make_misspelt

import fxpass
from fxpass import pytest_plugin

fxpass_report = pytest_plugin.fxpass_report

OPTIONS = fxpass.Options(providers=("reference",), strict=True)


def test_all_rewritten(fxpass_report) -> None:
    model, args = make()
    with torch.no_grad():
        fxpass_report.explain(model, *args, options=OPTIONS)
    fxpass_report.assert_all_rewritten(at_least=4)
    with pytest.raises(pytest.fail.Exception, match="expected all of them, and at least 5"):
        fxpass_report.assert_all_rewritten(at_least=5)


def test_near_miss_fails_with_line_and_reason(fxpass_report) -> None:
    model, args = make_misspelt()
    with torch.no_grad():
        fxpass_report.explain(model, *args, options=OPTIONS)
    with pytest.raises(pytest.fail.Exception) as caught:
        fxpass_report.assert_all_rewritten()
    assert "rewrote 4 of 5" in str(caught.value)
    assert "cli_models.py:" in str(caught.value)
    assert "mean is over dim -2" in str(caught.value)


def test_compiles_are_recorded_and_given_back() -> None:
    fxpass.reset_report()
    graph_module = torch.fx.symbolic_trace(torch.nn.RMSNorm(64))
    fxpass.rewrite(graph_module, torch.randn(4, 64), options=OPTIONS)
    assert len(pytest_plugin.RecordedReport().report.rewritten) == 1


def test_nothing_recorded_is_a_failure(fxpass_report) -> None:
    with pytest.raises(pytest.fail.Exception, match="rewrote 0 of 0"):
        fxpass_report.assert_all_rewritten()


def test_conftest_switches_it_on(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["fxpass.pytest_plugin"]\n')
    (tmp_path / "test_it.py").write_text(
        "def test(fxpass_report):\n    fxpass_report.assert_all_rewritten()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "rewrote 0 of 0 norms in 0 graph(s); expected all" in done.stdout


def test_notebooks_get_an_escaped_table() -> None:
    report = fxpass.Report(
        declined=[fxpass.Decline("mean_1", "mean is over dim -2", "a.py:1", "y = x <b>")]
    )
    html = report._repr_html_()
    assert "<td>y = x &lt;b&gt;</td>" in html
    assert "rewrote 0 of 1 norms" in html
