"""The pass in Inductor's own hook, next to a pass of yours: how serving stacks add passes.

    python examples/inductor_pass.py

A stack that owns its `torch.compile` call puts `fxpass.RMSNormPass()` into its Inductor config.
Where the call is somebody else's, `fxpass.install()` puts the pass into the global hook, after what
is there already, and takes it out again.
"""

from __future__ import annotations

import torch
from torch import fx

import fxpass


def count_nodes(graph: fx.Graph) -> None:
    """A pass of the stack's own."""
    print(f"own pass: {len(graph.nodes)} nodes")


@torch.no_grad()
def main() -> None:
    model, x = torch.nn.RMSNorm(64).bfloat16(), torch.randn(8, 64).bfloat16()
    torch._inductor.config.force_disable_caches = True  # or a pass with a uuid(), to be cached

    ours = fxpass.RMSNormPass(strict=True)
    own = {"post_grad_custom_pre_pass": ours}
    torch.compile(model, options=own)(x)
    print("in a stack's config:", ours.report.summary())

    torch.compiler.reset()
    with torch._inductor.config.patch(post_grad_custom_pre_pass=count_nodes):
        with fxpass.install() as installed:
            torch.compile(model)(x)
        print("installed behind another:", installed.report.summary())
        assert torch._inductor.config.post_grad_custom_pre_pass is count_nodes


if __name__ == "__main__":
    main()
