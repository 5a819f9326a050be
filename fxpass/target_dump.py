"""Graphs that torch.compile dumped, read back from their text.

`TORCH_COMPILE_DEBUG=1` writes a folder per graph: `fx_graph_readable.py` has operators, shapes and
the user's lines, `fx_graph_runnable.py` beside it the strides and devices of the inputs.
`TORCH_TRACE=folder` writes one log in which `before_post_grad_graph` has all of that. The text is
parsed, never executed; values are then propagated through the operators as fake tensors.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from fxpass.target_errors import TargetError
from fxpass.target_text import Input, build

READABLE, RUNNABLE = "fx_graph_readable.py", "fx_graph_runnable.py"
_TRACED = re.compile(r'"artifact": \{"name": "before_post_grad_graph"')
_NAME = re.compile(r"#\s*(\w+)\s*$")


@dataclass(frozen=True)
class Dump:
    """One graph as text, and what another file says of its inputs."""

    place: str
    text: str
    inputs: dict[str, Input]


def load(folder: Path) -> list[fx.GraphModule]:
    """Every graph under a folder. Raises TargetError if there is none, or one cannot be read."""
    dumps = list(_dumps(folder))
    if not dumps:
        raise TargetError(
            f"TARGET {folder}: found no {READABLE} and no trace log with graphs; needs a folder"
            " written with TORCH_COMPILE_DEBUG=1 or TORCH_TRACE=<folder>"
        )
    return [_read(dump) for dump in dumps]


def _dumps(folder: Path) -> Iterator[Dump]:
    for path in sorted(folder.rglob(READABLE)):
        yield Dump(str(path), path.read_text(), _inputs(path.with_name(RUNNABLE)))
    for path in sorted(folder.rglob("*.log")):
        yield from _traced(path)


def _read(dump: Dump) -> fx.GraphModule:
    try:
        return build(dump.text, dump.inputs)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TargetError(f"TARGET {dump.place}: cannot be read back: {reason}") from error


def _traced(path: Path) -> Iterator[Dump]:
    """The graphs in a structured trace log: a payload is the indented lines below its header."""
    payload: list[str] | None = None
    with path.open(errors="replace") as lines:
        for line in lines:
            if line.startswith("\t"):
                if payload is not None:
                    payload.append(line[1:])
                continue
            if payload:
                yield Dump(str(path), "".join(payload), {})
            payload = [] if _TRACED.search(line) else None
    if payload:
        yield Dump(str(path), "".join(payload), {})


def _inputs(path: Path) -> dict[str, Input]:
    """Strides and devices by input name, from `load_args` of a runnable file, if there is one."""
    if not path.is_file():
        return {}
    text = path.read_text()
    start = text.find("def load_args(reader):")
    lines = text[start:].splitlines()[1:] if start >= 0 else []
    devices: dict[str, str] = {}
    found: dict[str, Input] = {}
    for line in lines:
        if not line.startswith("    "):
            break
        call, name = _reader_call(line), _NAME.search(line)
        if call is None:
            continue
        kind = ast.unparse(call.func).removeprefix("reader.")
        if kind == "storage":
            devices[line.split()[0]] = _device(call)
        elif kind == "tensor" and name:
            device = devices.get(ast.unparse(call.args[0]), "cpu")
            found[name[1]] = Input(_strides(call), device)
        elif kind == "symint" and name:
            found[name[1]] = Input(hint=_number(call.args[0]))
    return found


def _reader_call(line: str) -> ast.Call | None:
    try:
        (statement,) = ast.parse(line.strip()).body
    except (SyntaxError, ValueError):
        return None
    call = getattr(statement, "value", None)
    return call if isinstance(call, ast.Call) else None


def _device(call: ast.Call) -> str:
    """`cuda:0` of `device=device(type='cuda', index=0)`."""
    for word in call.keywords:
        if word.arg == "device" and isinstance(word.value, ast.Call):
            return ":".join(str(ast.literal_eval(part.value)) for part in word.value.keywords)
    return "cpu"


def _strides(call: ast.Call) -> str | None:
    """`512, 64, 1` of the third argument, which a contiguous tensor does not have."""
    if len(call.args) < 3:
        return None
    return ast.unparse(call.args[2]).strip("()").rstrip(",")


def _number(value: ast.expr) -> int | None:
    return value.value if isinstance(value, ast.Constant) and type(value.value) is int else None
