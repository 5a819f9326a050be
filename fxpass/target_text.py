"""The printed form of an FX graph, parsed into a graph again; nothing of the text is executed.

# File: model.py:12 in forward, code: x = self.norm(x)
mul: "f32[2, 8, 64][512, 64, 1]cpu" = torch.ops.aten.mul.Tensor(a, b);  a = b = None
"""

from __future__ import annotations

import ast
import functools
import operator
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpass import torch_fakes
from fxpass.dtypes import SHORT_NAMES

_FILE = re.compile(r"\s*# File: (.*?):(\d+) in (.+?), code: (.*)")
_TENSOR = re.compile(r"^(\w+)\[(.*?)\](?:\[(.*?)\])?([\w:]*)$")
_SYMBOL = re.compile(r"\b([suz]+\d+)\b")
_FIRST_HINT = 16
"""Sizes that no file tells: 16, 19, 22, ... so that two of them are never taken for equal."""

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Div: operator.truediv, ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}  # fmt: skip
_DTYPES = {
    **{name: dtype for dtype, name in SHORT_NAMES.items()},
    "f64": torch.float64, "i64": torch.int64, "i32": torch.int32, "i16": torch.int16,
    "i8": torch.int8, "u8": torch.uint8, "b8": torch.bool, "c64": torch.complex64,
    "f8e4m3fn": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Input:
    """What another file knows of an input."""

    strides: str | None = None
    device: str = ""
    hint: int | None = None
    """The value of an input that is a size."""


def build(text: str, inputs: Mapping[str, Input]) -> fx.GraphModule:
    """The graph, with fake values. Raises ValueError, in words, for what it cannot read."""
    start = re.search(r"^ *class ", text, re.MULTILINE)
    if not start:
        raise ValueError("no forward function in it")
    body = textwrap.dedent(text[start.start() :].replace("class <lambda>(", "class whole("))
    found = [part for part in ast.parse(body).body if isinstance(part, ast.ClassDef)]
    mode, symbols = torch_fakes.fakes_with_symbols(_hints(found[0], inputs))
    return _Reader(found[0], inputs, _Around(_stacks(body.splitlines()), mode, symbols)).read()


@dataclass(frozen=True)
class _Around:
    """What a graph and its bodies share."""

    stacks: dict[int, str]
    mode: Any
    symbols: dict[str, Any]


class _Reader:
    """One class being turned into a graph module; the classes in it are its bodies."""

    def __init__(self, written: ast.ClassDef, inputs: Mapping[str, Input], around: _Around) -> None:
        self._function = _forward(written)
        self._inputs = inputs
        self._around = around
        self._stacks, self._mode, self._symbols = around.stacks, around.mode, around.symbols
        self._written = {c.name: c for c in written.body if isinstance(c, ast.ClassDef)}
        self._bodies: dict[str, fx.GraphModule] = {}
        self._graph = fx.Graph()
        self._values: dict[str, Any] = {"inf": float("inf"), "nan": float("nan"), "None": None}
        self._constants: dict[str, torch.Tensor] = {}
        self._name: str | None = None
        """What the statement being read calls its value; its node gets the same name."""

    def read(self) -> fx.GraphModule:
        """The graph module, every node with its fake value and its source."""
        fakes = [self._placeholder(arg) for arg in self._function.args.args if arg.arg != "self"]
        for statement in self._function.body:
            self._statement(statement)
        root = torch.nn.Module()
        for name, value in self._constants.items():
            root.register_buffer(name, value)
        for name, body in self._bodies.items():
            root.add_module(name, body)
        made = fx.GraphModule(root, self._graph)
        torch_fakes.propagate_in(made, self._mode, fakes)
        return made

    def _placeholder(self, arg: ast.arg) -> Any:
        node = self._graph.placeholder(arg.arg)
        self._values[arg.arg] = node
        note = _note(arg.annotation)
        if note.startswith("Sym("):
            return self._size(_bare(note))
        return self._fake(note, self._inputs.get(arg.arg, Input()))

    def _fake(self, note: str, known: Input) -> torch.Tensor:
        """A fake tensor after `bf16[2, 8, 64][512, 64, 1]cpu`, strides and device optional."""
        found = _TENSOR.match(note)
        if found is None or found[1] not in _DTYPES:
            raise ValueError(f"an input is {note or 'without a type'}, needs a tensor or a size")
        shape = [self._size(size) for size in _split(found[2])]
        strides = found[3] if found[3] is not None else known.strides
        device = found[4] or known.device or "cpu"
        with self._mode:
            if strides is None:
                return torch.empty(shape, dtype=_DTYPES[found[1]], device=device)
            steps = [self._size(step) for step in _split(strides)]
            return torch.empty_strided(shape, steps, dtype=_DTYPES[found[1]], device=device)

    def _size(self, text: str) -> Any:
        return self._evaluate(ast.parse(text.strip(), mode="eval").body, self._symbols)

    def _statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Return):
            assert statement.value is not None
            self._graph.output(self._evaluate(statement.value))
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            if statement.value is None or _is_none(statement.value):
                return  # `a = b = None` after the last use
            target = (
                statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            )
            self._name = ast.unparse(target)
            note = _note(getattr(statement, "annotation", None))
            value = self._assigned(statement.value, note)
            if isinstance(value, fx.Node):
                value.meta["stack_trace"] = self._stacks.get(statement.lineno, "")
            self._values[self._name] = value
        elif not isinstance(statement, (ast.Expr, ast.Delete)):
            raise ValueError(f"a graph has no {type(statement).__name__.lower()} statement")

    def _assigned(self, value: ast.expr, note: str) -> Any:
        if isinstance(value, ast.Attribute) and ast.unparse(value).startswith("self."):
            name = value.attr
            if name in self._written:
                if name not in self._bodies:
                    self._bodies[name] = _Reader(self._written[name], {}, self._around).read()
            elif _TENSOR.match(note):
                self._constants[name] = self._fake(note, Input())
            else:
                raise ValueError(f"reads self.{name}, a graph that the text does not have")
            return self._graph.create_node("get_attr", name, name=self._name)
        return self._evaluate(value)

    def _evaluate(self, found: ast.expr, names: Mapping[str, Any] | None = None) -> Any:
        """An expression: literals, names, operators on sizes, and calls, which become nodes."""
        names = self._values if names is None else names
        if isinstance(found, ast.Constant):
            return found.value
        if isinstance(found, ast.Name):
            if found.id not in names:
                raise ValueError(f"reads {found.id}, which nothing made")
            return names[found.id]
        if isinstance(found, (ast.List, ast.Tuple)):
            values = [self._evaluate(item, names) for item in found.elts]
            return values if isinstance(found, ast.List) else tuple(values)
        if isinstance(found, ast.UnaryOp) and isinstance(found.op, ast.USub):
            return self._apply(operator.neg, self._evaluate(found.operand, names))
        if isinstance(found, ast.BinOp) and type(found.op) in _BINARY:
            sides = (self._evaluate(side, names) for side in (found.left, found.right))
            return self._apply(_BINARY[type(found.op)], *sides)
        if isinstance(found, ast.Subscript):
            key = self._evaluate(found.slice, names)
            return self._apply(operator.getitem, self._evaluate(found.value, names), key)
        if isinstance(found, ast.Attribute):
            return _of_torch(ast.unparse(found))
        if isinstance(found, ast.Call):
            return self._call(found, names)
        raise ValueError(f"cannot read {ast.unparse(found)[:60]!r}")

    def _call(self, found: ast.Call, names: Mapping[str, Any]) -> Any:
        args = tuple(self._evaluate(arg, names) for arg in found.args)
        kwargs = {str(word.arg): self._evaluate(word.value, names) for word in found.keywords}
        name = ast.unparse(found.func)
        if name == "device":
            return torch.device(*args, **kwargs)
        if name == "slice":
            return slice(*args)
        return self._node(_of_torch(name), args, kwargs)

    def _apply(self, function: Callable[..., Any], *args: Any) -> Any:
        """At once on numbers and sizes; as a node where a value of the graph takes part."""
        if any(isinstance(arg, fx.Node) for arg in args):
            return self._node(function, args, {})
        return function(*args)

    def _node(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        return self._graph.create_node("call_function", target, args, kwargs, name=self._name)


def _forward(written: ast.ClassDef) -> ast.FunctionDef:
    for part in written.body:
        if isinstance(part, ast.FunctionDef) and part.name == "forward":
            return part
    raise ValueError("no forward function in it")


def _hints(whole: ast.ClassDef, inputs: Mapping[str, Input]) -> dict[str, int]:
    """A value for each symbol that the inputs of a graph or of its bodies mention."""
    args = [
        arg
        for node in ast.walk(whole)
        if isinstance(node, ast.FunctionDef)
        for arg in node.args.args
    ]
    names = dict.fromkeys(n for arg in args for n in _SYMBOL.findall(_note(arg.annotation)))
    hints = {name: _FIRST_HINT + 3 * index for index, name in enumerate(names)}
    for arg in _forward(whole).args.args:
        note, known = _note(arg.annotation), inputs.get(arg.arg)
        if known and known.hint is not None and note == f"Sym({_bare(note)})":
            hints[_bare(note)] = known.hint
    return hints


def _of_torch(name: str) -> Any:
    """`torch.ops.aten.mul.Tensor` as an object; nothing outside torch is looked up."""
    root, *path = name.split(".")
    if root != "torch":
        raise ValueError(f"calls {name}, needs an operator of torch")
    try:
        return functools.reduce(getattr, path, torch)
    except AttributeError:
        raise ValueError(f"calls {name}, which this torch does not have") from None


def _stacks(lines: list[str]) -> dict[int, str]:
    """Line number -> the user's line, as a stack trace of one frame."""
    found: dict[int, str] = {}
    stack = ""
    for number, line in enumerate(lines, 1):
        match = _FILE.match(line)
        if match:
            stack = f'  File "{match[1]}", line {match[2]}, in {match[3]}\n    {match[4]}\n'
        elif line.lstrip().startswith("# No stacktrace"):
            stack = ""
        found[number] = stack
    return found


def _note(annotation: ast.expr | None) -> str:
    return str(annotation.value) if isinstance(annotation, ast.Constant) else ""


def _bare(note: str) -> str:
    return note.removeprefix("Sym(").removesuffix(")")


def _split(sizes: str) -> list[str]:
    return [size for size in sizes.split(",") if size.strip()]


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None
