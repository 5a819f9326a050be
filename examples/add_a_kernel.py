"""A kernel of your own: a contract that says what it needs and promises, and a launch.

    python examples/add_a_kernel.py

Selection asks registered kernels first, and refuses this one for every norm its contract does not
cover, in words. Kernels of the package stand in `kernels/`; see CONTRIBUTING.md.
"""

from __future__ import annotations

import torch

import fxpass
from fxpass.kernels import Contract, Hidden, Kernel, Layout, Outputs, register, unregister
from fxpass.spec import Inverse, NormSpec, Rounding

CONTRACT = Contract(
    platforms=("cpu",),
    x=(torch.bfloat16,),
    weight=("same",),
    hidden=Hidden(least=1, most=4096),
    layout=Layout(rows="contiguous", rank=2),  # so fxpass flattens and copies where it must
    rounding=(Rounding.CAST_THEN_SCALE,),
    inverse=(Inverse.RSQRT,),
    programs="rms",
    accumulate=torch.float32,
    residual=False,
    residual_rounded=True,
    weight_offset=False,
    weight_rows=False,
    bias=False,
    outputs=("out",),
    mutates=(),
    deterministic=True,
    batch_invariant=False,
    reduction="torch.mean over the last dim",
)


def launch(
    spec: NormSpec,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Outputs:
    """Rows of bf16 in Llama's rounding order; the contract keeps everything else away."""
    assert weight is not None
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * h.to(x.dtype),)


def llama(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return w * h.to(x.dtype)


@torch.no_grad()
def main() -> None:
    x, w = torch.randn(2, 4, 64).bfloat16(), torch.rand(64).bfloat16()
    register(Kernel("mine.rows", CONTRACT, launch))
    try:
        graph_module = torch.fx.symbolic_trace(llama)
        print(fxpass.rewrite(graph_module, x, w, strict=True))
        assert torch.equal(graph_module(x, w), llama(x, w))

        other = fxpass.explain(torch.nn.RMSNorm(64).bfloat16(), x)
        (site,) = other.rewritten
        print(f"\nanother norm goes to {site.kernel}: {', '.join(site.refusals)}")
    finally:
        unregister("mine.rows")


if __name__ == "__main__":
    main()
