"""`fxpass kernels` and `fxpass doctor`."""

from __future__ import annotations

import json

import pytest
import torch

from fxpass import capture, cli, doctor, torch_private


def test_kernels_come_from_the_contracts(capsys) -> None:
    assert cli.main(["kernels"]) == 0
    assert "cpu.row" in capsys.readouterr().out
    assert cli.main(["kernels", "--platform", "rocm:gfx942"]) == 0
    out = capsys.readouterr().out
    assert "triton.row" in out
    assert "cpu.row" not in out
    assert cli.main(["kernels", "--json"]) == 0
    found = {kernel["name"]: kernel for kernel in json.loads(capsys.readouterr().out)}
    assert found["cpu.row"]["batch_invariant"] is True


TRUNCATED = "bf16 only if named in providers: bf16 may be truncated, not rounded to nearest"


@pytest.mark.parametrize(("arch", "plain"), [("gfx942", True), ("gfx950", False)])
def test_kernels_say_in_which_order_they_are_asked(arch: str, plain: bool, capsys) -> None:
    assert cli.main(["kernels", "--platform", f"rocm:{arch}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        f"auto on rocm:{arch} asks in this order: aiter.rms_norm, aiter.rms_norm_ck,"
        " aiter.rms_norm_t5, aiter.rms_norm_add, triton.row"
    ) in lines
    assert "reference.eager: only if named in providers" in lines
    assert f"aiter.rms_norm_t5: {TRUNCATED} on {arch}" in lines
    assert (f"aiter.rms_norm: {TRUNCATED} on {arch}" in lines) is plain


def test_doctor_finds_nothing_wrong_here(capsys) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}\n" in out
    assert "reference.eager: can run here" in out
    assert "F.rms_norm(eps=None) on bf16: compiled with 1.1920928955078125e-07, eager agrees" in out


def test_doctor_checks_literals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler would have to do to a number for this to notice."""
    same, dynamic = doctor.literal_drift()
    assert not same.warning
    assert "x * 0.1" in same.text
    assert "in the graph as written, with eager's bits" in same.text
    assert dynamic.text.endswith("a tensor, read at run time")

    def rounded(function, args, kwargs, old=capture.graphs):
        found = old(function, args, kwargs)
        for node in found[0].graph.nodes:
            if 0.1 in node.args:
                node.args = (node.args[0], torch.tensor(0.1).bfloat16().item())
        found[0].recompile()
        return found

    monkeypatch.setattr(doctor.capture, "graphs", rounded)
    found = [finding.text for finding in doctor.literal_drift() if finding.warning]
    assert found == [f"x * 0.1 on {kind}: the graph has 0.10009765625" for kind in ("f32", "bf16")]


def test_doctor_compares_the_bits_of_literals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number is as written, and is rounded before it is used."""

    def in_bf16(function, args, kwargs, old=capture.graphs):
        found = old(function, args, kwargs)
        found[0].forward = lambda x: [function(x.double()).to(x.dtype)]
        return found

    monkeypatch.setattr(doctor.capture, "graphs", in_bf16)
    warned = [f for f in doctor.literal_drift() if f.warning]
    assert warned
    assert all("elements differ from eager" in finding.text for finding in warned)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.filterwarnings("ignore:Overriding a previously registered kernel")
def test_doctor_names_overrides_that_compiling_bypasses() -> None:
    library = torch.library.Library("aten", "IMPL")
    library.impl("mean.dim", lambda x, dim, keepdim=False, dtype=None: x, "CPU")
    library.impl("mm", lambda a, b: a, "CPU")
    try:
        found = [finding for finding in doctor.overrides() if finding.warning]
    finally:
        library._destroy()
    assert len(found) == 2
    assert f"aten::mean.dim (CPU) is overridden at {__file__}:" in found[0].text
    assert "Inductor calls mm.out" in found[1].text
    assert not any(finding.warning for finding in doctor.overrides())


def test_doctor_names_passes_of_others() -> None:
    with torch_private.inductor_config().patch(joint_custom_pre_pass=print):
        (found,) = doctor.hooks()
    assert found.warning
    assert "joint_custom_pre_pass: <built-in function print>" in found.text


def test_a_check_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():
        raise RuntimeError("no such file\nsecond line")

    monkeypatch.setattr(doctor, "caches", broken)
    findings = doctor.examine()
    assert any(f.text == "the check itself failed: RuntimeError: no such file" for f in findings)
    assert findings[-1].topic == "literals"


def test_strict_turns_warnings_into_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("x", "y", warning=True)])
    assert cli.main(["doctor"]) == 0
    assert cli.main(["doctor", "--strict"]) == 1
