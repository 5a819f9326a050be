"""What the GPU row kernels promise. They differ in where they run, and in nothing else."""

from __future__ import annotations

import torch

from fxpass.kernels import gpu_rows
from fxpass.kernels.contract import Contract, Hidden, Layout
from fxpass.spec import Inverse, Rounding


def contract(*platforms: str) -> Contract:
    """The contract of a row kernel for `platforms`."""
    return Contract(
        platforms=platforms,
        x=(torch.bfloat16, torch.float16, torch.float32),
        weight=("same", "other", "none"),
        hidden=Hidden(1, 65_536),
        layout=Layout(rows="any", leading=gpu_rows.LEADING),
        rounding=tuple(Rounding),
        inverse=tuple(Inverse),
        programs="any",
        accumulate=torch.float32,
        residual=True,
        residual_rounded=True,
        weight_offset=True,
        weight_rows=True,
        bias=True,
        outputs=("out", "sum", "row"),
        mutates=(),
        deterministic=True,
        batch_invariant=True,
        reduction=gpu_rows.REDUCTION,
    )
