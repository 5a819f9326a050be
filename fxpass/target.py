"""What the command line works on: a TARGET, given as text, and the graphs it compiles to.

package.module:callable      returns (model, args) or (model, args, kwargs)
path/to/file.py:callable     the same, from a file
hf:llama, hf:config.json     a Hugging Face model, random weights; `@full` for its full size
program.pt2                  saved by torch.export.save
folder/                      graphs that torch.compile dumped (TORCH_COMPILE_DEBUG, TORCH_TRACE)
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from fxpass import capture, facts, sampling, target_dump, target_hf, torch_fakes, torch_private
from fxpass.target_errors import NoGraphError, TargetError, said, said_of_file

FORMS = "module:callable, file.py:callable, hf:TYPE, program.pt2 or a folder of dumped graphs"
NEEDED = "needs (model, args) or (model, args, kwargs), args being a tuple"


@dataclass(frozen=True)
class Target:
    """A model with the arguments of one call; or graphs, where nothing but graphs is known."""

    name: str
    model: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    fake: bool = False
    """Whether the tensors have no memory, so that nothing can be run."""
    dumped: tuple[fx.GraphModule, ...] = ()

    def graphs(self, train: bool = False) -> list[fx.GraphModule]:
        """The ATen graphs Inductor would get. Raises TargetError if the model cannot be traced.

        `train`: those of a training step's forward, which also return what the backward needs.
        """
        if self.model is None:
            if train:
                raise TargetError(
                    f"TARGET {self.name}: holds graphs as they are; --train needs a model"
                )
            return [g for whole in self.dumped for g in torch_private.graph_and_bodies(whole)]
        if train and not self._requires_grad():
            raise TargetError(
                f"TARGET {self.name}: no parameter or input requires a gradient,"
                " so there is nothing to train"
            )
        if capture.on_meta(torch_private.leaves((self.args, self.kwargs))):
            raise TargetError(f"TARGET {self.name}: {capture.ON_META}; use --fake instead")
        tensors = torch_fakes.fake_tensors() if self.fake else contextlib.nullcontext()
        with tensors, torch.set_grad_enabled(train):
            try:
                found = capture.graphs(self.model, self.args, self.kwargs)
            except Exception as error:
                raise TargetError(f"TARGET {self.name}: {said(error, 'the model')}") from error
        if not found:
            raise NoGraphError(
                f"TARGET {self.name}: torch.compile makes no graph of this model;"
                " is compiling disabled in it, does it hold a recurrent layer (compiled only with"
                " torch._dynamo.config.allow_rnn), or does it compute nothing?"
            )
        return found

    def _requires_grad(self) -> bool:
        values = torch_private.leaves((self.args, self.kwargs))
        if isinstance(self.model, torch.nn.Module):
            values += self.model.parameters()
        return any(isinstance(v, torch.Tensor) and v.requires_grad for v in values)


def load(text: str, fake: bool | None = None) -> Target:
    """The target a text names. Raises TargetError, in one line, if there is none.

    `fake` builds it without memory: no weights, and no GPU where the model asks for one. None:
    only where the weights would be random anyway.
    """
    if text.startswith("hf:"):
        with _building(fake is not False):
            model, kwargs = target_hf.load(text)
        return Target(text, model, kwargs=kwargs, fake=fake is not False)
    if text.endswith(".pt2"):
        return _exported(text)
    if Path(text).is_dir():
        return Target(text, dumped=tuple(target_dump.load(Path(text))))
    place, colon, name = text.rpartition(":")
    if not colon or not place or not name:
        raise TargetError(f"TARGET {text}: no such folder, and no callable named; use {FORMS}")
    return _called(text, function(text), bool(fake))


@contextlib.contextmanager
def _building(fake: bool) -> Iterator[None]:
    """Where a model is made: for real, or of fake tensors."""
    if not fake:
        yield
        return
    with torch_fakes.fake_tensors(), contextlib.ExitStack() as stack:
        if not torch.cuda.is_available():
            stack.enter_context(_NoGpu())
        yield


class _NoGpu(TorchFunctionMode):
    """Puts on the CPU what asks for CUDA: a torch without it cannot even pretend to have it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        here = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **here)


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, (str, torch.device)) and str(value).partition(":")[0] == "cuda"
    return torch.device("cpu") if is_cuda else value


