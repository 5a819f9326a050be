"""Language and diffusion models planned for an AMD GPU, run against the strict stand-in for aiter.

Each graph is rewritten as on gfx942 and then run as it stands, so that the stand-in sees every call
that compiled code would make. A call outside the contract raises; results are compared with the
graph before the rewrite, strides included and bit by bit, as the stand-in computes in the roundings
of the code path a call takes.
"""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import aiter_standin
import pytest
import torch
import torch.utils._pytree
from helpers import REFERENCE, Level, capture, cloned, copied, differences, rewritten
from torch._inductor.compile_fx import compile_fx

import fxpass
from fxpass import ops, pipeline
from fxpass.kernels import aiter_api, by_name, reference
from fxpass.options import Options
from fxpass.torch_private import inside_inductor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from models import CORE, MORE
from zoo import dif
from zoo.hf import Built

AITER = Options(providers=("aiter", "reference"), platform="rocm:gfx942", strict=True)
AUTO = Options(platform="rocm:gfx942", strict=True)
NEWEST = "gemma_norm before the flag"


@dataclasses.dataclass(frozen=True)
class Calls:
    """Norms found in a model, and those that aiter gets."""

    norms: int
    named: int
    """bf16, aiter named in the options, a version with the flag."""
    old: int
    """The same with the version that has none."""
    auto: int
    """float16, left to `auto`: not where a copy costs more than the kernel saves."""


LANGUAGE = {
    "Llama": Calls(5, 5, 0, 5),
    "Qwen3": Calls(9, 9, 0, 9),
    "Gemma 3": Calls(13, 0, 0, 0),  # 1 + weight
    "OLMo 2": Calls(9, 8, 8, 8),
    "Mixtral": Calls(5, 5, 0, 5),
    "T5": Calls(12, 12, 0, 12),
    "Mamba-2": Calls(5, 2, 0, 2),
    "Llama 4": Calls(23, 13, 0, 13),
    "DeepSeek-V3": Calls(9, 9, 0, 7),
    "DeepSeek-V4": Calls(25, 15, 15, 15),
}
DIFFUSION = {
    "AceStepTransformer1DModel": Calls(15, 15, 0, 8),  # its tokens lie channels first
    "AnyFlowTransformer3DModel": Calls(8, 8, 0, 8),
    "BriaFiboTransformer2DModel": Calls(12, 12, 8, 12),
    "BriaTransformer2DModel": Calls(12, 12, 12, 12),
    "ChromaTransformer2DModel": Calls(17, 13, 13, 13),
    "ChronoEditTransformer3DModel": Calls(8, 8, 8, 8),
    "ErnieImageTransformer2DModel": Calls(8, 8, 4, 8),
    "Flux2Transformer2DModel": Calls(12, 12, 12, 8),
    "FluxTransformer2DModel": Calls(12, 12, 12, 12),
    "HeliosTransformer3DModel": Calls(8, 8, 8, 8),
    "HunyuanImageTransformer2DModel": Calls(12, 12, 0, 12),
    "HunyuanVideoTransformer3DModel": Calls(12, 12, 0, 12),
    "LTXVideoTransformer3DModel": Calls(12, 8, 8, 8),
    "LongCatImageTransformer2DModel": Calls(12, 12, 12, 12),
    "Lumina2Transformer2DModel": Calls(25, 25, 0, 25),
    "MochiTransformer3DModel": Calls(15, 2, 2, 2),
    "NucleusMoEImageTransformer2DModel": Calls(8, 8, 0, 8),
    "OvisImageTransformer2DModel": Calls(13, 13, 13, 13),
    "PRXTransformer2DModel": Calls(6, 6, 0, 0),
    "QwenImageTransformer2DModel": Calls(9, 9, 0, 9),
    "SD3Transformer2DModel": Calls(8, 8, 0, 8),
    "SanaTransformer2DModel": Calls(9, 9, 0, 9),
    "SkyReelsV2Transformer3DModel": Calls(8, 8, 8, 8),
    "WanTransformer3DModel": Calls(8, 8, 8, 8),
    "WanVACETransformer3DModel": Calls(12, 12, 12, 12),
    "ZImageTransformer2DModel": Calls(25, 25, 0, 25),
}
MODELS = {**LANGUAGE, **DIFFUSION}
QUICK = ("Qwen3", "ErnieImageTransformer2DModel", "PRXTransformer2DModel", "SD3Transformer2DModel")
every_model = pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in MODELS],
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of Dynamo, about the models


def build(name: str, dtype: torch.dtype, batch: int = 2) -> Built:
    if name in DIFFUSION:
        pytest.importorskip("diffusers")
        return dif.build(name, batch, dtype)
    return {**CORE, **MORE}[name].make(batch=batch, dtype=dtype)


