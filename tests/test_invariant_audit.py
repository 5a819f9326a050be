"""`fxpass audit`: what may follow the number of rows is listed, measured and accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx

from fxpass import cli
from fxpass.errors import FxpassError
from fxpass.invariant import audit, collectives, families, measured
from fxpass.invariant.measure import Cut, shapes, varies_at
from fxpass.invariant.measured import COMMITTED, Table
from fxpass.target import Target

MODELS = str(Path(__file__).parent / "invariant_models.py")
HERE = measured.machine(torch.device("cpu"))
aten = torch.ops.aten


@pytest.fixture
def run(capsys):
    """`run("clean", "--fake")` -> (exit code, stdout, stderr)."""

    def call(name: str, *argv: str) -> tuple[int, str, str]:
        code = cli.main(["audit", f"{MODELS}:{name}", *argv])
        return (code, *capsys.readouterr())

    return call


def findings(out: str, **wanted: object) -> list[dict[str, object]]:
    found = json.loads(out)["findings"]
    return [f for f in found if all(f[key] == value for key, value in wanted.items())]


# ---- What is listed -----------------------------------------------------------------------------


@pytest.mark.parametrize("fake", [(), ("--fake",)])
def test_planted_operator_is_listed_with_its_line(run, fake: tuple[str, ...]) -> None:
    code, out, err = run("planted_counted", "--json", *fake)
    assert (code, err) == (0, "")
    line = Path(MODELS).read_text().splitlines().index("        z = self.op(y)") + 1
    for where in ("eager", "compiled"):
        (planted,) = findings(out, operator="planted.counted", run=where)
        assert planted["where"] == f"{MODELS}:{line}"
        assert planted["line"] == "z = self.op(y)"
        assert planted["mode"] == "not covered: out of reach; prove the model"
        products = findings(out, family="product", run=where)
        assert [p["inputs"] for p in products] == [
            ["f32[96]", "f32[4,48]", "f32[48,96]"],
            ["f32[48]", "f32[4,96]", "f32[96,48]"],
        ]
        assert {p["mode"] for p in products} == {"replaced"}


def test_strict_is_for_scripts(run) -> None:
    assert run("planted_counted", "--strict")[0] == 1
    code, out, _ = run("clean", "--strict")
    assert code == 0
    assert "not covered" not in out


def test_attention_and_heads(run) -> None:
    _, out, _ = run("ids", "--json")
    (attention,) = findings(out, family="attention", run="eager")
    assert attention["operator"] == "aten._scaled_dot_product_flash_attention_for_cpu"
    assert attention["mode"] == "replaced"


def test_integers_are_exact_and_scatters_are_not(run) -> None:
    _, out, _ = run("scattered", "--json")
    names = {str(finding["operator"]) for finding in findings(out, run="eager")}
    assert names == {"aten.scatter_add", "aten.sum"}
    (summed,) = findings(out, operator="aten.sum", run="eager")
    assert summed["inputs"] == ["f32[4,48]"]


@pytest.mark.parametrize("name", ["batch_norm", "dropout"])
def test_mixing_by_meaning_is_listed(run, name: str) -> None:
    _, out, _ = run(name, "--json")
    family = {"batch_norm": "mixes rows", "dropout": "random"}[name]
    assert findings(out, family=family, run="eager")


def test_element_wise_code_in_graphs_is_inductors(run) -> None:
    _, out, _ = run("softplus", "--json")
    assert findings(out, operator="aten.softplus", run="eager", mode="replaced")
    (generated,) = findings(out, run="compiled")
    assert generated["operator"] == "aten.log1p"
    assert generated["family"] == "generated element-wise"


def test_batch_norm_in_inference_has_rows() -> None:
    x, of_channels = torch.zeros(2, 3, 4), torch.ones(3)
    op = aten.native_batch_norm.default
    args = (x, of_channels, of_channels, of_channels, of_channels)
    assert families.of(op, (*args, False, 0.1, 1e-5), [x]) is None
    assert families.of(op, (*args, True, 0.1, 1e-5), [x]) is families.MIXING


# ---- Measuring ----------------------------------------------------------------------------------


def test_measured_operators_and_the_table(run, tmp_path) -> None:
    table = tmp_path / "table.json"
    argv = ("--measure", "--rows", "1,2,5,9", "--table", str(table), "--json")
    code, out, err = run("planted_counted", *argv)
    assert (code, err) == (0, "")
    (planted,) = findings(out, operator="planted.counted", run="eager")
    assert planted["varies"] is True
    assert str(planted["measured"]).startswith("varies: at 1, 2 rows of 1, 2, 5, against 9")
    rows = json.loads(table.read_text())
    assert {"operator": "planted.counted", "inputs": "f32[*,48]"}.items() <= rows[-1].items()

    _, out, _ = run("planted_counted", "--table", str(table), "--json", "--fake")
    (planted,) = findings(out, operator="planted.counted", run="eager")
    assert (planted["inputs"], planted["varies"]) == (["f32[4,48]"], True)

    before = len(rows)
    assert run("planted_counted", *argv)[0] == 0
    assert len(json.loads(table.read_text())) == before  # nothing is measured twice


def test_what_is_wrong_is_one_line(run, tmp_path) -> None:
    assert run("clean", "--measure", "--fake")[0] == 2
    code, _, err = run("clean", "--table", str(tmp_path / "none.json"))
    assert code == 2
    assert "cannot read" in err
    wrong = tmp_path / "wrong.json"
    wrong.write_text('[{"a": 1}]')
    code, _, err = run("clean", "--table", str(wrong))
    assert code == 2
    assert "no table of fxpass audit" in err


def test_rows_are_cut_where_they_are() -> None:
    """Rows inside a merged dim, and a number that follows them."""
    x = torch.randn(6, 8, 4)
    args, one = (x, None, None, 6, 8, 4, 2, 1e-5), (x[:1], None, None, 1, 8, 4, 2, 1e-5)
    cut = Cut(args, {}, shapes(one, {}), 6)
    whole, some = (cut.run(aten.native_group_norm.default, *at)[0] for at in ((0, 6), (2, 3)))
    assert torch.equal(whole[2:5], some)
    flat = torch.randn(6 * 5, 4)
    cut = Cut((flat,), {}, shapes((flat[:5],), {}), 6)
    assert cut.pattern() == "f32[*,4]"
    assert torch.equal(cut.run(torch.clone, 2, 3)[0], flat[10:25])
    assert not Cut((flat,), {}, shapes((flat,), {}), 6).has_rows


def test_an_operator_that_follows_the_rows_is_seen() -> None:
    x = torch.randn(9, 4)
    cut = Cut((x,), {}, shapes((x[:1],), {}), 9)
    assert varies_at(lambda x: x * x.shape[0], cut, 9, (1, 3)) == [1, 3]
    assert varies_at(lambda x: x * (1 if x.shape[0] > 2 else 2), cut, 9, (1, 2, 3)) == [1, 2]
    assert varies_at(lambda x: x - x[0], cut, 9, (3,)) == [3]
    assert varies_at(torch.sin, cut, 9, (1, 3)) == []


def test_committed_rows_can_be_found() -> None:
    """Names are ATen's, and a row fits the inputs it names."""
    for row in COMMITTED:
        packet = row.operator.removeprefix("aten.")
        assert hasattr(aten, packet), row
        kinds = row.inputs.replace("*", "7").split(" ")
        kinds = kinds if "[" in row.inputs else [f"{row.inputs}[7,7]"]
        assert measured._fits(row.inputs, kinds)
    assert {row.device for row in COMMITTED} == {"NVIDIA H200", "cpu AVX512"}
    assert not measured._fits("bf16[*,64]", ["bf16[7,65]"])
    assert not measured._fits("bf16[*,64]", ["f32[7,64]"])
    assert not measured._fits("bf16[*,64]", ["bf16[64]"])


