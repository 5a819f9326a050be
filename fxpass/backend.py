"""Entry points: a torch.compile backend, an Inductor pass, an installer, and plain FX."""

from __future__ import annotations

import functools
import hashlib
import pathlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from fxpass import facts, ops, pipeline, remembered, torch_private
from fxpass.errors import OptionsError
from fxpass.kernels import kernels
from fxpass.modules import open_norms
from fxpass.options import Options, names, unknown_name
from fxpass.report import Report
from fxpass.select import check_providers
from fxpass.sites import Decline

_HOOK = "post_grad_custom_pre_pass"


class _Ledger:
    """Reports of all graphs compiled in this process, safe to add to from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report = Report()

    def add(self, report: Report) -> None:
        with self._lock:
            self._report.add(report)

    def take(self, clear: bool) -> Report:
        with self._lock:
            copy = Report()
            copy.add(self._report)
            if clear:
                self._report = Report()
            return copy


_ledger = _Ledger()


def last_report() -> Report:
    """Everything compiled since `reset_report`, over all graphs and threads."""
    return _ledger.take(clear=False)


def reset_report() -> Report:
    """Start a new `last_report`; returns the old one."""
    return _ledger.take(clear=True)


@functools.cache
def _source_hash() -> str:
    """Hash of every source file of the package, kernels and patterns included."""
    import fxpass.kernels
    import fxpass.patterns

    digest = hashlib.sha256()
    for package in (fxpass, fxpass.kernels, fxpass.patterns):
        folder = pathlib.Path(str(package.__file__)).parent
        for path in sorted(p for p in folder.iterdir() if p.suffix in (".py", ".cpp", ".h")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _make_pass_class() -> type:
    base = torch_private.custom_graph_pass_base()

    class RMSNormPass(base):  # type: ignore[misc, valid-type]
        """Rewrites the norms of an ATen graph; for `post_grad_custom_pre_pass`.

        Options as in `fxpass.Options`, as a mapping or as keywords. `report` collects what it did.
        """

        def __init__(
            self, options: Options | Mapping[str, Any] | None = None, **changes: Any
        ) -> None:
            self.options = Options.make(options, **changes)
            check_providers(self.options)
            self.report = Report()
            _direct_calls()

        def __call__(self, graph: fx.Graph) -> None:
            found = pipeline.run(graph, self.options)
            self.report.add(found)
            _ledger.add(found)

        def uuid(self) -> str:
            """Changes with any source file, option, kernel version or torch version."""
            versions = [f"{k.name}@{k.version}" for k in kernels()]
            text = repr((_source_hash(), self.options, versions, torch.__version__))
            return hashlib.sha256(text.encode()).hexdigest()

        def __reduce__(self) -> Any:
            return _new_pass, (self.options,)

        def __repr__(self) -> str:
            return f"RMSNormPass({self.options})"

    return RMSNormPass


@functools.cache
def pass_class() -> Any:
    """`RMSNormPass`, made on first use because its base class lives in Inductor."""
    made = _make_pass_class()
    made.__module__, made.__qualname__ = "fxpass.backend", "RMSNormPass"
    return made


def _new_pass(options: Options) -> Any:
    return pass_class()(options)


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


def _with_existing(ours: Any, given: Any = None) -> Any:
    """Our pass after whatever the user has in the hook already, or has `given` as an option."""
    existing = getattr(torch_private.inductor_config(), _HOOK) if given is None else given
    listed = list(existing) if isinstance(existing, (list, tuple)) else [existing]
    others = [step for step in listed if step is not None]
    return _chain_class()([*others, ours]) if others else ours


@functools.cache
def _direct_calls() -> None:
    """Let Inductor's generated code call the kernels without the dispatcher."""
    for count in (1, 2, 3):
        op = ops.op_for(("out", "sum", "row")[:count])
        torch_private.call_directly(op, ops.calls)


