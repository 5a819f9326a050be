"""The columns of the norm benchmark: a copy of the same bytes, what others do, and our kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import CAST_FIRST, EAGER, EPS, SCALE_FIRST, Case, Norm, Tensor, fresh
from gpu_fill import inductor_only
from gpu_named import named

from fxpass.kernels import kernels, reference
from fxpass.spec import NormSpec

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

PATCHES: dict[str, dict[str, Any] | None] = {
    "inductor": None,
    "inductor_epc": {"emulate_precision_casts": True},
}
SCALE_FIRST_HIDDEN = (128, 1024, 4096, 8192)
"""Inductor's columns in the second rounding order: fewer, each costs a compile."""
BLOCKS = (1024, 4096)
"""Elements per program of the Triton copy: one and four 16-byte vectors per thread."""

if triton is not None:

    @triton.jit
    def _copy_kernel(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


def copies(case: Case, sets: int, device: str) -> dict[str, Callable[[int], object]]:
    """Ways to copy as many bytes as the norm must move; the fastest one is the ceiling."""
    source = torch.empty((sets, case.moved // 4), dtype=torch.bfloat16, device=device).normal_()

    def memcpy(i: int) -> Tensor:
        return torch.empty_like(source[i]).copy_(source[i])

    def by_triton(i: int, block: int) -> Tensor:
        target, count = torch.empty_like(source[i]), source.shape[1]
        _copy_kernel[(triton.cdiv(count, block),)](source[i], target, count, BLOCK=block)
        return target

    found: dict[str, Callable[[int], object]] = {"copy_": memcpy}
    if device == "cuda":
        found |= {f"copy {block}": functools.partial(by_triton, block=block) for block in BLOCKS}
    return found


def ours(case: Case, platform: str) -> tuple[dict[str, Norm], dict[str, str]]:
    """Our kernels that take the case, by name, and why the others do not."""
    spec = NormSpec.parse(case.spec)
    found: dict[str, Norm] = {}
    refused: dict[str, str] = {}
    for kernel in kernels():
        # A kernel that only lowers into compiled code has the reference for its launch.
        if platform not in kernel.contract.platforms or kernel.launch is reference.launch:
            continue
        why = kernel.refusal(spec, platform, case.hidden) or kernel.prepare(spec, case.hidden)
        if why is None:
            found[kernel.name] = bound(kernel.entry(spec))
        else:
            refused[kernel.name] = why
    return found, refused


def bound(entry: Callable[..., object]) -> Norm:
    """A kernel's entry as a column."""
    return lambda x, residual, weight: entry(x, residual, weight, None, EPS)


def peers(case: Case, inductor_rows: tuple[int, ...]) -> dict[str, Norm]:
    """What the case is compared with, Inductor only where it is asked for."""
    found: dict[str, Norm] = {"eager_hf": EAGER[case.rounding], "F.rms_norm": _torch_norm}
    for name in inductor_columns(case, inductor_rows):
        found[name] = torch.compile(
            fresh(EAGER[case.rounding]), dynamic=False, options=PATCHES[name]
        )
    liger = _liger("llama" if case.rounding == CAST_FIRST else "gemma")
    if liger is not None:
        found["liger"] = liger
    return {**found, **named(case)}


def inductor_columns(case: Case, inductor_rows: tuple[int, ...]) -> list[str]:
    """Which Inductor columns the case gets."""
    if case.rows not in inductor_rows or case.dtype != "bf16":
        return []
    if case.rounding == SCALE_FIRST:
        if case.hidden not in SCALE_FIRST_HIDDEN:
            return []
        # Without a residual there is no rounding on the way that Inductor could drop.
        return ["inductor", "inductor_epc"] if case.variant == "residual" else ["inductor"]
    return list(PATCHES)


def compile_for_cache(case: Case, column: str, inputs: tuple[Any, ...]) -> None:
    """What `peers` compiles, compiled for the cache alone."""
    backend = inductor_only(PATCHES[column])
    torch.compile(fresh(EAGER[case.rounding]), dynamic=False, backend=backend)(*inputs)


def _torch_norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> object:
    if residual is None:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, EPS)
    added = x + residual
    return torch.nn.functional.rms_norm(added, weight.shape, weight, EPS), added


@functools.cache
def _liger(casting: str) -> Norm | None:
    """Liger's kernels without its autograd function, or None where it is not installed."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import fused_add_rms_norm_forward
        from liger_kernel.ops.rms_norm import rms_norm_forward
    except ImportError:
        return None

    def norm(x: Tensor, residual: Tensor | None, weight: Tensor) -> object:
        if residual is not None:
            return fused_add_rms_norm_forward(x, residual, weight, EPS, 0.0, casting)[:2]
        # It views x as rows, so a slice is copied first, as its own wrapper does.
        return rms_norm_forward(x.contiguous(), weight, EPS, 0.0, casting, None)[0]

    return norm