def test_own_measurements_come_first() -> None:
    table = Table()
    table.add("aten.mm", "f32[*,8] f32[8,8]", HERE, [], "of 1, against 2")
    found = table.find("aten.mm", ["f32[3,8]", "f32[8,8]"], torch.device("cpu"))
    assert found is table.added[0]
    assert Table.from_json(table.to_json(), "here").added == table.added


# ---- Out of reach -------------------------------------------------------------------------------


def graph_of(op: object, *args: object) -> Target:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.zeros(4, 8)
    graph.output(graph.call_function(op, (x, *args)))
    return Target("dump", dumped=(fx.GraphModule(torch.nn.Module(), graph),))


def test_collectives_are_flagged() -> None:
    functional = torch.ops._c10d_functional
    (summed,) = audit.compiled(graph_of(functional.all_reduce.default, "sum", "0"), Table())
    assert summed.family is families.COLLECTIVE
    assert "collectives.pin()" in summed.mode
    target = graph_of(functional.reduce_scatter_tensor.default, "sum", 2, "0")
    assert audit.compiled(target, Table())[0].family is families.REDUCE_SCATTER
    target = graph_of(functional.all_gather_into_tensor.default, 2, "0")
    assert audit.compiled(target, Table()) == []  # moves bits


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("_C_custom_ar::all_reduce", families.CUSTOM_REDUCE),
        ("vllm::flashinfer_trtllm_fused_allreduce_norm", families.FUSED_REDUCE),
        ("vllm::unified_attention", families.SERVING),
        ("somebody::kernel", families.OPAQUE),
    ],
)
def test_kernels_of_others_are_named(name: str, family: families.Family) -> None:
    space, _, op = name.partition("::")
    library = torch.library.Library(space, "FRAGMENT")
    library.define(f"{op}(Tensor x) -> Tensor")
    overload = getattr(getattr(torch.ops, space), op).default
    x = torch.zeros(2)
    assert families.of(overload, (x,), [x]) is family
    assert families.mode_does(family, overload, [x]).startswith("not covered: out of reach")
    library._destroy()


