"""The norm as Inductor's own code, so that what surrounds it is fused with it.

The roundings of the spec are written into that code (`fxpass/fused.py`), where Inductor by itself
would leave most of them out. Outside a compiler the kernel is the reference.
"""

from __future__ import annotations

import dataclasses

import torch

from fxpass.kernels import reference, steps
from fxpass.kernels.contract import Kernel
from fxpass.spec import NormSpec, is_narrow

CONTRACT = dataclasses.replace(
    reference.CONTRACT,
    platforms=("cpu", "cuda"),
    batch_invariant=False,  # Inductor picks the split and the block sizes by shape, or measures
    reduction="Inductor's: blocks and splits follow the shapes and its autotuner",
)


def refusal(spec: NormSpec) -> str | None:
    """Why the roundings of `spec` cannot be pinned in Inductor's code, or None."""
    if any(step.op == "rsqrt" and is_narrow(step.dtype) for step in spec.row):
        return "a 16-bit rsqrt, whose bits in eager on a CPU depend on the row's place"
    if {torch.bfloat16, torch.float16} <= {dtype for _, dtype in steps.dtypes_of(spec)}:
        return "bf16 and f16 in one kernel, which Inductor's C++ does not keep apart"
    return steps.refusal(spec, reference.CONTRACT.x)


KERNEL = Kernel("inductor.fused", CONTRACT, reference.launch, refuses=refusal)
