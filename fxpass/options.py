"""One frozen record of options; the only reader of environment variables."""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fxpass.errors import OptionsError

ROUNDINGS = ("source", "cast_then_scale", "scale_then_cast")
NUMERICS = ("default", "eager")
_SWITCHES = ("strict", "verify", "batch_invariant")
PLATFORMS = ("cpu", "cuda", "rocm")


@dataclass(frozen=True)
class Options:
    """How to rewrite. Every field can be set by `FXPASS_<NAME>` too; arguments win."""

    providers: tuple[str, ...] = ("auto",)
    """Providers in order of preference, for example `("cpu", "reference")`. `auto`: all."""
    rounding: str = "source"
    """`source` keeps the model's rounding order; another value overrides it, and is labelled."""
    numerics: str = "default"
    """`eager` makes Inductor keep eager's roundings in the rest of the graph as well."""
    strict: bool = False
    """Raise on a bug in the pass, instead of leaving the graph as it was and warning once."""
    verify: bool = False
    """Run old and new subgraph on sampled inputs; refuse a rewrite that differs too much."""
    batch_invariant: bool = False
    """Only operators whose rows do not depend on other rows: norms on kernels whose contract says
    so, the rest of the graph on `fxpass.kernels.invariant`."""
    fuel: int | None = None
    """Rewrite only the first N sites of each graph (to bisect a wrong one)."""
    expect: int | None = None
    """Raise if fewer than N sites are rewritten in a compiled graph."""
    platform: str | None = None
    """Choose kernels for another machine: `rocm:gfx942`, `cuda:sm_90`, `cpu`. What this machine can
    build or run is not asked then, so a rewritten graph is to look at, or to run over there."""

    def __post_init__(self) -> None:
        if isinstance(self.providers, str):
            names = tuple(part.strip() for part in self.providers.split(",") if part.strip())
            object.__setattr__(self, "providers", names or ("auto",))
        else:
            object.__setattr__(self, "providers", _names_of(self.providers))
        _check_choice("rounding", self.rounding, ROUNDINGS)
        _check_choice("numerics", self.numerics, NUMERICS)
        _check_platform(self.platform)
        for name in ("fuel", "expect"):
            _check_count(name, getattr(self, name))
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise OptionsError(f"options: {name}={getattr(self, name)!r}; use True or False")

    @classmethod
    def make(cls, given: Options | Mapping[str, Any] | None = None, **changes: Any) -> Options:
        """Options from the environment, then `given`, then `changes`.

        Raises OptionsError, naming the nearest known option, if a name is unknown.
        """
        if given is not None and not isinstance(given, (Options, Mapping)):
            raise OptionsError(
                f"options: found {type(given).__name__}, needs fxpass.Options or a mapping"
            )
        if isinstance(given, Options):
            return dataclasses.replace(given, **_known(changes)) if changes else given
        return cls(**{**_from_environment(), **_known(dict(given or {})), **_known(changes)})

    def refuse_batch_invariant(self, where: str) -> None:
        """Raises OptionsError if `batch_invariant` is set: `where` says who cannot act on it."""
        if self.batch_invariant:
            raise OptionsError(
                f"options: batch_invariant is for the backend; {where} does not compile the rest of"
                " the graph, use torch.compile(model, backend=fxpass.rmsnorm_backend,"
                " options={'batch_invariant': True})"
            )

    def refuse_numerics(self, where: str) -> None:
        """Raises OptionsError if `numerics` is set: `where` says who cannot act on it."""
        if self.numerics != "default":
            raise OptionsError(
                f"options: numerics={self.numerics!r} is for the backend; {where} does not compile"
                " the rest of the graph, set torch._inductor.config.emulate_precision_casts there"
            )


def _names_of(providers: object) -> tuple[str, ...]:
    listed = tuple(providers) if isinstance(providers, (list, tuple)) else ()
    if not listed or not all(isinstance(name, str) for name in listed):
        raise OptionsError(
            f"options: providers={providers!r}; use names, for example ('cpu', 'reference')"
        )
    return listed


def names() -> tuple[str, ...]:
    """All option names."""
    return tuple(field.name for field in dataclasses.fields(Options))


def cache_dir_override() -> str | None:
    """The directory for built kernels that the user asked for (`FXPASS_CACHE_DIR`)."""
    return os.environ.get("FXPASS_CACHE_DIR") or None


def unknown_name(kind: str, name: object, known: tuple[str, ...]) -> str:
    """One line for a name that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"options: {kind} {name!r} is unknown{hint} known: {', '.join(known)}"


def _known(given: dict[str, Any]) -> dict[str, Any]:
    for name in given:
        if name not in names():
            raise OptionsError(unknown_name("option", name, names()))
    return given


def _from_environment() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Options):
        text = os.environ.get(f"FXPASS_{field.name.upper()}")
        if text:
            found[field.name] = _parse(field.name, text)
    return found


def _parse(name: str, text: str) -> Any:
    if name in _SWITCHES:
        if text.lower() not in ("0", "1", "true", "false"):
            raise OptionsError(f"environment: FXPASS_{name.upper()}={text!r}; use 0 or 1")
        return text.lower() in ("1", "true")
    if name in ("fuel", "expect"):
        if not text.isdigit():
            raise OptionsError(f"environment: FXPASS_{name.upper()}={text!r}; use a whole number")
        return int(text)
    return text


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionsError(unknown_name(name, value, known))


def _check_platform(value: object) -> None:
    if value is None:
        return
    kind, colon, arch = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind not in PLATFORMS:
        raise OptionsError(unknown_name("platform", value, PLATFORMS))
    if colon and not arch:
        raise OptionsError(f"options: platform={value!r}; use for example 'rocm:gfx942'")


def _check_count(name: str, value: object) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OptionsError(f"options: {name}={value!r}; use a whole number >= 0 or None")
