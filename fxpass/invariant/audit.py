"""Which of a model's operators may follow the number of rows, where, and what the mode does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxpass import facts, torch_fakes, torch_private, torch_watch
from fxpass.invariant import families, measure, source
from fxpass.invariant.families import Family
from fxpass.invariant.measure import Cut, Shape
from fxpass.invariant.measured import Measured, Table, machine
from fxpass.invariant.prove import Model
from fxpass.target import Target

COVERED = "replaced"


@dataclass
class Finding:
    """One operator of a model, in eager mode or in the graphs Inductor gets."""

    run: str
    """`eager` or `compiled`."""
    operator: str
    family: Family
    inputs: list[str]
    where: str
    line: str
    mode: str
    """COVERED, or why not."""
    measured: Measured | None
    count: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        """What alike findings share."""
        return (self.run, self.operator, tuple(self.inputs), self.where, self.mode)


def eager(target: Target, table: Table) -> list[Finding]:
    """The findings of a run in eager mode; none of a target that holds graphs.

    The target may be fake. Raises TargetError if it cannot run.
    """
    if target.model is None:
        return []
    found: list[Finding] = []

    def see(operator: Any, args: Any, kwargs: Any, made: Any) -> None:
        finding = _finding(operator, args, kwargs, table)
        if finding is not None:
            found.append(finding)

    tensors = torch_fakes.fake_tensors() if target.fake else contextlib.nullcontext()
    model = Model(target.name, target.model, None)
    with tensors, model.fresh(), torch_watch.watching(see), model.said():
        target.model(*target.args, **target.kwargs)
    return _grouped(found)


def _finding(operator: Any, args: Any, kwargs: Any, table: Table) -> Finding | None:
    """An operator that is being run."""
    values = _tensors((args, kwargs))
    family = families.of(operator, args, values)
    if family is None:
        return None
    where, line = source.here()
    kinds = source.kinds(values)
    name = source.name_of(operator)
    known = table.find(name, kinds, _device(values))
    mode = families.mode_does(family, operator, values, eager=True)
    return Finding("eager", name, family, kinds, where, line, mode, known)


def compiled(target: Target, table: Table) -> list[Finding]:
    """The findings in the graphs that Inductor's passes get. Raises TargetError without any."""
    found: list[Finding] = []
    for graph_module in target.graphs():
        for node in graph_module.graph.nodes:
            if node.op == "call_function":
                found += _node(node, table)
    return _grouped(found)


def _node(node: fx.Node, table: Table) -> list[Finding]:
    values = [facts.value(each) for each in node.all_input_nodes]
    values = [value for value in values if isinstance(value, torch.Tensor)]
    family = families.of_generated(node.target, node.args, values)
    if family is None:
        return []
    kinds, name = source.kinds(values), source.name_of(node.target)
    # A sum there is Inductor's own code, of which measurements of ATen's kernel say nothing.
    by_library = family not in (families.REDUCTION, families.GENERATED)
    known = table.find(name, kinds, _device(values)) if by_library else None
    mode = families.mode_does(family, node.target, values)
    place = (facts.location(node), facts.source_line(node))
    return [Finding("compiled", name, family, kinds, *place, mode, known)]


def measured(model: Model, counts: Sequence[int], table: Table) -> list[Finding]:
    """The eager findings of a run with as many rows as the largest count, each operator measured.

    Every operator that may follow the rows is run again on the first and on the last rows of its
    own inputs. New rows go into `table`.
    """
    most = max(counts)
    small = [count for count in counts if count < most]
    if not small:
        return []
    ones: list[tuple[str, list[Shape]]] = []
    found: list[Finding] = []

    def note(operator: Any, args: Any, kwargs: Any, made: Any) -> None:
        ones.append((source.name_of(operator), measure.shapes(args, kwargs)))

    with torch_watch.watching(note):
        model.run(model.model, [0])
    waiting = iter(ones)

    def see(operator: Any, args: Any, kwargs: Any, made: Any) -> None:
        name = source.name_of(operator)
        one = next((shapes for other, shapes in waiting if other == name), None)
        finding = _finding(operator, args, kwargs, table)
        if finding is None:
            return
        if one is not None and families.is_measurable(finding.family, operator):
            finding.measured = _measure(operator, args, kwargs, one, most, small, table)
        found.append(finding)

    with torch_watch.watching(see):
        model.run(model.model, [row % model.rows.count for row in range(most)])
    return _grouped(found)


def _measure(
    operator: Callable[..., Any],
    args: Any,
    kwargs: Any,
    one: Sequence[Shape],
    most: int,
    counts: Sequence[int],
    table: Table,
) -> Measured | None:
    if len(one) != len(torch_private.leaves((args, kwargs))):
        return None
    cut = Cut(args, kwargs, one, most)
    if not cut.has_rows:
        return None
    device = machine(_device(_tensors((args, kwargs))))
    row = table.exact(source.name_of(operator), cut.pattern(), device)
    if row is None:
        at = measure.varies_at(operator, cut, most, counts)
        note = f"of {_listed(counts)}, against {most}"
        row = table.add(source.name_of(operator), cut.pattern(), device, at, note)
    return row


def _grouped(found: Sequence[Finding]) -> list[Finding]:
    """Alike findings as one, with their number."""
    groups: dict[tuple[Any, ...], Finding] = {}
    for finding in found:
        if finding.key in groups:
            groups[finding.key].count += finding.count
        else:
            groups[finding.key] = finding
    return list(groups.values())


def _listed(counts: Sequence[int]) -> str:
    return ", ".join(map(str, counts))


def _device(values: Sequence[torch.Tensor]) -> torch.device:
    return next((value.device for value in values), torch.device("cpu"))


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch_private.leaves(value) if isinstance(leaf, torch.Tensor)]