def rmsnorm_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | Options | None = None,
) -> Callable[..., Any]:
    """Inductor with every norm rewritten: `torch.compile(model, backend=rmsnorm_backend)`.

    `options` may hold fields of `fxpass.Options` and Inductor's own config names; `mode` is
    Inductor's. Raises OptionsError for a name that is neither.
    """
    ours, inductors = _split_options(options)
    rms_pass = pass_class()(ours)
    patches = {**torch_private.mode_patches(mode), **inductors}
    patches[_HOOK] = _with_existing(rms_pass, patches.get(_HOOK))
    if ours.numerics == "eager":
        patches["emulate_precision_casts"] = True
    key = remembered.key_of(graph_module, example_inputs, rms_pass.uuid() + repr(sorted(inductors)))
    compiled = torch_private.compile_fx(graph_module, example_inputs, patches)
    _check_expected(ours, _kept_or_recalled(key, rms_pass.report))
    return compiled


def _kept_or_recalled(key: str, report: Report) -> Report:
    """The report of this compile; of the first one, if Inductor's cache had the code."""
    if report.graphs:
        remembered.keep(key, report)
        return report
    recalled = remembered.recall(key)
    if recalled is None:
        return report
    _ledger.add(recalled)
    return recalled


def _split_options(
    options: Mapping[str, Any] | Options | None,
) -> tuple[Options, dict[str, Any]]:
    if options is None or isinstance(options, Options):
        return Options.make(options), {}
    config = torch_private.inductor_config()
    ours = {name: value for name, value in options.items() if name in names()}
    rest = {name.replace("-", "_"): v for name, v in options.items() if name not in names()}
    for name in rest:
        if not hasattr(config, name.split(".")[0]):
            raise OptionsError(unknown_name("option", name, names()))
    return Options.make(ours), rest


def _check_expected(options: Options, report: Report) -> None:
    if options.expect is not None and len(report.rewritten) < options.expect:
        lost = "; ".join(map(str, report.declined[:3])) or "no near miss was seen"
        raise OptionsError(
            f"expected {options.expect} rewritten norms, found {len(report.rewritten)}: {lost}"
        )


class Installed:
    """Our pass in Inductor's global hook. Leaving the `with`, or `uninstall`, takes it out."""

    def __init__(self, rms_pass: Any) -> None:
        self.rms_pass = rms_pass
        self._config = torch_private.inductor_config()
        self._before = getattr(self._config, _HOOK)
        self._ours = _with_existing(rms_pass)
        setattr(self._config, _HOOK, self._ours)

    @property
    def report(self) -> Report:
        """What the installed pass has done so far."""
        found: Report = self.rms_pass.report
        return found

    def uninstall(self) -> None:
        """Put back what the hook held before (unless someone else has changed it since)."""
        if getattr(self._config, _HOOK) is self._ours:
            setattr(self._config, _HOOK, self._before)

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()


def install(options: Options | Mapping[str, Any] | None = None, **changes: Any) -> Installed:
    """Put the pass into Inductor's hook for every compile of this process, keeping the user's own.

    A call lasts until `uninstall()`; as a context manager, until its end.
    """
    return Installed(pass_class()(options, **changes))


def rewrite(
    graph_module: fx.GraphModule,
    *example_inputs: Any,
    options: Options | Mapping[str, Any] | None = None,
    **changes: Any,
) -> Report:
    """Rewrite an FX graph in place (Dynamo, make_fx, torch.export or symbolic_trace).

    `example_inputs` give shapes to a graph that carries none (a plain symbolic_trace).
    Returns the report. The operators put in have gradients.
    """
    chosen = Options.make(options, **changes)
    check_providers(chosen)
    open_norms(graph_module)
    if example_inputs:
        torch_private.propagate_fakes(graph_module, example_inputs)
    found = Report()
    for inner in graph_module.modules():  # bodies of cond, checkpoint and the like included
        if isinstance(inner, fx.GraphModule):
            made = pipeline.run(inner.graph, chosen)
            if made.rewritten:
                inner.recompile()
            found.add(made)
    if not facts.has_any(graph_module.graph):
        reason = "the graph carries no shapes; pass example inputs: fxpass.rewrite(gm, *inputs)"
        found.declined.append(Decline("graph", reason))
    _ledger.add(found)
    _check_expected(chosen, found)
    return found
