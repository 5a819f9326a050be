"""Options: where they come from, and one clear line for each that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fxpass
from fxpass.options import Options, names


def test_defaults() -> None:
    assert Options.make() == Options()
    assert Options().providers == ("auto",)


def test_text_and_sequences_of_providers() -> None:
    assert Options(providers="cpu, reference").providers == ("cpu", "reference")
    assert Options(providers=["cpu"]).providers == ("cpu",)


def test_options_are_hashable() -> None:
    assert len({Options(), Options(fuel=1), Options(fuel=1)}) == 2


WRONG = {
    "unknown": ({"rouding": "source"}, r"option 'rouding' is unknown; did you mean 'rounding'\?"),
    "rounding": ({"rounding": "cast_then_scal"}, r"did you mean 'cast_then_scale'\?"),
    "numerics": ({"numerics": "exact"}, r"numerics 'exact' is unknown"),
    "fuel": ({"fuel": -1}, r"fuel=-1"),
    "fuel_kind": ({"fuel": "2"}, r"fuel='2'"),
    "expect": ({"expect": 1.5}, r"expect=1.5"),
    "strict": ({"strict": 1}, r"strict=1; use True or False"),
    "verify": ({"verify": None}, r"verify=None; use True or False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_one_line(name: str) -> None:
    given, pattern = WRONG[name]
    with pytest.raises(fxpass.OptionsError, match=pattern) as raised:
        Options.make(given)
    assert "\n" not in str(raised.value)


def test_unknown_provider_names_the_nearest() -> None:
    with pytest.raises(fxpass.OptionsError, match=r"did you mean 'reference'\?"):
        fxpass.explain(torch.sin, torch.ones(2), options=Options(providers=("referense",)))


ENVIRONMENT = {
    "FXPASS_PROVIDERS": ("cpu,reference", {"providers": ("cpu", "reference")}),
    "FXPASS_FUEL": ("3", {"fuel": 3}),
    "FXPASS_STRICT": ("1", {"strict": True}),
    "FXPASS_VERIFY": ("true", {"verify": True}),
    "FXPASS_ROUNDING": ("scale_then_cast", {"rounding": "scale_then_cast"}),
    "FXPASS_EXPECT": ("0", {"expect": 0}),
}


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_environment(name: str, monkeypatch) -> None:
    text, expected = ENVIRONMENT[name]
    monkeypatch.setenv(name, text)
    assert Options.make() == Options(**expected)


def test_arguments_win_over_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("FXPASS_FUEL", "3")
    assert Options.make({"fuel": 1}).fuel == 1
    assert Options.make(fuel=2).fuel == 2
    assert Options.make(Options()).fuel is None


@pytest.mark.parametrize(("name", "text"), [("FXPASS_FUEL", "many"), ("FXPASS_STRICT", "yes")])
def test_wrong_environment_names_the_variable(name: str, text: str, monkeypatch) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(fxpass.OptionsError, match=name):
        Options.make()


def test_every_option_has_a_documented_name() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    assert [name for name in names() if f"`{name}`" not in readme] == []


@pytest.mark.parametrize("platform", ["rocm:gfx942", "cuda:sm_90", "cpu", "rocm"])
def test_platform(platform: str) -> None:
    assert Options(platform=platform).platform == platform


@pytest.mark.parametrize(
    ("platform", "message"),
    [
        ("rcom:gfx942", "platform 'rcom:gfx942' is unknown"),
        ("rocm:", "use for example 'rocm:gfx942'"),
        (942, "platform 942 is unknown"),
    ],
)
def test_a_wrong_platform(platform: object, message: str) -> None:
    with pytest.raises(fxpass.OptionsError, match=message):
        Options(platform=platform)
