"""The command line as a shell sees it: what is printed where, and the exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fxpass import cli, cli_explain
from fxpass.cli_baseline import lost, parse
from fxpass.errors import FxpassError

MODELS = str(Path(__file__).parent / "cli_models.py")
GOOD, MISSPELT = f"{MODELS}:make", f"{MODELS}:make_misspelt"
COMMANDS = ("explain", "diff", "bisect", "corpus", "kernels", "doctor", "prove", "audit")


@pytest.fixture
def run(capsys):
    """`run("explain", TARGET)` -> (exit code, stdout, stderr)."""

    def call(*argv: str) -> tuple[int, str, str]:
        code = cli.main(argv)
        return (code, *capsys.readouterr())

    return call


def line_of(text: str) -> int:
    return Path(MODELS).read_text().splitlines().index(text) + 1


def shell(*argv: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fxpass", *argv]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"\n  fxpass {command}" in out.partition("example:")[2]


def test_no_command_and_unknown_command(run) -> None:
    assert run()[0] == 2
    code, _, err = run("explian")
    assert code == 2
    assert "invalid choice: 'explian'" in err


def test_version_in_a_shell() -> None:
    done = shell("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("fxpass ")


def test_misspelt_norm_is_pointed_at(run) -> None:
    code, out, err = run("explain", MISSPELT)
    assert code == 0
    assert not err
    line = line_of("    h = h * torch.rsqrt(h.pow(2).mean(dim, keepdim=True) + 1e-6)")
    assert "rewrote 4 of 5 norms" in out
    assert f"declined {MODELS}:{line} at %" in out
    assert "h.pow(2).mean(dim, keepdim=True)" in out
    assert "mean is over dim -2; only the last dims can be fused" in out


def test_alike_norms_share_a_row(run) -> None:
    _, out, _ = run("explain", GOOD)
    assert "2  layers.*" in out
    assert "layers.2" not in out
    _, out, _ = run("explain", GOOD, "--all")
    assert "layers.2" in out
    assert "layers.1" in out


def test_platform_plans_for_hardware_that_is_not_here(run) -> None:
    code, out, _ = run("explain", GOOD, "--platform", "cuda:sm_90", "--json")
    assert code == 0
    kernels = {site["kernel"] for site in json.loads(out)["rewritten"]}
    assert kernels
    assert not {name for name in kernels if name.startswith("cpu.")}
    code, _, err = run("explain", GOOD, "--platform", "cudda")
    assert code == 2
    assert "fxpass: options: platform" in err


@pytest.mark.parametrize(
    ("target", "expect", "code"),
    [(GOOD, "4", 0), (GOOD, "5", 1), (GOOD, "all", 0), (MISSPELT, "4", 0), (MISSPELT, "all", 1)],
)
def test_expect(run, target: str, expect: str, code: int) -> None:
    found, out, err = run("explain", target, "--expect", expect)
    assert found == code
    assert ("expected" in err) == bool(code)
    assert "expected" not in out


def test_expect_names_what_is_missing(run) -> None:
    _, _, err = run("explain", MISSPELT, "--expect", "all")
    assert "fxpass: expected all norms rewritten, found 4 of 5" in err
    assert "mean is over dim -2" in err
    assert f"{MODELS}:" in err


def test_baseline_names_what_was_lost(run, tmp_path: Path) -> None:
    _, before, _ = run("explain", GOOD, "--json")
    baseline = tmp_path / "baseline.json"
    baseline.write_text(before)
    code, _, err = run("explain", GOOD, "--baseline", str(baseline))
    assert (code, err) == (0, "")
    broken = tmp_path / "broken.py"
    text = Path(MODELS).read_text().replace("def norm(x, w, dim=-1):", "def norm(x, w, dim=1):")
    broken.write_text("# one line more\n" + text)
    code, _, err = run("explain", f"{broken}:make", "--baseline", str(baseline))
    assert code == 1
    losses = err.strip().splitlines()
    assert len(losses) == 3
    assert losses[0].startswith(f"fxpass: lost layers.0 ({MODELS}:")
    assert "rms_norm.cast_then_scale): now declined: mean is over dim -2" in losses[0]


def test_moved_lines_and_renamed_modules_are_no_loss(run) -> None:
    _, text, _ = run("explain", GOOD, "--json")
    before, now = parse(text, "a"), parse(text.replace('"layers.', '"blocks.'), "b")
    assert lost(before, now) == []
    assert lost(before, parse(text.replace(".py:", ".py:1"), "b")) == []
    now.rewritten.pop()
    assert [miss.site.module for miss in lost(before, now)] == ["norm"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 99}'])
def test_broken_baseline(run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    code, _, err = run("explain", GOOD, "--baseline", str(path))
    assert code == 2
    assert "needs the output of `fxpass explain TARGET --json`" in err
    with pytest.raises(FxpassError):
        parse(text, "x")


def test_missing_baseline(run) -> None:
    code, _, err = run("explain", GOOD, "--baseline", "nofile.json")
    assert (code, err) == (2, "fxpass: cannot read nofile.json: No such file or directory\n")


def test_broken_target_is_one_line(run) -> None:
    code, out, err = run("explain", f"{MODELS}:mak")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    code, _, err = run("explain", f"{MODELS}:mak", "--traceback")
    assert code == 2
    assert "Traceback" in err


def test_output_of_the_model_stays_out_of_json(run, tmp_path: Path) -> None:
    path = tmp_path / "chatty.py"
    path.write_text(Path(MODELS).read_text() + "\nprint('loading')\n")
    code, out, err = run("explain", f"{path}:make", "--json")
    assert code == 0
    assert len(json.loads(out)["rewritten"]) == 4
    assert "loading" in err


def test_in_a_shell(tmp_path: Path) -> None:
    done = shell("explain", "cli_models:make_misspelt", "--expect", "all", cwd=Path(MODELS).parent)
    assert done.returncode == 1
    assert "rewrote 4 of 5" in done.stdout
    assert len(done.stderr.splitlines()) == 2


def test_alike_refusals_share_a_row(run) -> None:
    _, out, _ = run("explain", GOOD, "--platform", "cuda:sm_90")
    (row,) = [line for line in out.splitlines() if "platform cuda, needs cpu" in line]
    assert row.split()[:2] == ["4", "cpu.row"]


def test_reasons_compare_without_node_numbers() -> None:
    assert cli_explain._unnamed("read by %mul_12 (mul_9, ...)") == "read by %mul (mul, ...)"


def test_the_package_does_not_import_the_command_line() -> None:
    code = "import fxpass, sys; print([n for n in sys.modules if n.startswith('fxpass.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not re.search(r"fxpass\.(cli|target|diff|doctor|pytest)", done.stdout)
