"""The demo's models planned for an AMD GPU and run against the strict stand-in for aiter."""

from __future__ import annotations

import sys
from pathlib import Path

import aiter_standin
import pytest
import torch
from helpers import Level, capture, cloned, flat, rewritten
from kernel_cases import same_bits

from fxpass.options import Options

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from models import CORE, MORE

AITER = Options(providers=("aiter", "reference"), platform="rocm:gfx942", strict=True)
REFERENCE = Options(providers=("reference",), strict=True)
MODELS = {**CORE, **MORE}
WITHOUT = {"Gemma 3"}
"""Its norms mean what no kernel of aiter computes: 1 + weight."""


def _levels(built) -> list[Level]:
    """The ATen graphs of one call, with their inputs."""
    names = list(built.inputs)

    def run(*values):
        return built.model(**dict(zip(names, values, strict=True)))

    return capture(run, list(built.inputs.values())).graphs("aten")


@pytest.mark.filterwarnings("ignore")  # of Dynamo, about the models
@pytest.mark.parametrize(
    "name",
    [*CORE, "Wan", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE if name != "Wan")],
)
def test_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    standin = aiter_standin.install(monkeypatch, "gemma_norm before the flag")
    built = MODELS[name].make(batch=2)
    with torch.no_grad():
        levels = _levels(built)
        for level in levels:
            made, report = rewritten(level, AITER)
            plain, _ = rewritten(level, REFERENCE)
            taken = [site for site in report.rewritten if site.kernel.startswith("aiter.")]
            before = len(standin.calls)
            found = flat(made(*cloned(level.inputs)))
            wanted = flat(plain(*cloned(level.inputs)))
            assert len(standin.calls) - before == len(taken)
            pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if hasattr(a, "dtype")]
            assert all(same_bits(a, b) for a, b in pairs if a.dtype.is_floating_point)
    assert bool(standin.calls) != (name in WITHOUT)
