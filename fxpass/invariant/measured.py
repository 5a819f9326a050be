"""Which operators' rows were seen to follow the number of rows: measurements, by device and torch.

A row of the table covers the inputs it names: `bf16[*,4096] bf16[4096,1024]`, where `*` is what
follows the rows, or just `bf16` for any shape with that first dtype. `fxpass audit --measure` adds
rows from the user's machine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch

from fxpass.errors import FxpassError


@dataclass(frozen=True)
class Measured:
    """One operator on one kind of inputs."""

    device: str
    torch: str
    operator: str
    inputs: str
    varies: bool
    note: str

    def __str__(self) -> str:
        said = "varies" if self.varies else "did not vary"
        return f"{said}: {self.note}" if self.note else said


class Table:
    """Measurements to look things up in; those added last come first."""

    def __init__(self, rows: Iterable[Measured] = ()) -> None:
        self.added: list[Measured] = list(rows)

    def add(
        self, operator: str, inputs: str, device: str, at: Sequence[int], note: str
    ) -> Measured:
        """A measurement of this machine: `at` are the numbers of rows at which it varied."""
        where = f"at {', '.join(map(str, at))} rows {note}" if at else f"at none {note}"
        row = Measured(device, release(), operator, inputs, bool(at), where)
        self.added.append(row)
        return row

    def exact(self, operator: str, inputs: str, device: str) -> Measured | None:
        """A measurement added for just these inputs."""
        for row in self.added:
            if (row.operator, row.inputs, row.device) == (operator, inputs, device):
                return row if row.torch == release() else None
        return None

    def find(self, operator: str, kinds: Sequence[str], device: torch.device) -> Measured | None:
        """What is known of an operator on inputs such as `bf16[8,64]`: this torch's row first."""
        here = machine(device)
        rows = [
            row
            for row in (*reversed(self.added), *COMMITTED)
            if row.device == here and row.operator == operator and _fits(row.inputs, kinds)
        ]
        rows.sort(key=lambda row: (row.torch != release(), "[" not in row.inputs))
        return rows[0] if rows else None

    def to_json(self) -> str:
        """The added rows."""
        return json.dumps([asdict(row) for row in self.added], indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, place: str) -> Table:
        """The rows of a file. Raises FxpassError if it holds something else."""
        try:
            return cls(Measured(**row) for row in json.loads(text))
        except (ValueError, TypeError) as error:
            raise FxpassError(f"{place}: no table of fxpass audit --table: {error}") from error


def machine(device: torch.device) -> str:
    """The device as the table names it."""
    if device.type == "cuda" and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def release() -> str:
    """`2.13` of this torch's version."""
    return ".".join(torch.__version__.split(".")[:2])


def _fits(pattern: str, kinds: Sequence[str]) -> bool:
    if "[" not in pattern:
        return bool(kinds) and kinds[0].startswith(f"{pattern}[")
    wanted = pattern.split(" ")
    return len(wanted) == len(kinds) and all(map(_same, wanted, kinds))


def _same(pattern: str, kind: str) -> bool:
    """Whether `bf16[8,64]` is one of `bf16[*,64]`."""
    ours, theirs = (text.rstrip("]").replace("[", ",").split(",") for text in (pattern, kind))
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(a in ("*", b) for a, b in pairs)


def _rows(device: str, release: str, *rows: tuple[str, str, bool, str]) -> list[Measured]:
    return [
        Measured(device, release, f"aten.{name}", inputs, varies, note)
        for names, inputs, varies, note in rows
        for name in names.split()
    ]


_H200 = "NVIDIA H200"
_AVX512 = "cpu AVX512"
_SDPA = "_scaled_dot_product"

