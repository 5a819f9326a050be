"""Which aiter is installed: its norm functions, their argument order, and what is known of it.

AMD's aiter changes its wrappers between versions without a version number that says so, so they are
told apart by their parameters. Only known ones are called. The name `aiter` on PyPI is an
unrelated package: ours has `aiter.ops`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

PLAIN = ("rmsnorm2d_fwd", "rms_norm")
"""The first that exists. In some versions `rms_norm` goes to the slower path of the two."""
ADD = "rmsnorm2d_fwd_with_add"

_FLAG, _GEMMA = "use_model_sensitive_rmsnorm", "gemma_norm"
_X = ("input", "weight", "epsilon")
_SUM = ("out", "input", "residual_in", "residual_out", "weight", "epsilon")


@dataclass(frozen=True)
class Version:
    """What the parameters of the two functions tell. Arguments are passed by position."""

    plain: tuple[str, ...]
    add: tuple[str, ...]
    row_stride: bool
    """Whether the plain norm reads x with a row stride."""
    nearest: tuple[str, ...] = ()
    """Architectures on which the plain norm rounds bf16 to nearest. Elsewhere it truncates: gfx942
    has no instruction for it, and aiter's conversion drops the low bits by default."""

    @property
    def model_sensitive(self) -> bool:
        """Whether Hugging Face's order of roundings can be asked for."""
        return _FLAG in self.plain and _FLAG in self.add


NEWEST = Version((*_X, _FLAG), (*_SUM, _GEMMA, _FLAG), row_stride=True, nearest=("gfx950",))
VERSIONS = {
    "composable kernel only": Version(_X, _SUM, row_stride=False),
    "with a model-sensitive flag": Version((*_X, _FLAG), (*_SUM, _FLAG), row_stride=True),
    "gemma_norm before the flag": NEWEST,
    "gemma_norm after the flag": Version((*_X, _FLAG), (*_SUM, _FLAG, _GEMMA), row_stride=True),
}


class UnusableError(Exception):
    """One line: why aiter cannot be used here."""


@dataclass(frozen=True)
class Api:
    """The functions of the installed aiter."""

    version: Version
    plain: Callable[..., Any]
    add: Callable[..., Any]


@cache
def load() -> Api:
    """The installed aiter. Raises UnusableError."""
    try:
        package = importlib.import_module("aiter")
        importlib.import_module("aiter.ops")
    except ModuleNotFoundError as error:
        if error.name == "aiter":
            raise UnusableError("aiter is not installed") from None
        if error.name == "aiter.ops":
            raise UnusableError("the installed aiter is not AMD's (it has no aiter.ops)") from None
        raise UnusableError(_failed(error)) from None
    except Exception as error:  # its import compiles and asks the driver: anything may happen
        raise UnusableError(_failed(error)) from None
    return _api(package)


def known() -> Version:
    """The installed version; the newest one where there is none to ask (planning elsewhere)."""
    try:
        return load().version
    except UnusableError:
        return NEWEST


def problem() -> str | None:
    """Why aiter cannot be used here, in one line, or None."""
    try:
        load()
    except UnusableError as error:
        return str(error)
    return None


def _failed(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"importing aiter failed: {type(error).__name__}: {first}"


def _api(package: Any) -> Api:
    plain = next((name for name in PLAIN if hasattr(package, name)), None)
    missing = [
        name for name, there in ((PLAIN[0], plain), (ADD, hasattr(package, ADD))) if not there
    ]
    if plain is None or missing:
        raise UnusableError(f"the installed aiter is too old: it has no {' and no '.join(missing)}")
    functions = getattr(package, plain), getattr(package, ADD)
    found = _parameters(plain, functions[0]), _parameters(ADD, functions[1])
    for version in VERSIONS.values():
        if found == (version.plain, version.add):
            return Api(version, *functions)
    told = "; ".join(f"{name}({', '.join(p)})" for name, p in zip((plain, ADD), found, strict=True))
    raise UnusableError(f"unknown version of aiter: {told}")


def _parameters(name: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """Parameter names; those of the operator behind a wrapper that takes anything."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ("?",)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters.values()):
        operator = _operator(name)
        if operator is None:
            return ("?",)
        return tuple(argument.name for argument in operator.default._schema.arguments)
    return tuple(parameters)


def _operator(name: str) -> Any:
    """The operator that aiter's wrapper of this name calls, if there is one."""
    return getattr(torch.ops.aiter, name, None)
