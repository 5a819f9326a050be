"""Recurrent layers in the mode: torch's results, of sequences that do not know each other."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import fxpass
from fxpass.invariant.recorder import Recorder

F32 = torch.float32
LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "tanh": nn.RNN,
    "relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
    "projected": lambda *args, **kwargs: nn.LSTM(*args, proj_size=5, **kwargs),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "tanh": nn.RNNCell,
    "relu": lambda *args: nn.RNNCell(*args, nonlinearity="relu"),
}
FORMS = list(itertools.product((1, 2), (False, True), (False, True), (False, True)))
"""Layers, bidirectional, batch_first, bias."""
SIZES = {"input": 7, "hidden": 11, "steps": 6, "batch": 4}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # oneDNN has no projections
        yield


def flat(made) -> list[torch.Tensor]:
    """The tensors of a result, a PackedSequence's data among them."""
    if isinstance(made, torch.Tensor):
        return [made] if made.is_floating_point() else []
    return [] if made is None else [t for part in made for t in flat(part)]


def made(kind: str, form, dtype=F32, device="cpu") -> nn.Module:
    layers, bidirectional, batch_first, bias = form
    return LAYERS[kind](
        SIZES["input"], SIZES["hidden"], layers,
        bidirectional=bidirectional, batch_first=batch_first, bias=bias,
    ).to(device, dtype)  # fmt: skip


