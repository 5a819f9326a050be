"""The examples run, and print what they are there to show."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SHOWN = {
    "quickstart": ["rewrote 3 of 3 norms", "elements differ from eager"],
    "inspect_model": ["rewrote 9 of 9 norms", "+ %norm", "like it: 1 norms"],
    "inductor_pass": ["in a stack's config: rewrote 1 of 1", "installed behind another: rewrote 1"],
    "add_a_variant": ["eps is added outside the root", "rewrote 1 of 1", "bits as before: True"],
    "add_a_kernel": ["mine.rows", "rows(x)", "refused mine.rows: rounding scale_then_cast"],
}
NEEDS = {"inspect_model": "transformers"}


@pytest.fixture(autouse=True)
def config_as_before():
    """Examples set Inductor's config as a script would."""
    from torch._inductor import config

    with config.patch(force_disable_caches=config.force_disable_caches):
        yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize("name", SHOWN)
def test_example_runs(name: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert [text for text in SHOWN[name] if text not in out] == [], out
