"""A program of torch.export that was rewritten is still one: saved, loaded, decomposed."""

from __future__ import annotations

import io

import pytest
import torch
from cases_rounding import unit

import fxpass

pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec")  # torch's own
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


class Model(torch.nn.Module):
    """Norms that are results, once, twice and not; a buffer that is written; x as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64))
        self.register_buffer("calls", torch.zeros(()))

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * unit(x)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.calls.add_(1)
        first = self.norm(x)
        return first, self.norm(first + x) * 2, first, x


def _saved_and_loaded(program: torch.export.ExportedProgram) -> torch.nn.Module:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream).module()


def _program() -> torch.export.ExportedProgram:
    return torch.export.export(Model(), (X,))


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_rewritten_program_is_saved_and_loaded(decomposed: bool) -> None:
    program = _program()
    report = fxpass.rewrite(program, providers=("reference",), strict=True)
    assert len(report.rewritten) == 2
    loaded = _saved_and_loaded(program.run_decompositions() if decomposed else program)
    assert str(loaded.graph).count("torch.ops.fxpass.norm") == 2
    torch.testing.assert_close(loaded(X), Model()(X), rtol=1e-6, atol=1e-6)  # sums in f32
    assert loaded.calls == 1


def test_a_buffer_that_holds_a_norm_is_written() -> None:
    class Last(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last.copy_(self.norm(x))
            return self.last * 2

    model = Last()
    model.register_buffer("last", torch.zeros(4, 64))
    program = torch.export.export(model, (X,)).run_decompositions()  # the norm is what is written
    fxpass.rewrite(program, providers=("reference",), strict=True, expect=1)
    loaded = _saved_and_loaded(program)
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-6, atol=1e-6)  # sums in f32
    assert torch.equal(loaded.last * 2, loaded(X))


def test_a_program_is_whole_where_expect_raises() -> None:
    program = _program()
    with pytest.raises(fxpass.FxpassError, match="expect"):
        fxpass.rewrite(program, expect=3)
    assert len(_saved_and_loaded(program)(X)) == 4


def _program_that_keeps_a_call() -> torch.export.ExportedProgram:
    """Its inner module's result is named, so what replaces it must not be another value."""

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)[1] + 1

    return torch.export.export(Outer(), (X,), preserve_module_call_signature=("inner",))


def test_what_is_not_taken() -> None:
    with pytest.raises(fxpass.FxpassError, match="carries its shapes; leave the inputs out"):
        fxpass.rewrite(_program(), X)
    with pytest.raises(fxpass.FxpassError, match="keeps the call signature of inner"):
        fxpass.rewrite(_program_that_keeps_a_call())
    with pytest.raises(fxpass.FxpassError, match=r"GraphModule or a torch.export.ExportedProgram"):
        fxpass.rewrite(Model())