def test_flex_attention_is_named() -> None:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: F401 - registers it

    flex = torch.ops.higher_order.flex_attention
    assert families.of(flex, (), []) is families.FLEX


def test_dtypes_without_a_kernel_are_not_covered() -> None:
    x = torch.zeros(2, 2, dtype=torch.float8_e4m3fn)
    assert families.mode_does(families.PRODUCT, aten.mm.default, [x]).startswith("not covered")
    assert families.mode_does(families.PRODUCT, aten.mm.default, [x.float()]) == audit.COVERED


def test_nccl_is_set_once_and_not_over_the_user(monkeypatch) -> None:
    for name in collectives.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_PROTO", "LL")
    with pytest.raises(FxpassError, match="NCCL_PROTO=LL"):
        collectives.pin()
    assert "NCCL_ALGO" in collectives.missing()
    assert collectives.pin(overwrite=True) == dict(collectives.SETTINGS)
    assert collectives.missing() == {}
    assert collectives.pin() == {}


def test_nccl_cannot_be_set_too_late(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(FxpassError, match="before init_process_group"):
        collectives.pin()


@pytest.mark.gpu
def test_measured_on_a_gpu(run) -> None:
    code, out, _ = run("clean", "--measure", "--device", "cuda", "--rows", "1,64,257", "--json")
    assert code == 0
    assert all(f["varies"] is not None for f in findings(out, family="product", run="eager"))


def test_recurrent_layers_are_replaced_in_eager_code(run) -> None:
    code, out, err = run("recurrent", "--strict")
    assert (code, "torch.compile makes no graph of this model" in err) == (0, True)
    assert "not covered" not in out
    assert "in eager mode" in out
