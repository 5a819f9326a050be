"""A TARGET becomes graphs; a broken one becomes one clear line."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_models import make

from fxpass import explain, pipeline, target, target_hf
from fxpass.options import Options
from fxpass.report import Report
from fxpass.spec import NormSpec
from fxpass.target import TargetError, load
from fxpass.target_text import Input, build

MODELS = str(Path(__file__).parent / "cli_models.py")
OPTIONS = Options(providers=("reference",), strict=True)


def planned(found: target.Target) -> Report:
    report = Report()
    for graph_module in found.graphs():
        report.add(pipeline.dry_run(graph_module.graph, OPTIONS))
    return report


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_callable_in_a_file() -> None:
    report = planned(load(f"{MODELS}:make"))
    assert [site.module for site in report.rewritten] == [
        "layers.0",
        "layers.1",
        "layers.2",
        "norm",
    ]


def test_callable_in_a_module() -> None:
    assert len(planned(load("cli_models:make_misspelt")).declined) == 1


def test_bodies_of_a_graph_are_graphs_too() -> None:
    """Inductor runs its hook on them as well."""
    found = load("cli_models:make_branch")
    assert len(planned(found).rewritten) == 2
    with torch.no_grad():
        assert len(explain(found.model, *found.args, options=OPTIONS).rewritten) == 2


@pytest.mark.parametrize("fake", [False, True])
def test_training_saves_what_the_backward_needs(fake: bool) -> None:
    """nn.RMSNorm is one operator to autograd, which keeps the value per row."""
    found = load("cli_models:make", fake=fake)
    specs = {train: _specs(found.graphs(train)) for train in (False, True)}
    assert len(specs[True]) == len(specs[False]) == 4
    assert "row" in specs[True][-1].outputs
    assert "row" not in specs[False][-1].outputs


def _specs(graphs) -> list[NormSpec]:
    reports = [pipeline.dry_run(found.graph, OPTIONS) for found in graphs]
    return [NormSpec.parse(site.spec) for report in reports for site in report.rewritten]


def test_nothing_to_train() -> None:
    with pytest.raises(TargetError, match="no parameter or input requires a gradient"):
        target.Target("f", torch.abs, (torch.ones(2),)).graphs(train=True)


def test_fake_model_needs_no_gpu() -> None:
    found = load(f"{MODELS}:make_on_gpu", fake=True)
    assert len(planned(found).rewritten) == 4


def test_exported_program(tmp_path: Path) -> None:
    model, args = make()
    path = str(tmp_path / "model.pt2")
    torch.export.save(torch.export.export(model, args), path)
    assert len(planned(load(path)).rewritten) == 4


@pytest.mark.parametrize("symbolic", [False, True])
def test_exported_program_without_example_inputs(tmp_path: Path, symbolic: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x, times, *, table):
            chosen = table["weights"].index_select(0, table["index"])[0]
            return times * torch.nn.functional.rms_norm(x, (64,), chosen)

    table = {"weights": torch.ones(3, 64), "index": torch.tensor([2])}
    x, path = torch.randn(4, 64), str(tmp_path / "model.pt2")
    rows = torch.export.Dim("rows", min=3, max=99) if symbolic else None
    shapes = {"x": {0: rows}, "times": None, "table": {"weights": None, "index": None}}
    program = torch.export.export(Model(), (x, 2), {"table": table}, dynamic_shapes=shapes)
    program.example_inputs = None
    torch.export.save(program, path)
    found = load(path)
    assert found.args[0].shape == x.shape
    (site,) = planned(found).rewritten
    assert site.hidden == 64


BROKEN = {
    "no_such_package.x:make": "no module 'no_such_package'",
    "nofile.py:make": "no file nofile.py",
    f"{MODELS}:mak": "cli_models has no 'mak'; did you mean 'make'?",
    f"{MODELS}:torch": "'torch' is a module, needs a function",
    MODELS: "no callable named; use module:callable",
    "nofile.pt2": "no such file",
    "hf:lama": "did you mean hf:llama",
    "hf:llama@huge": "size 'huge' is unknown; use @full",
}


@pytest.mark.parametrize("text", BROKEN)
def test_broken_target(text: str) -> None:
    with pytest.raises(TargetError) as caught:
        load(text)
    assert BROKEN[text] in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_CODE = {
    "def make(): return 1": "returned a int; needs (model, args)",
    "def make(): return (1,)": "returned a tuple of 1; needs (model, args)",
    "def make(): return 1, ()": "the model is a int",
    "def make(): return len, 'abc'": "found str for args",
    "def make(): raise ValueError('no weights')": "raised ValueError: no weights at",
    "import nothing_of_this_name\ndef make(): pass": "no module 'nothing_of_this_name'",
    "1 +": "raised SyntaxError: invalid syntax",
    "raise SystemExit(3)": "raised SystemExit: 3 at",
    "make = 3": "'make' is a int, needs a function",
}


@pytest.mark.parametrize("code", BAD_CODE)
def test_bad_code(code: str, tmp_path: Path) -> None:
    path = tmp_path / "bad_model.py"
    path.write_text(code)
    with pytest.raises(TargetError) as caught:
        load(f"{path}:make")
    assert BAD_CODE[code] in str(caught.value)
    assert "\n" not in str(caught.value)


RAISES = """
import torch
class Model(torch.nn.Module):
    def forward(self, x):
        return {line}