COMMITTED: tuple[Measured, ...] = (
    *_rows(
        _H200,
        "2.11",
        ("mm", "bf16[*,4096] bf16[4096,4096]", True, ""),
        ("mm", "bf16[*,4096] bf16[4096,1024]", True, ""),
        ("mm", "bf16[*,14336] bf16[14336,4096]", True, ""),
        ("mm", "bf16[*,1024] bf16[1024,151936]", False, ""),
        ("mm addmm", "bf16", True, "for most sizes tried"),
        ("mm addmm", "f32", True, "for all sizes tried"),
        ("bmm", "bf16", False, "64x64 matrices"),
        ("bmm", "f32", False, "64x64 matrices"),
        ("_softmax _log_softmax native_layer_norm _fused_rms_norm", "bf16", False, "to 16,384"),
        ("_softmax _log_softmax native_layer_norm _fused_rms_norm", "f32", False, "to 16,384"),
        ("mean sum linalg_vector_norm", "bf16", False, "over the last dim"),
        ("mean sum", "f32", True, "over the last dim, at 1024 and up"),
        ("linalg_vector_norm", "f32", True, ""),
        ("logsumexp", "bf16", False, ""),
        ("logsumexp", "f32", True, "at 152,064"),
        (f"{_SDPA}_flash_attention", "bf16", True, "one query, and 512 queries"),
        (f"{_SDPA}_cudnn_attention", "bf16", True, "one query"),
        (f"{_SDPA}_attention_math", "bf16", True, "one query"),
        (f"{_SDPA}_efficient_attention", "bf16", False, ""),
    ),
    *_rows(
        _AVX512,
        "2.13",
        ("mm addmm", "f32", True, "at 1 to 7 rows, for all sizes tried"),
        ("mm", "bf16[*,4096] bf16[4096,1024]", True, "at 1 row"),
        ("mm addmm", "bf16", False, "for K up to 1024"),
        ("mm addmm", "f16", False, "for K up to 4096"),
        ("bmm", "f32", True, "rows inside the matrices, at 1 to 3; matrices did not matter"),
        ("bmm", "bf16", False, ""),
        ("bmm", "f16", False, ""),
        ("sum", "f32[300,*]", True, "at every number of rows: summed over the dim before them"),
        (
            "sum mean var_mean linalg_vector_norm logsumexp prod cumsum",
            "f32",
            False,
            "over the last or a middle dim",
        ),
        ("sum mean var_mean linalg_vector_norm logsumexp prod cumsum", "bf16", False, ""),
        ("sum mean var_mean linalg_vector_norm logsumexp prod cumsum", "f16", False, ""),
        ("_softmax _log_softmax native_layer_norm native_group_norm", "f32", False, "to 4096"),
        ("_softmax _log_softmax native_layer_norm native_group_norm", "bf16", False, "to 4096"),
        ("_softmax _log_softmax native_layer_norm native_group_norm", "f16", False, "to 4096"),
        (f"{_SDPA}_flash_attention_for_cpu", "f32", True, "one query, at every number of rows"),
        (f"{_SDPA}_flash_attention_for_cpu", "bf16", False, "one query, and 64 queries"),
        (f"{_SDPA}_flash_attention_for_cpu", "f16", True, "one query, at 64 rows"),
        (f"{_SDPA}_attention_math", "f32", False, ""),
        (f"{_SDPA}_attention_math", "bf16", False, ""),
        (f"{_SDPA}_attention_math", "f16", False, ""),
        ("convolution", "f32", True, "3x3, at 1 row"),
        ("convolution", "bf16", False, "3x3"),
        ("convolution", "f16", False, "3x3"),
        ("silu sigmoid softplus", "f32", True, "where an element falls out of the vectors"),
        ("silu sigmoid softplus gelu", "bf16", False, ""),
        ("silu sigmoid softplus gelu", "f16", False, ""),
        ("gelu rsqrt", "f32", False, ""),
        ("rsqrt", "bf16", True, "where an element falls out of the vectors"),
        ("rsqrt", "f16", True, "where an element falls out of the vectors"),
    ),
)
"""f(x)[:n] against f(x[:n]). H200: n of 1, 2, 3, 7, 16, 33, 64, 128, 257, 512, 1024 in 2048 rows;
CPU: n of 1, 2, 3, 7, 8, 16, 33, 64, 128, 255, 256 in 257 rows, on two cores."""
