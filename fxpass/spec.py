"""What a norm subgraph means: a straight-line program in which every rounding is written down.

A norm is three short programs over one row of x:

    row      a scalar per row, starting from the sum of squares
             Llama: mean:f32 add_eps:f32 rsqrt:f32
    element  a value per element, starting from x
             Llama: mul_row:f32 cast:bf16 mul_weight:bf16
    weight   the weight as the element program uses it: (weight + offset), rounded to a dtype

Each step computes in at least float32 and then rounds once to the dtype it carries, which is what
eager PyTorch does for each operator. Two subgraphs with the same spec therefore differ in nothing
but the order in which the squares are added. This module knows nothing of torch.fx.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from fxpass.dtypes import BY_SHORT_NAME, short
from fxpass.errors import FxpassError


class Rounding(enum.Enum):
    """Where the result is rounded to the output dtype, relative to the weight multiply."""

    CAST_THEN_SCALE = "cast_then_scale"
    """Llama: round the normalised value, then multiply by the weight (and round again)."""
    SCALE_THEN_CAST = "scale_then_cast"
    """`nn.RMSNorm`, Gemma: multiply in float32, round once."""
    NO_CAST = "no_cast"
    """Nothing is rounded below float32."""
    EACH_STEP = "each_step"
    """Computed in x's own 16-bit dtype: every operator rounds."""


class Inverse(enum.Enum):
    """How x meets the root. The spellings differ in the last float32 bit, so they are meaning."""

    RSQRT = "rsqrt"
    RECIPROCAL_SQRT = "1/sqrt"
    DIVIDE_BY_SQRT = "x/sqrt"


ROW_OPS = frozenset(
    # mean: sum / N, one rounding.        sum: the plain sum.      div_n, mul_n: by N and by 1/N.
    # mul_const: by `value`.              clamp_eps: max(., eps).
    "mean sum div_n mul_n mul_const add_eps clamp_eps sqrt square rsqrt reciprocal cast".split()
)
ELEMENT_OPS = frozenset("mul_row div_row mul_weight add_bias cast".split())


@dataclass(frozen=True)
class Step:
    """One operation and the dtype its result is rounded to."""

    op: str
    dtype: torch.dtype
    value: float | None = None
    """The constant of `mul_const`, rounded to float32."""

    def __str__(self) -> str:
        constant = "" if self.value is None else f"({self.value!r})"
        return f"{self.op}{constant}:{short(self.dtype)}"

    @classmethod
    def parse(cls, text: str) -> Step:
        """Inverse of `str`."""
        head, _, dtype = text.rpartition(":")
        op, _, constant = head.partition("(")
        return cls(op, BY_SHORT_NAME[dtype], float(constant[:-1]) if constant else None)


