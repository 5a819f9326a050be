"""Bisecting over rewrites: a kernel that is wrong for one norm is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fxpass import cli, kernels
from fxpass.cli_bisect import first_failing

MODELS = str(Path(__file__).parent / "cli_models.py")
MAKE = f"{MODELS}:make"


@pytest.mark.parametrize("most", [1, 2, 7, 16])
def test_every_first_failure_is_found(most: int) -> None:
    for first in range(1, most + 1):
        asked: list[int] = []

        def fails(count: int, first: int = first, asked: list[int] = asked) -> bool:
            asked.append(count)
            return count >= first

        assert first_failing(fails, most) == first
        assert len(asked) <= most.bit_length()


@pytest.fixture
def zeros():
    """A kernel, preferred to all others, that gives zeros for norms in nn.RMSNorm's order."""
    good = kernels.by_name("reference.eager")

    def launch(spec, x, residual, weight, bias, eps):
        found = good.launch(spec, x, residual, weight, bias, eps)
        wrong = spec.rounding.value == "scale_then_cast"
        return tuple(tensor * 0 for tensor in found) if wrong else found

    kernels.register(dataclasses.replace(good, name="wrong.zeros", launch=launch))
    yield
    kernels.unregister("wrong.zeros")


@pytest.mark.usefixtures("zeros")
def test_wrong_kernel_is_found(capsys) -> None:
    code = cli.main(["bisect", MAKE, "--check", f"{MODELS}:check_close", "--eager"])
    out, err = capsys.readouterr()
    assert code == 1
    assert out.startswith("rewrite 4 makes the check fail: norm (")
    assert "rms_norm.scale_then_cast -> wrong.zeros" in out
    assert "3 of 4 rewrites: passes" in err


def test_check_that_passes(capsys) -> None:
    code = cli.main(["bisect", MAKE, "--check", f"{MODELS}:check_shape", "--eager"])
    assert code == 0
    assert "the check passes with all 4 rewrites" in capsys.readouterr().out


def test_check_that_never_passes(capsys) -> None:
    code = cli.main(["bisect", MAKE, "--check", f"{MODELS}:check_never", "--eager"])
    assert code == 2
    assert "fails without any rewrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("check", "said"), [("nothing", "names no function"), (f"{MODELS}:chek", "has no 'chek'")]
)
def test_broken_check(capsys, check: str, said: str) -> None:
    assert cli.main(["bisect", MAKE, "--check", check, "--eager"]) == 2
    assert said in capsys.readouterr().err


def test_fake_model_cannot_be_checked(capsys) -> None:
    code = cli.main(["bisect", MAKE, "--check", f"{MODELS}:check_shape", "--fake"])
    assert code == 2
    assert "--fake cannot be used" in capsys.readouterr().err


@pytest.mark.slow
def test_with_inductor(capsys) -> None:
    code = cli.main(["bisect", MAKE, "--check", f"{MODELS}:check_shape"])
    assert code == 0
    assert "passes with all 4" in capsys.readouterr().out
