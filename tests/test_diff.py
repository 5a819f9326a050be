"""Before and after: every node is on the side it should be, every change belongs to a site."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from cli_models import make_misspelt

from fxpass import cli, diff, diff_text, target
from fxpass.options import Options
from fxpass.torch_private import inside_inductor

TARGET = f"{Path(__file__).parent / 'cli_models.py'}:make_misspelt"


@pytest.fixture(scope="module")
def graphs():
    model, args = make_misspelt()
    return target.Target("model", model, args).graphs()


@pytest.fixture(scope="module")
def made(graphs):
    with inside_inductor():
        return diff.of_graphs("model", graphs, Options(providers=("reference",), strict=True))


def test_graphs_stay_as_they_were(graphs, made) -> None:
    before = [row.before for row in made.graphs[0] if row.before]
    assert len(before) == len(graphs[0].graph.nodes)
    assert not any("reference.eager" in line for line in before)


def test_every_change_belongs_to_a_site(made) -> None:
    changed = [row for row in made.graphs[0] if row.mark != " "]
    assert {row.site for row in changed} == {0, 1, 2, 3}
    assert all(row.site is None for row in made.graphs[0] if row.mark == " ")
    assert sum("reference.eager" in row.after for row in made.graphs[0]) == 4


def test_sites_say_what_came_and_went(made) -> None:
    site = made.sites[0]
    assert site.record.module == "layers.0"
    assert len(site.before) == site.record.nodes_before
    assert len(site.after) == site.record.nodes_after
    assert any("rsqrt(" in line for line in site.before)
    assert "@ reference.eager" in site.after[0]


def test_flow_connects_what_is_read(made) -> None:
    flow = made.sites[0].flow_before
    assert flow.inputs == 2
    assert any(label.startswith("rsqrt\n") for label in flow.labels)
    assert all(edge.source < edge.target for edge in flow.edges)
    reached = {edge.source for edge in flow.edges}
    assert reached == set(range(len(flow.labels) - 1))


def test_report_is_that_of_a_dry_run(made) -> None:
    assert made.report.summary() == "rewrote 4 of 5 norms in 1 graph(s) (reference.eager x4)"


def test_text_shows_alike_sites_once(made) -> None:
    text = diff_text.text(made)
    assert text.count("@ layers.") == 2
    assert "@ layers.1 and 1 more alike" in text
    assert "  also: layers.2" in text
    assert "! declined %" in text
    assert "\033" not in text
    assert diff_text.text(made, every=True).count("\n@ layers.") == 3


def test_text_of_whole_graphs(made) -> None:
    text = diff_text.text(made, graph=True)
    assert text.count("reference.eager") > diff_text.text(made).count("reference.eager") - 1
    assert "# graph 0" in text


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch, made) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert diff_text.wants_colour(Terminal())
    assert not diff_text.wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not diff_text.wants_colour(Terminal())
    assert "\033[32m+ %" in diff_text.text(made, colour=True)


def test_command_writes_json(capsys, tmp_path: Path) -> None:
    path = tmp_path / "diff.json"
    assert cli.main(["diff", TARGET, "--json", str(path)]) == 0
    assert "rewrote 4 of 5" in capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["version"] == 1
    assert [site["site"] for site in found["sites"]] == [0, 1, 2, 3]
    assert found["report"]["version"] == 1
    assert cli.main(["explain", TARGET, "--baseline", str(path)]) == 0


def test_file_that_cannot_be_written(capsys, tmp_path: Path) -> None:
    path = str(tmp_path / "no" / "diff.json")
    assert cli.main(["diff", TARGET, "--json", path]) == 2
    assert f"fxpass: cannot write {path}: No such file" in capsys.readouterr().err
