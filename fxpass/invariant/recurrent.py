"""Recurrent layers, step by step: LSTM, GRU and plain ones, of equal and of packed lengths.

The libraries' own multiply inside one call, in an order that follows the batch. Here the products
of all inputs are one product, and those of the hidden state one a step. What a cell does after its
products is ATen's (aten/src/ATen/native/RNN.cpp), every operator rounded to the inputs' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fxpass.invariant.aten import Operator, is_empty
from fxpass.kernels.invariant import dispatch

Tensor = torch.Tensor
State = tuple[Tensor, ...]
"""Of one layer in one direction, each (B, H): hidden, and an LSTM's cell."""


class Weights(NamedTuple):
    """Of one layer in one direction: of the input, of the hidden state, of its projection."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: Tensor | None = None


Cell = Callable[[Tensor, Tensor, State, "Tensor | None"], State]
"""(input's product, hidden's product, state, projection) -> the next state, hidden first."""


# ---- Cells ---------------------------------------------------------------------------------------


def _lstm(ours: Tensor, hidden: Tensor, state: State, w_hr: Tensor | None) -> State:
    i, f, g, o = (ours + hidden).chunk(4, 1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    made = o.sigmoid() * cell.tanh()
    return (made if w_hr is None else F.linear(made, w_hr), cell)


def _gru(ours: Tensor, hidden: Tensor, state: State, w_hr: Tensor | None) -> State:
    (r, z, n), (hidden_r, hidden_z, hidden_n) = ours.chunk(3, 1), hidden.chunk(3, 1)
    new = (n + hidden_n * (hidden_r + r).sigmoid()).tanh()
    return ((state[0] - new) * (hidden_z + z).sigmoid() + new,)


def _tanh(ours: Tensor, hidden: Tensor, state: State, w_hr: Tensor | None) -> State:
    return ((ours + hidden).tanh(),)


def _relu(ours: Tensor, hidden: Tensor, state: State, w_hr: Tensor | None) -> State:
    return ((ours + hidden).relu(),)


# ---- Layers --------------------------------------------------------------------------------------


def _direction(
    data: Tensor, sizes: Sequence[int], state: State, weights: Weights, cell: Cell, back: bool
) -> tuple[Tensor, State]:
    """One layer in one direction: (results of all steps, last state).

    data: (sum of sizes, I), the rows of every step after those of the one before. sizes: rows of
    each step, the longest sequences first, so that none grows.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr = weights
    inputs = torch.split(F.linear(data, w_ih, b_ih), list(sizes))
    found: list[Any] = [None] * len(sizes)
    for step in reversed(range(len(sizes))) if back else range(len(sizes)):
        rows = sizes[step]
        now = tuple(part[:rows] for part in state)
        made = cell(inputs[step], F.linear(now[0], w_hh, b_hh), now, w_hr)
        # Sequences that have ended, or have not begun from behind, keep what they have.
        pairs = zip(made, state, strict=True)
        state = tuple(n if rows == len(s) else torch.cat([n, s[rows:]]) for n, s in pairs)
        found[step] = made[0]
    return torch.cat(found), state


def _layers(
    data: Tensor,
    sizes: Sequence[int],
    states: Sequence[Tensor],
    every: Sequence[Weights],
    cell: Cell,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """All layers: (results of all steps, the last states, one tensor for each kind of state).

    states: each (layers * directions, B, H).
    """
    ways, last = 1 + bidirectional, list[State]()
    for first in range(0, len(every), ways):
        if first and dropout:
            data = F.dropout(data, dropout)
        made = []
        for way in range(ways):
            state = tuple(kind[first + way] for kind in states)
            out, state = _direction(data, sizes, state, every[first + way], cell, bool(way))
            made.append(out)
            last.append(state)
        data = torch.cat(made, -1) if bidirectional else made[0]
    return data, *(torch.stack(kind) for kind in zip(*last, strict=True))


def _weights(
    params: Sequence[Tensor],
    biases: bool,
    states: Sequence[Tensor],
    num_layers: int,
    bidirectional: bool,
) -> list[Weights] | None:
    """As they lie in `params`: input, hidden, both biases, projection; layer by layer.

    None if there are not as many as the layers have.
    """
    projected = states[0].shape[-1] != states[-1].shape[-1]
    count = 2 + 2 * biases + projected
    if len(params) != count * num_layers * (1 + bidirectional):
        return None
    found = []
    for first in range(0, len(params), count):
        w_ih, w_hh, *rest = params[first : first + count]
        b_ih, b_hh = rest[:2] if biases else (None, None)
        found.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if projected else None))
    return found


# ---- ATen's operators ----------------------------------------------------------------------------


def _takes(x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], packed: bool) -> bool:
    """Whether it is done here: torch has words for what does not fit together."""
    given = [x, *states, *params]
    same = all(t.dtype == x.dtype and t.device == x.device for t in given)
    return same and dispatch.takes(x, product=True) and not is_empty(x) and x.dim() == 3 - packed


def layers(cell: Cell, several: bool) -> Operator:
    """aten::lstm.input and the like. several: the state is a list of two (an LSTM's)."""

    def call(
        input: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        states = list(hx) if several else [hx]
        if not _takes(input, states, params, packed=False):
            return NotImplemented
        x = input.transpose(0, 1) if batch_first else input
        steps, batch = x.shape[:2]
        every = _weights(params, has_biases, states, num_layers, bidirectional)
        if every is None or states[0].shape[1] != batch:
            return NotImplemented
        dropout = dropout if train else 0.0
        data, *last = _layers(
            x.flatten(0, 1), [batch] * steps, states, every, cell, dropout, bidirectional
        )
        out = data.view(steps, batch, -1)
        return out.transpose(0, 1) if batch_first else out, *last

    return call


def packed_layers(cell: Cell, several: bool) -> Operator:
    """aten::lstm.data and the like, of a PackedSequence."""

    def call(
        data: Tensor,
        batch_sizes: Tensor,
        hx: Any,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> Any:
        states = list(hx) if several else [hx]
        if not _takes(data, states, params, packed=True):
            return NotImplemented
        sizes = batch_sizes.tolist()
        every = _weights(params, has_biases, states, num_layers, bidirectional)
        if every is None or states[0].shape[1] != sizes[0]:
            return NotImplemented
        dropout = dropout if train else 0.0
        return _layers(data, sizes, states, every, cell, dropout, bidirectional)

    return call


def step(cell: Cell, several: bool) -> Operator:
    """aten::lstm_cell and the like."""

    def call(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        states = tuple(hx) if several else (hx,)
        given = [t for t in (w_ih, w_hh, b_ih, b_hh) if t is not None]
        if not _takes(input, states, given, packed=True):
            return NotImplemented
        hidden = F.linear(states[0], w_hh, b_hh)
        made = cell(F.linear(input, w_ih, b_ih), hidden, states, None)
        return made if several else made[0]

    return call


_CELLS = {"lstm": (_lstm, True), "gru": (_gru, False), "rnn_tanh": (_tanh, False),
          "rnn_relu": (_relu, False)}  # fmt: skip


def table() -> dict[str, Operator]:
    """Every recurrent operator, by overload."""
    found: dict[str, Operator] = {}
    for name, (cell, several) in _CELLS.items():
        found[f"{name}.input"] = layers(cell, several)
        found[f"{name}.data"] = packed_layers(cell, several)
        found[f"{name}_cell"] = step(cell, several)
    return found