def function(text: str) -> Callable[..., Any]:
    """A function named as module:function or file.py:function."""
    place, _, name = text.rpartition(":")
    if not place or not name:
        raise TargetError(f"{text}: names no function; use module:function or file.py:function")
    return _attribute(text, _module(text, place), name)


def _module(text: str, place: str) -> ModuleType:
    """The module, from a file or by its dotted name."""
    try:
        return _from_file(text, Path(place)) if place.endswith(".py") else _by_name(place)
    except TargetError:
        raise
    except ModuleNotFoundError as error:
        hint = "is it installed in this Python? For a file, write path/to/file.py:callable"
        raise TargetError(f"{text}: no module {error.name!r}; {hint}") from error
    except (Exception, SystemExit) as error:
        raise TargetError(f"{text}: importing {place}: {said(error, place)}") from error


def _by_name(place: str) -> ModuleType:
    with _first_on_path(Path.cwd()):
        return importlib.import_module(place)


def _from_file(text: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"{text}: no file {path}{_near_files(path)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _first_on_path(path.resolve().parent):  # its neighbours are importable, as when run
        sys.modules[path.stem], before = module, sys.modules.get(path.stem)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(path.stem)
            if before is not None:
                sys.modules[path.stem] = before
            raise
    return module


@contextlib.contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def _near_files(path: Path) -> str:
    folder = path.parent
    names = [p.name for p in folder.glob("*.py")] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _attribute(text: str, module: ModuleType, name: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            own = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            near = difflib.get_close_matches(part, own, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"found {', '.join(own[:8]) or 'none'}"
            raise TargetError(f"{text}: {module.__name__} has no {part!r}; {hint}")
        found = getattr(found, part)
    if isinstance(found, torch.nn.Module) or not callable(found):
        raise TargetError(f"{text}: {name!r} is a {type(found).__name__}, needs a function")
    made: Callable[..., Any] = found
    return made


def _called(text: str, make: Callable[..., Any], fake: bool) -> Target:
    try:
        with _building(fake):
            made = make()
    except (Exception, SystemExit) as error:
        raise TargetError(f"TARGET {text}: {said(error, 'building the model')}") from error
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        size = f" of {len(made)}" if isinstance(made, (tuple, list)) else ""
        raise TargetError(f"TARGET {text}: returned a {type(made).__name__}{size}; {NEEDED}")
    model, args, kwargs = (*made, {})[:3]
    if not callable(model):
        raise TargetError(f"TARGET {text}: the model is a {type(model).__name__}; {NEEDED}")
    if isinstance(args, dict) and not kwargs:
        args, kwargs = (), args
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        wrong = args if not isinstance(args, (tuple, list)) else kwargs
        raise TargetError(f"TARGET {text}: found {type(wrong).__name__} for args; {NEEDED}")
    return Target(text, model, tuple(args), kwargs, fake)


def _exported(text: str) -> Target:
    """A saved torch.export program with the example inputs it carries."""
    if not Path(text).is_file():
        raise TargetError(f"TARGET {text}: no such file")
    try:
        program = torch.export.load(text)
    except Exception as error:
        raise TargetError(f"TARGET {text}: {said_of_file(error)}") from error
    try:
        args, kwargs = program.example_inputs or _made_up(program)
        return Target(text, program.module(), tuple(args), dict(kwargs))
    except Exception as error:
        raise TargetError(f"TARGET {text}: {said(error, 'its program')}") from error


def _made_up(program: torch.export.ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the shapes that an exported program was saved with."""
    generator = torch.Generator().manual_seed(0)
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    specs = program.graph_signature.input_specs
    values = [
        _made(facts.value(node) if hasattr(spec.arg, "name") else None, spec.arg, generator)
        for node, spec in zip(placeholders, specs, strict=True)
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT
    ]
    args, kwargs = torch_private.unflattened(values, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def _made(fake: Any, kind: Any, generator: torch.Generator) -> Any:
    """A tensor like a fake one: random numbers, or zeros, which are legal as indices."""
    if isinstance(fake, torch.Tensor):
        shape = [sampling.hint(size) for size in fake.shape]
        if not fake.dtype.is_floating_point:
            return torch.zeros(shape, dtype=fake.dtype, device=fake.device)
        return torch.randn(shape, generator=generator).to(fake.device, fake.dtype)
    if isinstance(fake, (int, torch.SymInt)):
        return sampling.hint(fake)
    return getattr(kind, "value", fake)
