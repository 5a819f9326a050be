"""Triangular systems in the mode, on the CPU; the GPU's kernel in Triton's interpreter."""

from __future__ import annotations

import re

import pytest
import torch
from invariant_solve_cases import KINDS, SHAPES, check, system
from triton_offline import (
    TARGETS,
    assert_machine_code,
    compiled,
    own_cache,  # noqa: F401 - a fixture
)
from triton_offline import interpreter as interpreted

import fxpass
from fxpass.invariant.recorder import Recorder

interpreter = interpreted("invariant_solve_interpreted.py")
solve = torch.linalg.solve_triangular


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beside_torch(shape, kind, dtype) -> None:
    check(shape, kind, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_on_a_gpu(shape, kind) -> None:
    from fxpass.kernels.invariant.solve import by_columns

    check(shape, kind, torch.float32, "cuda")
    a, b, options = system((5, 64, 33), KINDS[0], torch.float32)
    with fxpass.batch_invariant_mode():
        found = solve(a.cuda(), b.cuda(), **options).cpu()
    assert torch.equal(found, by_columns(a, b, False))


@pytest.mark.gpu
def test_on_a_gpu_that_is_not_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    a, b, options = system((3, 7, 5), KINDS[0], torch.float32)
    with fxpass.batch_invariant_mode():
        wanted = solve(a.to("cuda:0"), b.to("cuda:0"), **options)
        found = solve(a.to("cuda:1"), b.to("cuda:1"), **options)
    assert torch.equal(found.cpu(), wanted.cpu())


def test_what_torch_refuses() -> None:
    a, b = torch.randn(2, 4, 4), torch.randn(3, 4, 4)
    for left, right in ((a, b), (a[0, :3], b), (a, b[:2, :3]), (a.int(), a)):
        said = []
        for enabled in (False, True):
            with fxpass.batch_invariant_mode(enabled), pytest.raises(RuntimeError) as caught:
                solve(left, right, upper=False)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_out_gradients_and_empty() -> None:
    a, b, options = system((3, 7, 5), KINDS[0], torch.float64)
    with fxpass.batch_invariant_mode(), Recorder() as found:
        out = torch.empty(0, dtype=torch.float64)
        assert torch.equal(solve(a, b, out=out, **options), solve(a, b, **options))
        assert out.stride() == (35, 1, 7)
        assert solve(a[:0], b[:0], **options).shape == (0, 7, 5)
    assert not found.unknown

    given = [t.requires_grad_() for t in (a, b)]
    wanted = torch.autograd.grad(solve(*given, **options).sin().sum(), given)
    with fxpass.batch_invariant_mode():
        made = torch.autograd.grad(solve(*given, **options).sin().sum(), given)
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    torch._dynamo.reset()
    fxpass.reset_report()
    a, b, options = system((6, 20, 9), KINDS[1], torch.float32)
    backend = {"backend": fxpass.rmsnorm_backend, "options": {"batch_invariant": True}}
    call = torch.compile(lambda a, b: solve(a * 2, b, **options) + 1, dynamic=dynamic, **backend)
    with torch.no_grad():
        found = call(a, b)
        assert fxpass.last_report().invariant == {"fxpass.bi_solve_lower": 1}
        assert torch.equal(call(a[2:3], b[2:3]), found[2:3])
        with fxpass.batch_invariant_mode():
            assert torch.equal(found, solve(a * 2, b, **options) + 1)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target[1]))
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("unit", [False, True])
def test_compiles(target, dtype: str, unit: bool) -> None:
    from fxpass.kernels.invariant.solve_triton import solve_lower
    from fxpass.kernels.invariant.triton_math import FIXED

    types = {name: f"*{dtype}" for name in ("a", "b", "out")} | {"size": "i32", "columns": "i32"}
    constants = {"UNIT": unit, "SIZE": 64, "COLUMNS": 32}
    made = compiled(solve_lower, types, constants, target, num_warps=4, **FIXED)
    assert_machine_code(made, target)
    if "ptx" in made.asm and dtype == "fp32":
        ptx = made.asm["ptx"]
        assert not re.search(r"\bfma\.", ptx), "a product is rounded before it is subtracted"
        assert unit or "div.rn.f32" in ptx


def test_bits_in_the_interpreter(interpreter) -> None:
    printed, _ = interpreter.communicate()
    assert interpreter.returncode == 0, printed
