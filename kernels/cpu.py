"""Row kernels in C++, one per spec, built once with the system compiler.

Batch-invariant: a row is reduced in 64 lanes (element i in lane i % 64), each lane in blocks of
4096 elements, and the lanes in a fixed binary tree; so the order depends on hidden alone, not on
the number of rows, threads, strides or the width of the machine's registers. `prepare` builds and
`launch` runs; whoever launches often keeps what `entry` returns.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from fxpass.kernels import cpu_build, cpu_call, cpu_source
from fxpass.kernels.build_cache import BuildError, Once
from fxpass.kernels.contract import Contract, Hidden, Kernel, Layout, Outputs
from fxpass.spec import Inverse, NormSpec, Rounding

CONTRACT = Contract(
    platforms=("cpu",),
    x=(torch.bfloat16, torch.float16, torch.float32),
    weight=("same", "other", "none"),
    hidden=Hidden(1),
    layout=Layout(rows="any"),
    rounding=tuple(Rounding),
    inverse=tuple(Inverse),
    programs="any",
    accumulate=torch.float32,
    residual=True,
    residual_rounded=True,
    weight_offset=True,
    weight_rows=True,
    bias=True,
    outputs=cpu_source.OUTPUTS,
    mutates=(),
    deterministic=True,
    batch_invariant=True,
    reduction="64 lanes (element i in lane i % 64), lane sums of 4096-element blocks added in "
    "order, then a binary tree over the lanes",
)

_entries: Once[cpu_call.Call] = Once()
_by_identity: dict[int, tuple[NormSpec, cpu_call.Call]] = {}
_BY_IDENTITY_MOST = 1024


def entry(spec: NormSpec) -> cpu_call.Call:
    """The fastest callable for `spec`: (x, residual, weight, bias, eps) -> tensor or tuple.

    Builds the kernel at the first call, in 0.3 s. Raises BuildError, with one line saying why.
    """
    return _entries.get(spec, lambda: _built(spec))


def prepare(spec: NormSpec, hidden: int | None) -> str | None:
    """Build the kernel of `spec`. None, or one line saying why there is none."""
    del hidden  # one kernel serves every hidden
    try:
        entry(spec)
    except BuildError as error:
        return str(error)
    return None


def prepare_all(specs: Iterable[NormSpec]) -> None:
    """Build several kernels side by side; a failure shows in the `prepare` that follows."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda spec: prepare(spec, None), dict.fromkeys(specs)))


def launch(
    spec: NormSpec,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> Outputs:
    """Run the kernel of `spec`, building it if need be. Not differentiable."""
    # Hashing a spec costs 10 us; holding it makes its id a key.
    known = _by_identity.get(id(spec))
    call = _remembered(spec) if known is None else known[1]
    made = call(x, residual, weight, bias, eps)
    return made if isinstance(made, tuple) else (made,)


def _remembered(spec: NormSpec) -> cpu_call.Call:
    call = entry(spec)
    if len(_by_identity) >= _BY_IDENTITY_MOST:
        _by_identity.clear()
    _by_identity[id(spec)] = (spec, call)
    return call


def _built(spec: NormSpec) -> cpu_call.Call:
    refused = cpu_source.refusal(spec)
    if refused is not None:
        raise BuildError(refused)
    glue = cpu_call.has_glue()
    with ThreadPoolExecutor(1) as pool:  # the first build compiles the glue beside the kernel
        waiting = pool.submit(cpu_call.load_glue) if glue else None
        run = _load(spec)
        if waiting is not None:
            waiting.result()
    return cpu_call.through_glue(spec, run) if glue else cpu_call.through_ctypes(spec, run)


def _load(spec: NormSpec) -> Any:
    """The C function `fxpass_run` of `spec`."""
    return cpu_build.load_library("row", cpu_source.source(spec)).fxpass_run


def unavailable() -> str | None:
    """None, or why no kernel can be built here."""
    try:
        cpu_build.compiler()
    except BuildError as error:
        return str(error)
    return None


KERNEL = Kernel(
    "cpu.row", CONTRACT, launch, prepare, unavailable, prepare_all, cpu_source.refusal, entry
)