@dataclass(frozen=True)
class NormSpec:
    """The meaning of one norm site, without its tensors. `str` and `parse` are inverse."""

    x: torch.dtype
    """dtype of x (of the first addend, when there is a residual)."""
    row: tuple[Step, ...]
    element: tuple[Step, ...]
    square: torch.dtype = torch.float32
    """dtype each square is rounded to before it is added up (always added up in float32)."""
    residual: torch.dtype | None = None
    """dtype of the second addend of a residual add before the norm."""
    sum: torch.dtype | None = None
    """dtype the residual sum is rounded to; the norm reads the rounded sum."""
    weight: torch.dtype | None = None
    weight_offset: float = 0.0
    """The 1 in Gemma's (1 + weight)."""
    weight_offset_dtype: torch.dtype | None = None
    """dtype that (weight + offset) is rounded to; float32 for Gemma, 16 bit is another meaning."""
    bias: torch.dtype | None = None
    outputs: tuple[str, ...] = ("out",)
    """What the kernel returns, in this order: out, sum, row (the last value per row, rstd)."""

    def __post_init__(self) -> None:
        for step in self.row:
            if step.op not in ROW_OPS:
                raise FxpassError(
                    f"spec: row step {step.op!r} is unknown; known: {sorted(ROW_OPS)}"
                )
        for step in self.element:
            if step.op not in ELEMENT_OPS:
                raise FxpassError(
                    f"spec: element step {step.op!r} is unknown; known: {sorted(ELEMENT_OPS)}"
                )

    @property
    def normed(self) -> torch.dtype:
        """Dtype of the value that is normalised: the residual sum if there is one, else x."""
        return self.sum if self.sum is not None else self.x

    @property
    def out(self) -> torch.dtype:
        """Dtype of the result."""
        return self.element[-1].dtype

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype of the row value (rstd)."""
        return self.row[-1].dtype

    @property
    def has_eps(self) -> bool:
        """True if a row step reads eps."""
        return any(step.op in ("add_eps", "clamp_eps") for step in self.row)

    @property
    def mean(self) -> bool:
        """True for RMS norms, False for L2 norms (sum instead of mean)."""
        return any(step.op in ("mean", "div_n", "mul_n") for step in self.row)

    @property
    def inverse(self) -> Inverse:
        """How x meets the root."""
        if any(step.op == "div_row" for step in self.element):
            return Inverse.DIVIDE_BY_SQRT
        if any(step.op == "rsqrt" for step in self.row):
            return Inverse.RSQRT
        return Inverse.RECIPROCAL_SQRT

    @property
    def rounding(self) -> Rounding:
        """The rounding order in the field's words; the steps are the exact form."""
        narrow = [is_narrow(step.dtype) for step in self.element]
        if not any(narrow):
            return Rounding.NO_CAST
        if is_narrow(self.square) or is_narrow(self.row_dtype):
            return Rounding.EACH_STEP
        scales = [i for i, step in enumerate(self.element) if step.op == "mul_weight"]
        if scales and any(narrow[: scales[0]]):
            return Rounding.CAST_THEN_SCALE
        return Rounding.SCALE_THEN_CAST

    def __str__(self) -> str:
        parts = [f"x={short(self.x)}"]
        if self.residual is not None and self.sum is not None:
            parts += [f"residual={short(self.residual)}", f"sum={short(self.sum)}"]
        if self.square != torch.float32:
            parts.append(f"square={short(self.square)}")
        parts.append("row=" + ",".join(map(str, self.row)))
        parts.append("element=" + ",".join(map(str, self.element)))
        if self.weight is not None:
            parts.append(f"weight={short(self.weight)}")
        if self.weight_offset_dtype is not None:
            parts.append(f"offset={self.weight_offset!r}:{short(self.weight_offset_dtype)}")
        if self.bias is not None:
            parts.append(f"bias={short(self.bias)}")
        if self.outputs != ("out",):
            parts.append("outputs=" + ",".join(self.outputs))
        return " ".join(parts)

    @classmethod
    def parse(cls, text: str) -> NormSpec:
        """Inverse of `str`. Raises FxpassError if the text is not a spec."""
        try:
            fields = dict(part.split("=", 1) for part in text.split(" "))
            offset, _, offset_dtype = fields.get("offset", "0.0:").partition(":")
            return cls(
                x=BY_SHORT_NAME[fields["x"]],
                row=tuple(map(Step.parse, fields["row"].split(","))),
                element=tuple(map(Step.parse, fields["element"].split(","))),
                square=BY_SHORT_NAME[fields.get("square", "f32")],
                residual=_dtype(fields.get("residual")),
                sum=_dtype(fields.get("sum")),
                weight=_dtype(fields.get("weight")),
                weight_offset=float(offset),
                weight_offset_dtype=_dtype(offset_dtype or None),
                bias=_dtype(fields.get("bias")),
                outputs=tuple(fields.get("outputs", "out").split(",")),
            )
        except (KeyError, ValueError) as error:
            raise FxpassError(f"spec: cannot read {text!r}: {error}") from error


def is_narrow(dtype: torch.dtype) -> bool:
    """True for the 16-bit floating dtypes."""
    return dtype in (torch.bfloat16, torch.float16)


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else BY_SHORT_NAME[name]
