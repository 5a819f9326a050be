"""`fxpass prove`: what differs is found and named, what does not is proven."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import fx

from fxpass import cli
from fxpass.errors import FxpassError
from fxpass.invariant import compare, prove, vary
from fxpass.invariant.prove_compiled import beginning

MODELS = str(Path(__file__).parent / "invariant_models.py")


def line_of(text: str) -> int:
    return Path(MODELS).read_text().splitlines().index(text) + 1


@pytest.fixture
def run(capsys, tmp_path):
    """`run("clean", "--eager")` -> (exit code, stdout, stderr, JSON)."""

    def call(name: str, *argv: str, rows: str = "1,2,7,33"):
        file = tmp_path / "proof.json"
        code = cli.main(["prove", f"{MODELS}:{name}", "--rows", rows, "--json", str(file), *argv])
        out, err = capsys.readouterr()
        return code, out, err, _strict(file)

    return call


def _strict(file: Path) -> dict:
    """What a reader without NaN and Infinity reads."""
    return json.loads(file.read_text(), parse_constant=pytest.fail) if file.exists() else {}


# ---- Eager --------------------------------------------------------------------------------------


def test_clean_model_is_proven(run) -> None:
    code, out, err, data = run("clean", "--eager")
    assert (code, err) == (0, "")
    assert "eager, in the batch-invariant mode: 109 rows, all equal" in out
    assert data["holds"] is True
    assert data["batch_args"] == ["0"]
    (eager,) = data["runs"]
    assert eager["first"] == []
    assert {case["kind"] for case in eager["cases"]} == set(prove.KINDS)
    assert {case["rows"] for case in eager["cases"]} == {1, 2, 7, 33}
    assert sum(case["compared"] for case in eager["cases"]) == 109


def test_planted_mixing_is_named_with_its_line(run) -> None:
    code, out, _, data = run("planted_centered", "--eager")
    assert code == 1
    assert f"{MODELS}:{line_of('        z = self.op(y)')}: z = self.op(y)" in out
    firsts = data["runs"][0]["first"]
    assert {first["kind"] for first in firsts} == set(prove.KINDS)
    for first in firsts:
        assert first["node"] == "planted.centered"
        assert first["follows"] == "what other rows hold"
        assert first["inputs"] == ["f32[2,48]"]
        assert first["rows"] == 2


def test_planted_choice_by_size_is_named(run) -> None:
    code, _, _, data = run("planted_counted", "--eager")
    assert code == 1
    first = data["runs"][0]["first"][0]
    assert first["node"] == "planted.counted"
    assert first["follows"] == "the number of rows or the row's place"
    assert first["rows"] == 7
    differing = {c["rows"]: c["differing"] for c in data["runs"][0]["cases"] if c["kind"] == "nan"}
    assert differing == {2: 0, 7: 3, 33: 3}


def test_only_strange_neighbours_show_a_leak(run) -> None:
    code, _, _, data = run("planted_leaky", "--eager")
    assert code == 1
    failing = {case["kind"] for case in data["runs"][0]["cases"] if case["differing"]}
    assert failing == {"nan", "inf"}
    assert [first["node"] for first in data["runs"][0]["first"]] == ["planted.leaky"] * 2


def test_tokens_masks_and_shared_arguments(run) -> None:
    code, out, _, data = run("ids", "--eager", rows="1,2,9")
    assert code == 0, out
    assert data["batch_args"] == ["0", "mask"]
    assert data["runs"][0]["notes"] == ["result 1 has no rows; not compared"]


@pytest.mark.parametrize(
    ("name", "node", "note"),
    [
        ("batch_norm", "aten.native_batch_norm", "mixes rows by nature: batch norm in training"),
        ("dropout", "aten.bernoulli_", "mixes rows by nature: random numbers"),
        ("placed", "aten.arange", ""),
        ("capacity", "aten.topk", "mixes rows by nature: a choice among rows"),
    ],
)
def test_mixing_by_nature_is_named(run, name: str, node: str, note: str) -> None:
    code, out, _, data = run(name, "--eager", rows="2,5")
    assert code == 1
    first = data["runs"][0]["first"][0]
    assert first["node"] == node
    assert first["where"].startswith(MODELS) or "torch" not in first["where"]
    assert note in out


def test_state_is_put_back(run) -> None:
    assert run("stateful", "--eager")[0] == 0


def test_rows_in_another_dim(run) -> None:
    named = ("--batch-dim", "1", "--batch-args", "0")
    code, _, _, data = run("transposed", "--eager", *named, rows="2,4")
    assert code == 0
    assert data["batch_args"] == ["0"]
    code, _, err, _ = run("transposed", "--eager", "--batch-dim", "5")
    assert code == 2
    assert "no tensor with rows in dim 5" in err


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("fails_alone", (), "the model with 1 row raised ValueError: needs two rows at"),
        ("batch_norm_of_one", (), "a model that needs several rows gives none a result of its own"),
        ("one_number", (), "no result has a dim that follows the rows"),
        ("result_per_row", (), "2 results with 2 rows, 1 with one; needs as many"),
        ("rowless", (), "hold no tensor with rows in dim 0"),
        ("clean", ("--batch-args", "y"), "no argument 'y'; the call has 0"),
        ("clean", ("--device", "nowhere"), "--device nowhere:"),
        ("missing", (), "has no 'missing'"),
    ],
)
def test_what_is_wrong_is_one_line(run, name: str, argv: tuple[str, ...], said: str) -> None:
    code, out, err, _ = run(name, "--eager", *argv)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.splitlines()) == 1


def test_rows_must_be_counts(run) -> None:
    code, _, err, _ = run("clean", rows="1,0")
    assert code == 2
    assert "needs numbers above 0" in err


def test_json_to_stdout_and_without_the_mode(capsys) -> None:
    argv = ["prove", f"{MODELS}:stateful", "--eager", "--no-mode", "--rows", "1,3", "--json", "-"]
    assert cli.main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["runs"][0]["mode"] is False


# ---- Compiled -----------------------------------------------------------------------------------


def test_compiled_model_is_proven(run) -> None:
    code, out, _, data = run("clean", "--compiled", rows="1,2,5,33")
    assert code == 0, out
    assert data["runs"][0]["how"] == "compiled"


def test_planted_mixing_is_found_in_the_compiled_graph(run) -> None:
    code, _, _, data = run("planted_first", "--compiled", "--shapes", "static", rows="5")
    assert code == 1
    (first,) = data["runs"][0]["first"]
    assert first["node"] == "planted.counted"
    line = line_of("    return lambda x: counted(x * 2) + 1, (_rows(),)")
    assert first["where"] == f"{MODELS}:{line}"
    assert (first["rows"], first["inputs"]) == (5, ["f32[5,48]"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("left_to_eager_code", "each graph compiled by itself gives equal rows"),
        ("all_eager", "torch.compile makes no graph of it"),
    ],
)
def test_what_is_left_to_eager_code_is_said(run, name: str, why: str) -> None:
    code, _, _, data = run(name, rows="1,2,9")
    eager, compiled = data["runs"]
    assert (code, eager["notes"], compiled["first"]) == (1, [], [])
    inside, first = compiled["notes"]
    assert "equal inside `with fxpass.batch_invariant_mode()`" in inside
    assert why in first


def test_a_beginning_returns_what_the_rest_uses() -> None:
    def model(x):
        a = x.sin()
        b = a.cos()
        c = a + b
        return c * b

    whole = fx.symbolic_trace(model)
    for node in whole.graph.nodes:
        node.meta["val"] = torch.empty(())
    x = torch.randn(3)
    names = [n.name for n in whole.graph.nodes if n.op in ("call_function", "call_method")]
    expected = [[x.sin()], [x.sin(), x.sin().cos()]]
    for name, wanted in zip(names, expected, strict=False):
        made = beginning(whole, name)(x)
        assert len(made) == len(wanted)
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    (last,) = beginning(whole, names[-1])(x)
    assert torch.equal(last, model(x))


# ---- Parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 3), (15, 2), (2, 15), (5 * 6, 2)])
def test_rows_are_found_where_they_are(shape: tuple[int, ...]) -> None:
    """Of a batch of five: rows first, inside, and merged with dims before or after them."""
    dim = next(d for d, size in enumerate(shape) if size % 5 == 0)
    one = [size // 5 if d == dim else size for d, size in enumerate(shape)]
    rows = [torch.randn(one) for _ in range(5)]
    for outer in {1, one[dim]}:
        split = [r.unflatten(dim, (outer, -1)) for r in rows]
        batch = torch.stack(split, dim=dim + 1).flatten(dim, dim + 2)
        found = compare.difference(dict(enumerate(rows)), batch, 5)
        assert found is not None
        assert found.rows == 0
        batch.reshape(-1)[0] += 1
        found = compare.difference(dict(enumerate(rows)), batch, 5)
        assert found is not None
        assert (found.rows, found.elements) == (1, 1)


def test_shapes_that_hold_no_rows() -> None:
    assert compare.places((3,), (3,), 5) == []
    assert compare.places((1, 1), (5, 5), 5) == []
    assert compare.places((1, 3), (4, 3), 5) == []


def test_bits_not_values_are_compared() -> None:
    a = torch.tensor([0.0, float("nan"), 1.0])
    b = torch.tensor([-0.0, float("nan"), 1.0])
    assert compare.same_bits(a, b).tolist() == [False, True, True]
    assert not compare.same_bits(a, a.double()).any()


def test_made_up_rows_are_legal() -> None:
    ids, mask = torch.tensor([[3, 9], [4, 4]]), torch.tensor([[True, True], [True, False]])
    bias = torch.tensor([[0.0, float("-inf")], [0.0, 0.0]])
    x = torch.full((2, 2), 5.0)
    rows = vary.filled(vary.find((ids, mask, bias, x), {}), {})
    (made_ids, made_mask, made_bias, made_x), _ = rows.call(range(rows.count))
    assert torch.equal(made_ids[:2], ids)
    assert set(made_ids[:, 0].tolist()) <= {3, 4}
    assert set(made_ids[:, 1].tolist()) <= {9, 4}
    wanted = {tuple(row) for row in mask.tolist()}
    assert {tuple(row) for row in made_mask.tolist()} <= wanted
    assert not made_bias.isnan().any()
    assert made_x[2:].unique().numel() > 1
    (_, _, _, strange), _ = rows.call([rows.special("nan"), rows.special("inf")])
    assert strange[0].isnan().all()
    assert strange[1].isinf().all()
    (limited, *_), _ = vary.filled(rows, {0: 2}).call(range(2, rows.count))
    assert limited.max() < 2


def test_named_arguments_must_agree() -> None:
    with pytest.raises(FxpassError, match=r"sizes \[2, 3\]"):
        vary.find((torch.zeros(2), torch.zeros(3)), {}, named=["0", "1"])


def test_every_place_is_tried() -> None:
    rows = vary.filled(vary.find((torch.randn(4, 3),), {}), {})
    for count in (2, 3, 8):
        chosen = prove.batches("nan", count, rows)
        assert {p for batch in chosen for p in batch.compared} == {0, count // 2, count - 1}
        for batch in chosen:
            beside = [i for at, i in enumerate(batch.indices) if at not in batch.compared]
            assert set(beside) == {rows.special("nan")}


@pytest.mark.gpu
def test_proven_on_a_gpu(run) -> None:
    for name in ("clean", "ids"):
        code, out, _, _ = run(name, "--device", "cuda", rows="1,2,64,257")
        assert code == 0, out
    code, _, _, data = run("planted_centered", "--device", "cuda", "--eager")
    assert code == 1
    assert data["runs"][0]["first"][0]["node"] == "planted.centered"
