"""The torch-upgrade guard: every spelling is found at every hook, every near miss at none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fxpass import cli, corpus, corpus_rows
from fxpass.corpus_rows import Group

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@pytest.fixture(scope="module")
def lines():
    return corpus.replay()


def test_installed_torch_hides_no_spelling(lines) -> None:
    assert [fault for line in lines for fault in line.faults] == []
    assert sum(bool(line.norms) for line in lines) >= 35
    assert sum(not line.norms for line in lines) >= 15


def test_every_near_miss_but_one_gets_a_reason(lines) -> None:
    silent = [
        line.name
        for line in lines
        if not line.norms and any(c.state != corpus.DECLINED for c in line.cells.values())
    ]
    assert silent == ["F.layer_norm"]  # one operator, which does not look like a norm at all


def test_names_are_unique() -> None:
    names = [name for group in corpus_rows.GROUPS for name in group.rows]
    assert len(names) == len(set(names))


def test_committed_result_is_that_of_this_version(lines) -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    path = RESULTS / f"corpus_torch{version}.json"
    if not path.exists():
        pytest.skip(f"no committed result for torch {version}")
    found = json.loads(json.dumps(corpus.to_dict(lines)["spellings"]))
    assert json.loads(path.read_text())["spellings"] == found, (
        f"fxpass corpus --json {path.relative_to(RESULTS.parent.parent)}, and read the diff"
    )


@pytest.mark.parametrize("version", ["2.11", "2.13", "2.15"])
def test_committed_results_hold_every_row_and_no_fault(version: str) -> None:
    found = json.loads((RESULTS / f"corpus_torch{version}.json").read_text())
    assert found["torch"].startswith(f"{version}.")
    lines = [
        corpus.Line(s["name"], s["norms"], {h: corpus.Cell(**c) for h, c in s["cells"].items()})
        for s in found["spellings"]
    ]
    assert [line.name for line in lines] == [n for g in corpus_rows.GROUPS for n in g.rows]
    assert [fault for line in lines for fault in line.faults] == []
    assert all(tuple(line.cells) == corpus.HOOKS for line in lines)


def _wrong() -> Group:
    return Group(("f32[4,64]",), 1, {"cubes": lambda x: x * torch.rsqrt(x.pow(3).mean(-1, True))})


def test_lost_spelling_fails(capsys, monkeypatch, tmp_path: Path) -> None:
    groups = (_wrong(), Group(("f32[4,64]",), 0, {"a norm": corpus_rows.FLOAT32["float32"]}))
    monkeypatch.setattr(corpus, "replay", lambda old=corpus.replay: old(groups))
    assert cli.main(["corpus", "--json", str(tmp_path / "out.json")]) == 1
    out, err = capsys.readouterr()
    assert "1 spellings, 1 near misses, 2 not as they should be" in out
    assert "fxpass: cubes at post-grad: declined: " in err
    assert "fxpass: a norm at export: found: rms_norm" in err
    assert len(json.loads((tmp_path / "out.json").read_text())["spellings"]) == 2


def test_spelling_that_cannot_be_compiled_hides_no_other() -> None:
    def broken(x):
        raise ValueError("not today")

    rows = {"broken": broken, "float32": corpus_rows.FLOAT32["float32"]}
    first, second = corpus.replay([Group(("f32[4,64]",), 1, rows)])
    assert {cell.state for cell in first.cells.values()} == {corpus.ERROR}
    assert len(first.faults) == 4
    assert not second.faults