def check(kind: str, form, dtype=F32, device="cpu", tolerance: float = 1e-5) -> None:
    layer, batch_first = made(kind, form, dtype, device), form[2]
    x = torch.randn(SIZES["batch"], SIZES["steps"], SIZES["input"]).to(device, dtype)
    one = x[2:3] if batch_first else x[2:3].transpose(0, 1)
    x = x if batch_first else x.transpose(0, 1)
    wanted = flat(layer(x))
    with fxpass.batch_invariant_mode(), Recorder() as seen:
        found, alone = flat(layer(x)), flat(layer(one))
    assert seen.unknown == []
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
        assert ours.stride() == theirs.stride()
    rows = [found[0][2:3] if batch_first else found[0][:, 2:3], *(s[:, 2:3] for s in found[1:])]
    assert all(torch.equal(a, b) for a, b in zip(alone, rows, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_beside_torch(kind: str, form) -> None:
    check(kind, form)


# 16 bits: oneDNN keeps the state of a step in float32, here it is rounded after every operator.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_dtypes(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    check(kind, FORMS[-1], dtype, tolerance=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYERS)
def test_on_a_gpu(kind: str, dtype: torch.dtype) -> None:
    tolerance = {F32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]  # tf32 in cuDNN
    check(kind, FORMS[-1], dtype, "cuda", tolerance)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMS[-4:], ids=str)
def test_packed_sequences_are_those_alone(kind: str, form) -> None:
    layer = made(kind, form)
    sequences = [torch.randn(steps, SIZES["input"]) for steps in (5, 2, 6, 1)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    wanted = flat(layer(packed))
    with fxpass.batch_invariant_mode():
        found = layer(packed)
        alone = [layer(pack_sequence([sequence])) for sequence in sequences]
    for ours, theirs in zip(flat(found), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    padded, _ = pad_packed_sequence(found[0], batch_first=True)
    for row, (sequence, (out, last)) in enumerate(zip(sequences, alone, strict=True)):
        assert torch.equal(out.data, padded[row, : len(sequence)])
        for one, every in zip(flat(last), flat(found[1]), strict=True):
            assert torch.equal(one[:, 0], every[:, row])


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients(kind: str) -> None:
    layer = made(kind, FORMS[-1])
    x = torch.randn(SIZES["batch"], SIZES["steps"], SIZES["input"], requires_grad=True)
    found = []
    for enabled in (False, True):
        with fxpass.batch_invariant_mode(enabled):
            whole = sum(t.sin().sum() for t in flat(layer(x)))
            found.append(torch.autograd.grad(whole, [x, *layer.parameters()]))
    for wanted, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind: str, bias: bool) -> None:
    cell, x = CELLS[kind](7, 11), torch.randn(4, 7)
    if not bias:
        cell = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}.get(kind, nn.RNNCell)(7, 11, bias=False)
    wanted = flat(cell(x))
    with fxpass.batch_invariant_mode():
        found, alone = flat(cell(x)), flat(cell(x[1:2]))
    for ours, theirs, one in zip(found, wanted, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(ours[1:2], one)


def test_dropout_is_between_the_layers() -> None:
    layer = nn.LSTM(7, 11, 3, dropout=0.5)
    x = torch.randn(6, 4, 7)
    with fxpass.batch_invariant_mode():
        layer.train()
        first, second = layer(x)[0], layer(x)[0]
        layer.eval()
        assert not torch.equal(first, second)
        assert torch.equal(layer(x)[0], layer(x)[0])
        single = nn.LSTM(7, 11, 1).train()
        assert torch.equal(single(x)[0], single(x)[0])


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast(kind: str, device: str) -> None:
    for form in (FORMS[0], FORMS[-1]):
        layer = made(kind, form, device=device)
        x = torch.randn(SIZES["batch"], SIZES["steps"], SIZES["input"], device=device)
        packed = pack_sequence([x[0], x[1, :3]])
        for given in (x, packed):
            dtypes = []
            for enabled in (False, True):
                with (
                    fxpass.batch_invariant_mode(enabled),
                    torch.autocast(device, dtype=torch.bfloat16),
                ):
                    dtypes.append([t.dtype for t in flat(layer(given))])
            assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("kind", LAYERS)
def test_results_are_no_views(kind: str) -> None:
    for form in FORMS[:4]:
        with fxpass.batch_invariant_mode():
            out = made(kind, form)(torch.randn(4, 6, 7))[0]
        assert not out._is_view()
        out.detach_()


def test_mistakes_are_torchs() -> None:
    gru, lstm, x = nn.GRU(7, 11), nn.LSTMCell(7, 11), torch.randn(6, 4, 7)
    weights = [lstm.weight_ih, lstm.weight_hh, lstm.bias_ih, lstm.bias_hh]
    row, whole = torch.randn(4, 7), torch.zeros(4, 11)
    layers = lambda x, h, *more: torch.gru(x, h, gru._flat_weights, True, *more)  # noqa: E731
    packed = lambda sizes: torch.gru(  # noqa: E731
        x.flatten(0, 1)[:9], torch.tensor(sizes), torch.zeros(1, 4, 11), gru._flat_weights,
        True, 1, 0.0, False, False,
    )  # fmt: skip
    calls = {
        "no steps": lambda: gru(x[:0]),
        "another batch": lambda: layers(x, torch.zeros(1, 3, 11), 1, 0.0, False, False, False),
        "more states": lambda: layers(x, torch.zeros(2, 4, 11), 1, 0.0, False, False, False),
        "growing sizes": lambda: packed([4, 2, 3]),
        "one state for all": lambda: nn.GRUCell(7, 11)(row, torch.zeros(1, 11)),
        "one sample for all": lambda: nn.RNNCell(7, 11)(row[:1], whole),
        "one cell for all": lambda: lstm(row, (whole, torch.zeros(1, 11))),
        "a narrow cell": lambda: torch.lstm_cell(row, [whole, torch.zeros(4, 1)], *weights),
        "three states": lambda: torch.lstm_cell(row, [whole] * 3, *weights),
        "one state": lambda: torch.lstm_cell(row, [whole], *weights),
        "a state without rows": lambda: torch.lstm_cell(row, [whole[0], whole], *weights),
        "another width": lambda: lstm(torch.randn(4, 8), (whole, whole)),
    }
    for name, call in calls.items():
        said = []
        for enabled in (False, True):
            try:
                with fxpass.batch_invariant_mode(enabled):
                    said.append(tuple(t.shape for t in flat(call())))
            except (RuntimeError, ValueError, IndexError) as error:
                said.append((type(error), str(error)))
        assert said[0] == said[1], name
        assert isinstance(said[0][0], type), name
