"""A model with three norms: plan, compile, compare, read the report.

python examples/quickstart.py
"""

from __future__ import annotations

import torch

import fxpass


class Model(torch.nn.Module):
    """Two layers and a last norm, in bfloat16."""

    def __init__(self, hidden: int = 256) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden) for _ in range(2))
        self.linears = torch.nn.ModuleList(torch.nn.Linear(hidden, hidden) for _ in range(2))
        self.last = torch.nn.RMSNorm(hidden)
        self.bfloat16()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A residual stream."""
        for norm, linear in zip(self.norms, self.linears, strict=True):
            x = x + linear(norm(x))
        return self.last(x)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(8, 256).bfloat16()

    print(fxpass.explain(model, x))  # a dry run: nothing is compiled

    compiled = torch.compile(model, backend=fxpass.rmsnorm_backend, options={"numerics": "eager"})
    eager, ours = model(x), compiled(x)
    print(f"\n{(eager != ours).sum().item()} of {eager.numel()} elements differ from eager")
    print(fxpass.last_report().summary())


if __name__ == "__main__":
    main()
