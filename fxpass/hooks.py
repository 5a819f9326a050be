"""The pass as Inductor knows it, and its installation in Inductor's global hook."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxpass import artifacts, lowering, pipeline, torch_private
from fxpass.errors import OptionsError
from fxpass.kernels import kernels
from fxpass.ledger import LEDGER
from fxpass.options import Options
from fxpass.report import Report
from fxpass.select import check_providers

HOOK = "post_grad_custom_pre_pass"


@functools.cache
def _source_hash() -> str:
    """Hash of every source file of the package, kernels and patterns included."""
    import fxpass.kernels
    import fxpass.patterns

    digest = hashlib.sha256()
    for package in (fxpass, fxpass.kernels, fxpass.patterns):
        folder = pathlib.Path(str(package.__file__)).parent
        for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".cpp", ".h")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _refuse_for_hook(options: Options) -> None:
    if options.expect is not None:
        raise OptionsError(
            "options: expect is for the backend and rewrite; a hook also sees graphs"
            " without norms (backward, pieces after a graph break)"
        )
    options.refuse_numerics("a hook")


def _make_pass_class() -> type:
    base = torch_private.custom_graph_pass_base()

    class RMSNormPass(base):  # type: ignore[misc, valid-type]
        """Rewrites the norms of an ATen graph; for `post_grad_custom_pre_pass`.

        Options as in `fxpass.Options`, as a mapping or as keywords. `report` collects what it did.
        """

        def __init__(
            self,
            options: Options | Mapping[str, Any] | None = None,
            *,
            _from_backend: bool = False,
            **changes: Any,
        ) -> None:
            self.options = Options.make(options, **changes)
            check_providers(self.options)
            if not _from_backend:
                _refuse_for_hook(self.options)
            self.report = Report()
            lowering.register()
            if self.options.batch_invariant:  # also for code from Inductor's cache
                from fxpass.invariant import compiled

                compiled.register()

        def __call__(self, graph: fx.Graph) -> None:
            with torch_private.inside_inductor():
                found = artifacts.recorded(graph, lambda: self._steps(graph), self.options.strict)
            self.report.add(found)
            LEDGER.add(found)

        def _steps(self, graph: fx.Graph) -> Report:
            found = pipeline.run(graph, self.options)
            if self.options.batch_invariant:
                from fxpass.invariant import compiled  # registers operators

                found.invariant = compiled.rewrite(graph)
            return found

        def uuid(self) -> str:
            """Changes with any source file, option, kernel version or torch version."""
            versions = [f"{k.name}@{k.version}" for k in kernels()]
            text = repr((_source_hash(), self.options, versions, torch.__version__))
            return hashlib.sha256(text.encode()).hexdigest()

        def __reduce__(self) -> Any:
            return new_pass, (self.options,)

        def __repr__(self) -> str:
            return f"RMSNormPass({self.options})"

    return RMSNormPass


@functools.cache
def pass_class() -> Any:
    """`RMSNormPass`, made on first use because its base class lives in Inductor."""
    made = _make_pass_class()
    made.__module__, made.__qualname__ = "fxpass.hooks", "RMSNormPass"
    return made


def new_pass(options: Options) -> Any:
    """A pass for the backend, which checks `expect` itself."""
    return pass_class()(options, _from_backend=True)


@functools.cache
def _chain_class() -> Any:
    base = torch_private.custom_graph_pass_base()

    class PassChain(base):  # type: ignore[misc, valid-type]
        """Several passes in one hook (a list of passes is not accepted before torch 2.13)."""

        def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
            self.passes = tuple(passes)

        def __call__(self, graph: fx.Graph) -> None:
            for step in self.passes:
                step(graph)

        def uuid(self) -> Any:
            """The passes' own ids; None (no caching) if one of them has none."""
            ids = [step.uuid() if hasattr(step, "uuid") else None for step in self.passes]
            return None if None in ids else tuple(ids)

    return PassChain


def with_existing(ours: Any, given: Any = None) -> Any:
    """Our pass after whatever the user has in the hook already, or has `given` as an option."""
    existing = getattr(torch_private.inductor_config(), HOOK) if given is None else given
    return _joined([*_steps(existing), ours])


def _steps(hook: Any) -> list[Any]:
    """The passes of a hook: one, several or none."""
    if isinstance(hook, _chain_class()):
        return list(hook.passes)
    return [step for step in (hook if isinstance(hook, (list, tuple)) else [hook]) if step]


def _joined(steps: list[Any]) -> Any:
    return _chain_class()(steps) if len(steps) > 1 else steps[0]


class Installed:
    """Our pass in Inductor's global hook. Leaving the `with`, or `uninstall`, takes it out."""

    def __init__(self, rms_pass: Any) -> None:
        self.rms_pass = rms_pass
        self._config = torch_private.inductor_config()
        self._before = getattr(self._config, HOOK)
        setattr(self._config, HOOK, with_existing(rms_pass))

    @property
    def report(self) -> Report:
        """What the installed pass has done so far."""
        found: Report = self.rms_pass.report
        return found

    def uninstall(self) -> None:
        """Take our pass out again, in any order; what else is in the hook stays."""
        left = [step for step in _steps(getattr(self._config, HOOK)) if step is not self.rms_pass]
        as_before = left == _steps(self._before)  # then put back the very object, a list say
        rest = _joined(left) if left else None
        setattr(self._config, HOOK, self._before if as_before else rest)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()


def install(options: Options | Mapping[str, Any] | None = None, **changes: Any) -> Installed:
    """Put the pass into Inductor's hook for every compile of this process, keeping the user's own.

    A call lasts until `uninstall()`; as a context manager, until its end.
    """
    return Installed(pass_class()(options, **changes))
