"""Parts of a tensor, and its dims in another order: leaves, but equal ones are one value."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxpass import facts
from fxpass.calls import Call, spelled
from fxpass.terms import Term

aten = torch.ops.aten


@spelled(
    aten.slice.Tensor, aten.select.int, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.narrow.default, torch.transpose, torch.permute, torch.select,
    torch.narrow, torch.swapaxes, torch.t, "transpose", "permute", "select", "narrow", "swapaxes",
    "t", "__getitem__",
)  # fmt: skip
def picked(call: Call) -> Term | None:
    """Part of a tensor, or its dims in another order: taken twice, it is one value."""

    def known(arg: Any) -> Any:
        return f"%{id(call.table.of(arg))}" if isinstance(arg, fx.Node) else arg

    named = sorted(call.node.kwargs.items())
    taken = fx.node.map_aggregate((*call.node.args, *named), known)
    tracked = facts.requires_grad(call.node)
    params = (str(call.node.target), repr(taken), tracked)
    return call.table.make("leaf", (), params, call.result.dtype, call.result.shape)
