"""What a kernel promises and needs, as data.

One record selects a kernel, words its refusal, generates its test matrix and prints the kernel
table. Numerical fields have no defaults: an author must answer them. A claim is tested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fxpass.dtypes import short
from fxpass.spec import Inverse, NormSpec, Rounding

Outputs = tuple[torch.Tensor, ...]
Launch = Callable[
    [
        NormSpec,
        torch.Tensor,
        "torch.Tensor | None",
        "torch.Tensor | None",
        "torch.Tensor | None",
        float,
    ],
    Outputs,
]
"""(spec, x, residual, weight, bias, eps) -> the tensors named in spec.outputs.

x, residual: (..., hidden), equal shapes. weight, bias: hidden elements, or `rows` x hidden for
weights that repeat every `rows` rows. out, sum: contiguous, x's shape. row: (..., 1).
"""


@dataclass(frozen=True)
class Hidden:
    """Inclusive range of the normalised length."""

    least: int = 1
    most: int | None = None
    multiple: int = 1

    def refusal(self, hidden: int | None) -> str | None:
        """Why `hidden` (None: known only at run time) is out of range, or None."""
        if hidden is None:
            free = self.most is None and self.multiple == 1
            return None if free else "hidden is known only at run time"
        if hidden < self.least:
            return f"hidden {hidden} < {self.least}"
        if self.most is not None and hidden > self.most:
            return f"hidden {hidden} > {self.most}"
        if hidden % self.multiple:
            return f"hidden {hidden} is not a multiple of {self.multiple}"
        return None


@dataclass(frozen=True)
class Layout:
    """The memory layout a kernel reads. Outputs are always contiguous."""

    rows: Literal["any", "strided_2d", "contiguous"]
    """any: every leading stride; strided_2d: one row stride, no overlap; contiguous: no gaps."""
    rank: int | None = None
    """Exact number of dimensions, or None for any."""
    leading: int | None = None
    """With `any`: most leading dims, adjacent ones merged, or None for no limit."""

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", {self.rank}-D"
        leading = "" if self.leading is None else f", {self.leading} row strides"
        return f"{self.rows}{rank}{leading}"


@dataclass(frozen=True)
class Contract:
    """Everything selection, tests and the kernel table know about a kernel."""

    platforms: tuple[str, ...]
    """`cpu`, `cuda` (NVIDIA) or `rocm` (AMD; torch calls both GPUs cuda), or `any`."""
    x: tuple[torch.dtype, ...]
    weight: tuple[str, ...]
    """Of `same` (as the normalised value), `other` (any float dtype), `none`."""
    hidden: Hidden
    layout: Layout
    rounding: tuple[Rounding, ...]
    inverse: tuple[Inverse, ...]
    programs: Literal["any", "rms"]
    """any: whatever the spec says; rms: row must be mean, add_eps, inverse, each in float32."""
    accumulate: torch.dtype
    residual: bool
    residual_rounded: bool
    """True if the norm reads the sum as rounded to the sum's dtype (eager's meaning)."""
    weight_offset: bool
    weight_rows: bool
    """Weights of several rows that repeat (per-head weights)."""
    bias: bool
    outputs: tuple[str, ...]
    mutates: tuple[str, ...]
    deterministic: bool
    batch_invariant: bool
    reduction: str
    """The order in which squares are added, in one sentence."""
    least_sm: int = 0
    """Least compute capability of an NVIDIA GPU, as in `sm_80`."""

    def refusal(self, spec: NormSpec, platform: str, hidden: int | None) -> str | None:
        """The first clause that `spec` breaks, in words, or None if the kernel fits."""
        return (
            self._platform_refusal(platform)
            or self._dtype_refusal(spec)
            or self.hidden.refusal(hidden)
            or self._program_refusal(spec)
            or self._feature_refusal(spec)
        )

    def _platform_refusal(self, platform: str) -> str | None:
        if "any" in self.platforms or platform in self.platforms:
            return None
        return f"platform {platform}, needs {' or '.join(self.platforms)}"

    def arch_refusal(self, arch: str) -> str | None:
        """Why the kernel does not run on an architecture (`sm_75`; empty: not known), or None."""
        found = re.match(r"sm_(\d+)", arch)
        if found is None or int(found[1]) >= self.least_sm:
            return None
        return f"architecture {arch}, needs sm_{self.least_sm}"

    def _dtype_refusal(self, spec: NormSpec) -> str | None:
        for role, dtype in (("x", spec.x), ("residual", spec.residual), ("sum", spec.sum)):
            if dtype is not None and dtype not in self.x:
                return f"{role} is {short(dtype)}, needs {_names(self.x)}"
        kind = _weight_kind(spec)
        if kind not in self.weight:
            return f"weight is {kind}, needs {' or '.join(self.weight)}"
        return None

    def _program_refusal(self, spec: NormSpec) -> str | None:
        if spec.rounding not in self.rounding:
            needs = " or ".join(r.value for r in self.rounding)
            return f"rounding {spec.rounding.value}, needs {needs}"
        if spec.inverse not in self.inverse:
            needs = " or ".join(i.value for i in self.inverse)
            return f"inverse {spec.inverse.value}, needs {needs}"
        if self.programs == "rms" and not _is_plain_rms(spec):
            return f"row program {','.join(map(str, spec.row))}, needs mean,add_eps,rsqrt in f32"
        return None

    def _feature_refusal(self, spec: NormSpec) -> str | None:
        if spec.residual is not None and not self.residual:
            return "no residual add"
        if spec.residual is not None and not self.residual_rounded:
            return "reads the residual sum unrounded"
        if spec.weight_offset and not self.weight_offset:
            return f"no weight offset ({spec.weight_offset})"
        if spec.bias is not None and not self.bias:
            return "no bias"
        missing = [name for name in spec.outputs if name not in self.outputs]
        return f"cannot return {', '.join(missing)}" if missing else None


@dataclass(frozen=True)
class Inline:
    """A Triton kernel that a compiler can launch itself, without Python at run time."""

    kernel: Any
    """The triton.JITFunction, made for one spec and hidden; nothing is a constexpr argument."""
    num_warps: int
    rows_per_program: int
    parameters: tuple[str, ...]
    """The kernel's arguments in order. Pointers: x residual weight bias out sum row; int64: rows
    inner x_outer x_step residual_outer residual_step (see `gpu_rows.Rows`) weight_rows bias_rows;
    float32: eps. Only those that the spec needs."""


@dataclass(frozen=True)
class Kernel:
    """A contract and the function that keeps it."""

    name: str
    """`provider.kernel`, for example `cpu.row`."""
    contract: Contract
    launch: Launch
    prepare: Callable[[NormSpec, int | None], str | None] = lambda spec, hidden: None
    """Builds what a launch needs. Returns None, or why it cannot (the kernel is then refused)."""
    unavailable: Callable[[], str | None] = lambda: None
    """Why the kernel cannot run on this machine, found out without building anything."""
    prepare_all: Callable[[Iterable[NormSpec]], None] | None = None
    """Optional: prepares several specs at once, side by side; failures show in `prepare`."""
    refuses: Callable[[NormSpec], str | None] = lambda spec: None
    """What the contract's fields cannot say: why a spec does not fit, or None."""
    bound: Callable[[NormSpec], Callable[..., object]] | None = None
    """Optional: a faster callable (x, residual, weight, bias, eps) for one spec, which returns a
    tensor for one output and else a tuple."""
    over: Callable[[NormSpec], Callable[..., None]] | None = None
    """Optional: a callable (x, residual, weight, bias, eps) for a spec with outputs out and sum and
    contiguous x and residual, which writes out over x and sum over residual."""
    inline: Callable[[NormSpec, int, int | None], Inline] | None = None
    """Optional: (spec, hidden, rows if known) -> the same kernel for Inductor to launch. Rows
    choose a schedule, never bits."""
    inexact: Callable[[NormSpec, str], str | None] = lambda spec, arch: None
    """How results may differ from the spec's roundings on an architecture (`gfx942`; empty: not
    known), or None. A kernel that is inexact runs only if it is named, and the report says so."""
    version: str = "1"
    """Changes whenever results may change; part of the compile-cache key."""

    @property
    def provider(self) -> str:
        """The part of the name before the dot."""
        return self.name.partition(".")[0]

    def refusal(self, spec: NormSpec, platform: str, hidden: int | None) -> str | None:
        """Why this kernel does not take `spec`, in words, or None."""
        return self.contract.refusal(spec, platform, hidden) or self.refuses(spec)

    def entry(self, spec: NormSpec) -> Callable[..., object]:
        """(x, residual, weight, bias, eps) -> a tensor, or a tuple if the spec has more outputs."""
        if self.bound is not None:
            return self.bound(spec)
        single = len(spec.outputs) == 1

        def call(
            x: torch.Tensor,
            residual: torch.Tensor | None,
            weight: torch.Tensor | None,
            bias: torch.Tensor | None,
            eps: float,
        ) -> object:
            outputs = self.launch(spec, x, residual, weight, bias, eps)
            return outputs[0] if single else outputs

        return call

    def overwriting(self, spec: NormSpec) -> Callable[..., None]:
        """`over` for x and residual of any strides: else the results are copied over them."""
        entry, over = self.entry(spec), None if self.over is None else self.over(spec)

        def call(x: torch.Tensor, residual: torch.Tensor, *rest: object) -> None:
            if over is not None and x.is_contiguous() and residual.is_contiguous():
                over(x, residual, *rest)
                for tensor in (x, residual):  # autograd may keep them, and must know
                    if not tensor.is_inference():
                        torch.autograd.graph.increment_version(tensor)
                return
            made: Any = entry(x, residual, *rest)
            x.copy_(made[0])
            residual.copy_(made[1])

        return call


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture of an NVIDIA GPU's compute capability: `sm_90` of (9, 0)."""
    return f"sm_{capability[0]}{capability[1]}"


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return " or ".join(map(short, dtypes))


def _weight_kind(spec: NormSpec) -> str:
    if spec.weight is None:
        return "none"
    return "same" if spec.weight == spec.normed else "other"


def _is_plain_rms(spec: NormSpec) -> bool:
    return [str(step) for step in spec.row] in (
        ["mean:f32", "add_eps:f32", "rsqrt:f32"],
        ["mean:f32", "rsqrt:f32"],
    )
