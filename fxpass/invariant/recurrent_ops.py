"""ATen's recurrent operators, made of `recurrent`'s layers: what fits together, and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fxpass.invariant import recurrent
from fxpass.invariant.aten import Operator, aten, is_empty
from fxpass.invariant.recurrent import KINDS, Kind, Weights
from fxpass.kernels.invariant import dispatch

Tensor = torch.Tensor

# ---- What fits together --------------------------------------------------------------------------


def _takes(x: Tensor, others: Sequence[Tensor], rank: int) -> bool:
    """Whether it is done here; torch has words for what does not fit together."""
    same = all(t.dtype == x.dtype and t.device == x.device for t in others)
    return same and dispatch.takes(x, product=True) and not is_empty(x) and x.dim() == rank


def _weights(params: Sequence[Tensor], biases: bool, projected: bool) -> list[Weights]:
    """As they lie in `params`: input, hidden, both biases, projection; layer by layer."""
    count, found = 2 + 2 * biases + projected, []
    for first in range(0, len(params), count):
        w_ih, w_hh, *rest = params[first : first + count]
        b_ih, b_hh = rest[:2] if biases else (None, None)
        found.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if projected else None))
    return found


def _fit(
    kind: Kind,
    features: int,
    batch: int,
    states: Sequence[Tensor],
    every: Sequence[Weights],
    num_layers: int,
    ways: int,
) -> bool:
    """Whether states and weights have the shapes of so many layers and directions."""
    width, hidden = states[0].shape[-1], states[-1].shape[-1]
    if len(every) != num_layers * ways or not every:
        return False
    shapes = [tuple(state.shape) for state in states]
    if shapes != [(num_layers * ways, batch, size) for size in (width, hidden)[: kind.states]]:
        return False
    rows = kind.gates * hidden
    for at, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(every):
        wanted: list[tuple[Tensor | None, tuple[int, ...]]] = [
            (w_ih, (rows, features if at < ways else ways * width)),
            (w_hh, (rows, width)),
            (b_ih, (rows,)),
            (b_hh, (rows,)),
            (w_hr, (width, hidden)),
        ]
        if any(t is not None and tuple(t.shape) != shape for t, shape in wanted):
            return False
    return True


def _autocast_to(x: Tensor, cell_of_two: bool) -> torch.dtype | None:
    """What autocast turns all of a layer into, where torch's is one operator; None if it does not.

    Where it is many, autocast turns some of them into that by itself, here as there. On a CPU one
    is an LSTM's (`cell_of_two`: neither packed nor projected), on a GPU all are cuDNN's
    or MIOpen's, and autocast gives them float16 whatever its dtype (ATen/cudnn/AutocastRNN.cpp).
    """
    device = x.device.type
    fused = cell_of_two if device == "cpu" else bool(torch.backends.cudnn.enabled)
    if not fused or not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device) if device == "cpu" else torch.float16


# ---- ATen's operators ----------------------------------------------------------------------------


class Settings(NamedTuple):
    """What ATen's operators on sequences are given after the weights."""

    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool


def _states(hx: Any) -> list[Tensor]:
    return [hx] if isinstance(hx, Tensor) else list(hx)


def _run(
    kind: Kind,
    data: Tensor,
    sizes: Sequence[int],
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    given: Settings,
    packed: bool,
) -> Any:
    """`recurrent.layers` of ATen's arguments, or NotImplemented."""
    if len(states) != kind.states or any(state.dim() != 3 for state in states):
        return NotImplemented
    projected = states[0].shape[-1] != states[-1].shape[-1]
    dropout = given.dropout if given.train else 0.0
    if len(params) % (2 + 2 * given.has_biases + projected) or not 0 <= dropout <= 1:
        return NotImplemented
    every = _weights(params, given.has_biases, projected)
    ways = 1 + given.bidirectional
    if not _fit(kind, data.shape[-1], sizes[0], states, every, given.num_layers, ways):
        return NotImplemented
    more = (kind.cell, dropout, given.bidirectional)
    dtype = _autocast_to(data, kind.states == 2 and not (packed or projected))
    if dtype is None:
        return recurrent.layers(data, sizes, states, every, *more)
    every = _weights([t.to(dtype) for t in params], given.has_biases, projected)
    with torch.autocast(data.device.type, enabled=False):
        states = [state.to(dtype) for state in states]
        return recurrent.layers(data.to(dtype), sizes, states, every, *more)


def whole(kind: Kind) -> Operator:
    """aten::lstm.input and the like: input (T, B, I), or (B, T, I) if `batch_first`."""

    def call(input: Tensor, hx: Any, params: Sequence[Tensor], *more: Any) -> Any:
        *given, batch_first = more
        states = _states(hx)
        if not _takes(input, [*states, *params], 3):
            return NotImplemented
        x = input.transpose(0, 1) if batch_first else input
        steps, batch = x.shape[:2]
        sizes = [batch] * steps
        made = _run(kind, x.flatten(0, 1), sizes, states, params, Settings(*given), packed=False)
        if made is NotImplemented:
            return made
        data, *last = made
        out = aten._unsafe_view(data, (steps, batch, data.shape[-1]))  # no view of `data`
        return out.transpose_(0, 1) if batch_first else out, *last

    return call


def packed(kind: Kind) -> Operator:
    """aten::lstm.data and the like, of a PackedSequence: data (sum of batch_sizes, I)."""

    def call(
        data: Tensor, batch_sizes: Tensor, hx: Any, params: Sequence[Tensor], *given: Any
    ) -> Any:
        states = _states(hx)
        if not _takes(data, [*states, *params], 2) or batch_sizes.dtype != torch.int64:
            return NotImplemented
        sizes = batch_sizes.tolist()
        if not sizes or sizes != sorted(sizes, reverse=True) or sizes[-1] < 1:
            return NotImplemented
        if sum(sizes) != len(data):
            return NotImplemented
        return _run(kind, data, sizes, states, params, Settings(*given), packed=True)

    return call


def step(kind: Kind) -> Operator:
    """aten::lstm_cell and the like."""

    def call(
        input: Tensor,
        hx: Any,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        states = tuple(_states(hx))
        given = [t for t in (w_ih, w_hh, b_ih, b_hh) if t is not None]
        if not _takes(input, [*states, *given], 2) or len(states) != kind.states:
            return NotImplemented
        batch, features = input.shape
        if any(state.dim() != 2 for state in states):
            return NotImplemented
        stacked = [state.unsqueeze(0) for state in states]
        weights = Weights(w_ih, w_hh, b_ih, b_hh)
        if states[0].shape[1] != states[-1].shape[1]:
            return NotImplemented
        if not _fit(kind, features, batch, stacked, [weights], 1, 1):
            return NotImplemented
        hidden = F.linear(states[0], w_hh, b_hh)
        made = kind.cell(F.linear(input, w_ih, b_ih), hidden, states, None)
        return made if kind.states > 1 else made[0]

    return call


def table() -> dict[str, Operator]:
    """Every recurrent operator, by overload."""
    found: dict[str, Operator] = {}
    for name, kind in KINDS.items():
        found[f"{name}.input"] = whole(kind)
        found[f"{name}.data"] = packed(kind)
        found[f"{name}_cell"] = step(kind)
    return found
