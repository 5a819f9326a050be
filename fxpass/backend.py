"""Entry points that take a graph: the torch.compile backend, and plain FX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import fx
from torch.export import ExportedProgram

from fxpass import facts, pipeline, remembered, torch_fakes, torch_private
from fxpass.errors import FxpassError, OptionsError
from fxpass.hooks import HOOK, new_pass, with_existing
from fxpass.ledger import LEDGER
from fxpass.modules import open_norms
from fxpass.options import Options, names, unknown_name
from fxpass.report import Report
from fxpass.select import check_providers
from fxpass.sites import Decline


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
    rms_pass = new_pass(ours)
    patches = {**torch_private.mode_patches(mode), **inductors}
    patches[HOOK] = with_existing(rms_pass, patches.get(HOOK))
    if ours.numerics == "eager":
        _pin(patches, {"emulate_precision_casts": True}, "numerics='eager'")
    tracing: AbstractContextManager[Any] = nullcontext()
    if ours.batch_invariant:
        from fxpass.invariant import compiled  # registers operators

        _pin(patches, compiled.flags(), "batch_invariant")
        tracing = compiled.tracing()
    key = remembered.key_of(graph_module, example_inputs, rms_pass.uuid())
    watch = _Watch(rms_pass)
    with tracing as table:
        made = torch_private.compile_fx(graph_module, example_inputs, patches, watch.look, table)
    _check_expected(ours, _kept_or_recalled(key, watch.report))
    return made


def _pin(patches: dict[str, Any], flags: Mapping[str, Any], what: str) -> None:
    """Put Inductor settings that an option of ours needs beside the user's own."""
    for name, value in flags.items():
        if patches.get(name, value) != value:
            raise OptionsError(
                f"options: {what} needs {name}={value!r}, found {patches[name]!r}; leave one out"
            )
    patches.update(flags)


class _Watch:
    """The report of one compile, also of graphs that Inductor takes from its code cache."""

    def __init__(self, rms_pass: Any) -> None:
        self._pass = rms_pass
        self._cached = Report()

    @property
    def report(self) -> Report:
        """What the pass did, and what it would say of the graphs that did not reach it."""
        whole = Report()
        whole.add(self._pass.report)
        whole.add(self._cached)
        return whole

    def look(self, graph_module: fx.GraphModule, compile_inner: Callable[[], Any]) -> Any:
        """Compile one graph; if the pass did not run, the code came from the cache."""
        before = self._pass.report.graphs
        compiled = compile_inner()
        if self._pass.report.graphs == before:
            found = pipeline.dry_run(graph_module.graph, self._pass.options)
            self._cached.add(found)
            LEDGER.add(found)
        return compiled


def _kept_or_recalled(key: str, report: Report) -> Report:
    """The report of this compile; of the first one, if a cache had the whole of it."""
    if report.graphs:
        remembered.keep(key, report)
        return report
    recalled = remembered.recall(key)
    if recalled is None:
        return report
    LEDGER.add(recalled)
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


def rewrite(
    graph_module: fx.GraphModule | ExportedProgram,
    *example_inputs: Any,
    options: Options | Mapping[str, Any] | None = None,
    **changes: Any,
) -> Report:
    """Rewrite an FX graph in place (Dynamo, make_fx, torch.export or symbolic_trace).

    Of an ExportedProgram the signature follows, so that it can be saved, decomposed and packaged.
    `example_inputs` give shapes to a graph that carries none (a plain symbolic_trace).
    Returns the report. The operators put in have gradients. Raises FxpassError for anything else,
    for inputs of a program, which carries its shapes, and for one that keeps the call signatures of
    submodules (`preserve_module_call_signature`): a norm takes over values that these name.
    """
    if isinstance(graph_module, ExportedProgram):
        _check_program(graph_module, example_inputs)
        with _signature_following(graph_module):
            return rewrite(graph_module.graph_module, options=options, **changes)
    if not isinstance(graph_module, fx.GraphModule):
        raise FxpassError(
            "rewrite: needs a torch.fx.GraphModule or a torch.export.ExportedProgram, found"
            f" {type(graph_module).__name__};"
            " for a model use torch.compile(model, backend=fxpass.rmsnorm_backend)"
        )
    chosen = Options.make(options, **changes)
    check_providers(chosen)
    chosen.refuse_numerics("rewrite")
    chosen.refuse_batch_invariant("rewrite")
    open_norms(graph_module)
    if example_inputs:
        torch_fakes.propagate_fakes(graph_module, example_inputs)
    from fxpass import diff_view

    found, graphs = Report(), Report()
    for inner in torch_private.graph_and_bodies(graph_module):
        diff_view.keep(graphs, inner.graph, chosen)
        made = pipeline.run(inner.graph, chosen)
        if made.rewritten:
            inner.recompile()
        found.add(made)
    if not facts.has_any(graph_module.graph):
        reason = "the graph carries no shapes; pass example inputs: fxpass.rewrite(gm, *inputs)"
        found.declined.append(Decline("graph", reason))
    LEDGER.add(found)
    _check_expected(chosen, found)
    found.kept = graphs.kept  # after the ledger took the rest: it must not hold graphs
    return found


def _check_program(program: ExportedProgram, example_inputs: tuple[Any, ...]) -> None:
    if example_inputs:
        raise FxpassError("rewrite: a program carries its shapes; leave the inputs out")
    named = [entry.fqn for entry in program.module_call_graph if entry.fqn and entry.signature]
    if named:
        raise FxpassError(
            f"rewrite: the program keeps the call signature of {named[0]}, whose values a norm may"
            " take over; export it without preserve_module_call_signature"
        )


@contextmanager
def _signature_following(program: ExportedProgram) -> Iterator[None]:
    """Give results the names that they have afterwards: a program is read by name."""

    def names_of_results() -> list[str]:
        return [str(one) for one in program.graph.output_node().args[0]]

    before = names_of_results()
    try:
        yield
    finally:  # `expect` raises when the graph is rewritten
        for old, new in zip(before, names_of_results(), strict=True):
            if old != new:
                program.graph_signature.replace_all_uses(old, new)