def make():
    return Model(), (torch.randn(3, 3),)
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("x @ torch.randn(5, 5)", "RuntimeError: a and b must have same reduction dim"),
        ("x.no_such_method()", "AttributeError: 'Tensor' object has no attribute"),
        ("x + self.missing", "AttributeError: 'Model' object has no attribute 'missing'"),
    ],
)
def test_model_that_raises(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "raises.py"
    path.write_text(RAISES.format(line=line))
    with pytest.raises(TargetError) as caught:
        load(f"{path}:make").graphs()
    assert said in str(caught.value)
    assert f"{path}:5" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(TargetError, match=r"asks for CUDA at .*finds none here; use --fake,"):
        load(f"{MODELS}:make_on_gpu")


def test_model_that_torch_compile_leaves_alone() -> None:
    """Nothing rewritten because nothing was looked at is not the same as no norms."""
    disabled = torch.compiler.disable(lambda x: torch.nn.functional.rms_norm(x, (64,)))
    with pytest.raises(TargetError, match=r"torch.compile makes no graph of this model; .* disab"):
        target.Target("disabled", disabled, (torch.ones(2, 64),)).graphs()


def test_inputs_on_the_meta_device() -> None:
    found = target.Target("meta", torch.abs, (torch.ones(2, device="meta"),))
    with pytest.raises(TargetError, match=r"on the meta device, where .*; use --fake instead"):
        found.graphs()


UNREADABLE = {
    "PytorchStreamReader failed\nmore": "cannot be read (RuntimeError: PytorchStreamReader failed);"
    " needs a file from torch.export.save",
    "Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False.": (
        f"holds tensors on CUDA, and torch {torch.__version__} finds none here; export the model"
    ),
}


@pytest.mark.parametrize("raised", UNREADABLE, ids=["broken", "cuda"])
def test_exported_program_that_cannot_be_read(
    raised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt2"
    path.write_text("")

    def load_it(file: str) -> None:
        raise RuntimeError(raised)

    monkeypatch.setattr(torch.export, "load", load_it)
    with pytest.raises(TargetError) as caught:
        load(str(path))
    assert UNREADABLE[raised] in str(caught.value)
    assert "\n" not in str(caught.value)


DUMP = """
import os, sys, torch, cli_models
model, args = getattr(cli_models, sys.argv[1])()
stop = lambda graph: os._exit(0)  # the graphs are written by now; the code generation is slow
with torch.no_grad():
    torch.compile(model, options={"post_grad_custom_pre_pass": stop})(*args)
"""


@pytest.fixture(scope="module")
def dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dumped(tmp_path_factory.mktemp("dumps"), "make_misspelt")


@pytest.fixture(scope="module")
def branch_dumps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dumped(tmp_path_factory.mktemp("branch"), "make_branch")


def dumped(folder: Path, maker: str) -> Path:
    """What torch.compile itself writes, in both ways at once."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "TORCH_COMPILE_DEBUG": "1",
        "TORCH_COMPILE_DEBUG_DIR": str(folder / "debug"),
        "TORCH_TRACE": str(folder / "trace"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    command = [sys.executable, "-c", DUMP, maker]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("kind", ["debug", "trace"])
def test_dumped_graphs(dumps: Path, kind: str) -> None:
    report = planned(load(str(dumps / kind)))
    assert len(report.rewritten) == 4
    (declined,) = report.declined
    assert "mean is over dim -2" in declined.reason
    assert declined.location.startswith(MODELS)


@pytest.mark.parametrize("kind", ["debug", "trace"])
def test_dumped_graph_with_bodies(branch_dumps: Path, kind: str) -> None:
    found = load(str(branch_dumps / kind))
    report = planned(found)
    assert report.summary() == "rewrote 2 of 2 norms in 3 graph(s) (reference.eager x2)"
    assert {site.location.partition(":")[0] for site in report.rewritten} == {MODELS}


def test_folder_without_graphs(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="needs a folder written with TORCH_COMPILE_DEBUG=1"):
        load(str(tmp_path))


TEXT = """
class <lambda>(torch.nn.Module):
    def forward(self, arg0_1: "Sym(s0)", arg1_1: "bf16[s0, 64]", arg2_1: "bf16[64]"):
        # File: model.py:7 in forward, code: return norm(x)
        cast: "f32[s0, 64]" = torch.ops.prims.convert_element_type.default(arg1_1, torch.float32)
        pow_1: "f32[s0, 64]" = torch.ops.aten.pow.Tensor_Scalar(cast, 2)
        mean: "f32[s0, 1]" = torch.ops.aten.mean.dim(pow_1, [-1], True);  pow_1 = None
        add: "f32[s0, 1]" = torch.ops.aten.add.Tensor(mean, 1e-06);  mean = None
        rsqrt: "f32[s0, 1]" = torch.ops.aten.rsqrt.default(add);  add = None
        mul: "f32[s0, 64]" = torch.ops.aten.mul.Tensor(cast, rsqrt);  cast = rsqrt = None
        back: "bf16[s0, 64]" = torch.ops.prims.convert_element_type.default(mul, torch.bfloat16)
        out: "bf16[s0, 64]" = torch.ops.aten.mul.Tensor(arg2_1, back);  arg2_1 = back = None
        floordiv: "Sym(s0//2)" = arg0_1 // 2
        return (out, floordiv)
"""


def test_symbolic_sizes_and_places() -> None:
    gpu = "cuda:0"
    known = {"arg0_1": Input(hint=5), "arg1_1": Input("128, 1", gpu), "arg2_1": Input(device=gpu)}
    graph_module = build(TEXT, known)
    report = pipeline.dry_run(graph_module.graph, OPTIONS)
    (site,) = report.rewritten
    assert site.location == "model.py:7"
    assert site.source == "return norm(x)"
    assert site.node == "out"
    assert site.hidden == 64


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch.ops.aten.no_such_op.default(arg2_1)", "which this torch does not have"),
        ("os.system('true')", "needs an operator of torch"),
        ("self.true_graph_0", "a graph that the text does not have"),
        ("missing", "which nothing made"),
        ("[x for x in arg2_1]", "cannot read"),
    ],
)
def test_text_that_cannot_be_read(line: str, said: str) -> None:
    text = TEXT.replace("arg0_1 // 2", line)
    with pytest.raises(ValueError, match=said):
        build(text, {})


transformers = pytest.importorskip("transformers")


def test_model_type_is_shrunk_and_fake() -> None:
    found = load("hf:llama")
    assert found.fake
    assert found.model.config.num_hidden_layers == target_hf.LAYERS
    assert found.model.config.hidden_size == transformers.LlamaConfig().hidden_size
    report = planned(found)
    assert len(report.rewritten) == 2 * target_hf.LAYERS + 1


def test_one_layer_of_every_kind_is_kept() -> None:
    kept = target_hf.shrunk(transformers.Gemma3TextConfig(num_hidden_layers=26))
    assert set(kept.layer_types) == {"sliding_attention", "full_attention"}
    assert len(kept.layer_types) == kept.num_hidden_layers == target_hf.LAYERS


@pytest.mark.parametrize(
    ("kind", "experts"), [("deepseek_v3", 16), ("mixtral", 8), ("qwen3_next", 10)]
)
def test_a_router_has_enough_experts(kind: str, experts: int) -> None:
    """Two in each group that it ranks, and as many as a token gets."""
    config = target_hf.shrunk(transformers.AutoConfig.for_model(kind))
    assert experts in (vars(config).get(name) for name in target_hf._EXPERTS)


def test_config_file(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(num_hidden_layers=6, hidden_size=256)
    config.save_pretrained(tmp_path)
    found = load(f"hf:{tmp_path / 'config.json'}@full")
    assert found.model.config.num_hidden_layers == 6
    assert load(f"hf:{tmp_path}").model.config.num_hidden_layers == target_hf.LAYERS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is no config.json"),
        ("{}", "is no config.json"),
        ('{"model_type": "nobody"}', "'nobody' is unknown"),
    ],
)
def test_broken_config_file(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(TargetError, match=said):
        load(f"hf:{path}")