def captured(built: Built) -> list[Level]:
    """The ATen graphs of one call, with their inputs."""
    names = list(built.inputs)

    def run(*values: Any) -> Any:
        return built.model(**dict(zip(names, values, strict=True)))

    return capture(run, list(built.inputs.values())).graphs("aten")


def outcome(graph_module: torch.fx.GraphModule, level: Level) -> Any:
    torch.manual_seed(0)
    return graph_module(*cloned(level.inputs))


def on_aiter(report: fxpass.Report) -> int:
    return sum(site.kernel.startswith("aiter.") for site in report.rewritten)


@torch.no_grad()
@every_model
def test_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: nothing that any version of aiter receives breaks its contract, or changes a bit."""
    levels = captured(build(name, torch.bfloat16))
    wanted = [outcome(copied(level.graph_module), level) for level in levels]
    calls = {}
    for version in aiter_api.VERSIONS:
        standin = aiter_standin.install(monkeypatch, version)
        norms = 0
        for level, result in zip(levels, wanted, strict=True):
            made, report = rewritten(level, AITER)
            before, norms = len(standin.calls), norms + len(report.rewritten)
            assert not differences(result, outcome(made, level))
            assert len(standin.calls) - before == on_aiter(report)
        assert norms == MODELS[name].norms
        calls[version] = len(standin.calls)
    flagless, *others = calls.values()
    assert (flagless, set(others)) == (MODELS[name].old, {MODELS[name].named})


@torch.no_grad()
@every_model
def test_left_to_choose(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16, planned as inside Inductor: aiter only where no copy is needed."""
    standin = aiter_standin.install(monkeypatch, NEWEST)
    there = {"triton.row": reference.KERNEL}  # nothing here runs it; it has its own tests
    monkeypatch.setattr(ops, "by_name", lambda kernel: there.get(kernel) or by_name(kernel))
    monkeypatch.setattr(ops, "calls", type(ops.calls)())
    for level in captured(build(name, torch.float16)):
        made = copied(level.graph_module)
        with inside_inductor():
            report = pipeline.run(made.graph, AUTO)
        made.recompile()
        plain, _ = rewritten(level, REFERENCE)
        before = len(standin.calls)
        assert not differences(outcome(plain, level), outcome(made, level))
        assert len(standin.calls) - before == on_aiter(report)
        assert not any(s.bytes_copied for s in report.rewritten if s.kernel.startswith("aiter."))
    assert len(standin.calls) == MODELS[name].auto


@torch.no_grad()
@pytest.mark.long
@pytest.mark.parametrize("name", ["Qwen3", "WanTransformer3DModel"])
def test_compiled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own code makes the same calls, with tensors that it laid out itself."""
    standin = aiter_standin.install(monkeypatch, NEWEST)
    built = build(name, torch.bfloat16)
    backend = partial(fxpass.rmsnorm_backend, options=AITER)
    torch._dynamo.reset()
    torch.compile(built.model, backend=backend)(**built.inputs)
    assert len(standin.calls) == MODELS[name].named


@torch.no_grad()
@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["Qwen3", "SD3Transformer2DModel", "PRXTransformer2DModel", "AceStepTransformer1DModel"]
)
def test_any_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph with symbolic sizes serves every batch, as it does without the rewrite."""
    standin = aiter_standin.install(monkeypatch, NEWEST)
    built = build(name, torch.bfloat16)
    batches = [built.inputs, build(name, torch.bfloat16, batch=5).inputs]
    wanted, graphs = run_symbolic(built.model, batches, None)
    found, rewritten_graphs = run_symbolic(built.model, batches, AITER)
    assert rewritten_graphs == graphs
    assert not differences(wanted, found)
    assert len(standin.calls) == len(batches) * MODELS[name].named
    assert len({call.shape for call in standin.calls}) > 1


def run_symbolic(
    model: torch.nn.Module, batches: list[dict[str, Any]], options: Options | None
) -> tuple[list[Any], int]:
    """The results, and how many graphs were made; the graphs run in eager."""
    graphs = 0

    def inner(graph_module: torch.fx.GraphModule, _: Any, **__: Any) -> Any:
        nonlocal graphs
        graphs += 1
        if options is not None:
            fxpass.rewrite(graph_module, options=options)
        return lambda *args: graph_module(*args)

    def backend(graph_module: torch.fx.GraphModule, example: list[Any]) -> Any:
        return compile_fx(graph_module, example, inner, {"force_disable_caches": True})

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    return [leaves(compiled(**inputs)) for inputs in batches], graphs


def leaves(result: Any) -> list[Any]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if leaf is not None]
