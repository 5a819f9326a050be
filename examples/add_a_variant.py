"""Teach fxpass a norm it does not know: one formula, tried out before it goes into patterns/.

    python examples/add_a_variant.py

The model below adds eps to the length itself, not under the root. fxpass leaves such a norm alone
and says so; a formula that describes it is enough for the rest (roundings, weights, residual adds,
kernels, reports) to follow. In the repository the formula goes into `patterns/`, with a case in the
tests; see CONTRIBUTING.md.
"""

from __future__ import annotations

from unittest import mock

import torch

import fxpass
from fxpass import matching
from fxpass.formula import Formula

EPS_OUTSIDE = Formula(
    "l2_norm.eps_outside",
    lambda p, x, eps: p.over(x, p.plus_eps(p.norm(x), eps)),
    "x / (norm(x) + eps)",
)


def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    h = h / (h.pow(2).sum(-1, keepdim=True).sqrt() + 1e-6)
    return w * h.to(x.dtype)


def main() -> None:
    x, w = torch.randn(4, 64).bfloat16(), torch.rand(64).bfloat16()
    print("before:", fxpass.explain(model, x, w), sep="\n")

    families = (*matching.FAMILIES, EPS_OUTSIDE)
    with mock.patch.object(matching, "FAMILIES", families):
        print("\nwith the formula:", fxpass.explain(model, x, w), sep="\n")
        graph_module = torch.fx.symbolic_trace(model)
        fxpass.rewrite(graph_module, x, w, providers=("reference",), strict=True)
    same = torch.equal(graph_module(x, w), model(x, w))
    print("\nbits as before:", same)
    assert same


if __name__ == "__main__":
    main()
