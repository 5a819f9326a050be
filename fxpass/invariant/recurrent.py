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


class Kind(NamedTuple):
    """Of layer: its cell, how many gates, and how many tensors its state is."""

    cell: Cell
    gates: int
    states: int


KINDS = {
    "lstm": Kind(_lstm, 4, 2),
    "gru": Kind(_gru, 3, 1),
    "rnn_tanh": Kind(_tanh, 1, 1),
    "rnn_relu": Kind(_relu, 1, 1),
}


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


def layers(
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
