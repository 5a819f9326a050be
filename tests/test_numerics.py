"""fxpass diff --numerics: counts of elements and ulps that are right, and where they enter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from cli_models import make, make_branch

from fxpass import cli, numerics, sampling
from fxpass.errors import FxpassError
from fxpass.options import Options
from fxpass.target import Target

TARGET = f"{Path(__file__).parent / 'cli_models.py'}:make"
REFERENCE = Options(providers=("reference",), strict=True)
NAN = float("nan")


def _next(x: torch.Tensor, up: float = float("inf")) -> torch.Tensor:
    return torch.nextafter(x, torch.full_like(x, up))


def test_change_counts_elements_and_steps() -> None:
    x = torch.tensor([1.0, -2.0, 0.0, NAN]).bfloat16()
    assert numerics.change(x, x) == numerics.Change(4, 0, 0)
    assert numerics.change(x, torch.tensor([1.0, -2.0, -0.0, NAN]).bfloat16()).differ == 0
    assert numerics.change(x, _next(_next(x))) == numerics.Change(4, 3, 2)
    small = torch.tensor([torch.finfo(torch.float32).smallest_normal * 2**-23])
    assert numerics.change(-small, small) == numerics.Change(1, 1, 2)  # across zero
    assert numerics.change(torch.tensor([1, 2]), torch.tensor([1, 3])) == numerics.Change(2, 1, 0)


@pytest.fixture(scope="module")
def numbers():
    return numerics.measure(Target("model", *make()), REFERENCE)


def test_reference_kernel_changes_no_site(numbers) -> None:
    assert [site.name for site in numbers.sites] == ["layers.0", "layers.1", "layers.2", "norm"]
    assert all(site.change.differ == 0 for site in numbers.sites)
    # 16 rows of 64, and the sum with the residual where the norm takes the add over.
    assert [site.change.elements for site in numbers.sites] == [1024, 2048, 2048, 1024]
    assert numbers.first is None
    assert "no norm differs" in numerics.text(numbers)


def test_model_keeps_eagers_bits_where_inductor_does_not(numbers) -> None:
    rows = {row.what: row for row in numbers.whole}
    assert list(rows) == [
        "rewritten / eager",
        "rewritten / Inductor",
        "rewritten / Inductor, casts emulated",
        "rewritten, casts emulated / eager",
        "Inductor / eager",
    ]
    assert rows["rewritten, casts emulated / eager"].change.differ == 0
    assert rows["rewritten / eager"].change.differ == 0
    assert rows["rewritten / eager"].first_output is None
    assert rows["rewritten / eager"].top1 == 1.0
    assert rows["Inductor / eager"].change.differ > 0
    assert rows["Inductor / eager"].first_output == 0


def test_first_site_that_differs_is_named(monkeypatch) -> None:
    def wrong(plan, env, right=sampling.run_kernel):
        made = right(plan, env)
        if plan.site.module == "layers.1":
            made["out"][0, 0] = _next(made["out"][0, 0])
        return made

    monkeypatch.setattr(sampling, "run_kernel", wrong)
    monkeypatch.setattr(numerics, "_wholes", lambda target, options: [])
    numbers = numerics.measure(Target("model", *make()), REFERENCE)
    assert numbers.first is numbers.sites[1]
    assert numbers.first.change == numerics.Change(2048, 64, 1)
    assert numbers.to_dict()["first_site"] == 1
    text = numerics.text(numbers)
    assert "enters at layers.1 (" in text
    assert "64 of 2048 elements, up to 1 ulp" in text


def test_command_prints_and_writes(capsys, tmp_path: Path, monkeypatch, numbers) -> None:
    monkeypatch.setattr(numerics, "measure", lambda target, options: numbers)
    path = tmp_path / "diff.json"
    assert cli.main(["diff", TARGET, "--numerics", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "rewrote 4 of 4 norms" in out
    assert "rewritten / Inductor, casts emulated" in out
    found = json.loads(path.read_text())["numerics"]
    assert found["sites"][0]["change"] == {"elements": 1024, "differ": 0, "ulps": 0}
    assert found["first_site"] is None


def test_target_that_cannot_run_is_one_line(capsys) -> None:
    assert cli.main(["diff", TARGET, "--numerics", "--fake"]) == 2
    assert "runs the model, so --fake cannot be used" in capsys.readouterr().err
    with pytest.raises(FxpassError, match="folder holds graphs without values"):
        numerics.measure(Target("folder"), REFERENCE)


def test_model_that_raises_is_one_line() -> None:
    def broken(x):
        raise ValueError("out of luck")

    target = dataclasses.replace(Target("model", *make()), model=broken)
    with pytest.raises(FxpassError, match=r"numerics: model: .*out of luck"):
        numerics.measure(target, REFERENCE)


@pytest.mark.parametrize("sign", [1, -1])
def test_norms_in_a_branch_are_measured_where_they_run(monkeypatch, sign: int) -> None:
    """One norm outside, one in the branch that positive values take."""
    monkeypatch.setattr(numerics, "_wholes", lambda target, options: [])
    model, (x,) = make_branch()
    found = numerics.measure(Target("branch", model, (sign * x.abs(),)), REFERENCE)
    assert len(found.sites) == (2 if sign > 0 else 1)
    assert all(site.change == numerics.Change(1024, 0, 0) for site in found.sites)
