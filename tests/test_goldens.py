"""Before, after and report of a few whole graphs, as text to read. `--update-golden` writes."""

from __future__ import annotations

import functools

import pytest
import torch
from cases import Case, table
from helpers import capture, rewritten, tensors

from fxpass import printing

ROWS = {case.id: case for case in table()}
SHOWN = {
    "llama": "aten",
    "functional": "dynamo",
    "gemma": "aten",
    "sum_returned": "aten",
    "packed_query_and_key": "aten",
    "after_transpose": "aten",
    "inverse_returned": "aten",
    "normalize_in_16_bit": "dynamo",
    "eps_tensor": "aten",
    "last_two_dims": "aten",
    "channels_moved_last": "aten",
    "write_between": "dynamo",
    "layer_norm_by_hand": "aten",
}


@functools.cache
def _level(case: Case, level: str):
    with torch.no_grad():
        inputs = tensors(*case.inputs)
        return capture(case.function, inputs, aten="aten" in case.levels).graphs(level)[-1]


def _report(report) -> str:
    """The report without source lines, which move with every edit of the tables."""
    lines = [report.summary()]
    for site in report.rewritten:
        lines.append(f"{site.variant} @ {site.kernel}: {site.nodes_before} -> {site.nodes_after}")
        lines += [f"    {node}" for node in site.layout_nodes]
    return "\n".join(lines + [f"declined: {miss.reason}" for miss in report.declined])


@pytest.mark.parametrize("name", SHOWN)
def test_graph(name: str, golden) -> None:
    level = _level(ROWS[name], SHOWN[name])
    before = printing.text(level.graph_module.graph)
    made, report = rewritten(level)
    parts = ("before", before), ("after", printing.text(made.graph)), ("report", _report(report))
    golden("\n\n".join(f"# {title}\n{text}" for title, text in parts))


def test_names_are_short_and_unique() -> None:
    level = _level(ROWS["packed_query_and_key"], "aten")
    lines = printing.text(level.graph_module.graph).splitlines()
    names = [line.split(":")[0] for line in lines if ": " in line]
    assert len(names) == len(set(names))
    assert max(map(len, names)) < 12
    assert "0x" not in "".join(lines)
