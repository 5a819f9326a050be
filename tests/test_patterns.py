"""Each row of the table, at both levels: the spec or the reason, and the rewritten results."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from cases import Case, Declined, Ignored, Match, table
from helpers import Captured, Level, capture, changed, rewritten, tensors

from fxpass import NormSpec, matching


@functools.cache
def captured(case: Case) -> Captured:
    with torch.no_grad():
        aten = "aten" in case.levels
        return capture(case.function, tensors(*case.inputs), dynamic=case.dynamic, aten=aten)


pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

ROWS = [
    pytest.param(case, level, id=f"{case.id}-{level}")
    for case in table()
    for level in case.levels
]  # fmt: skip


@pytest.mark.parametrize(("case", "level"), ROWS)
def test_case(case: Case, level: str) -> None:
    found = captured(case).graphs(level)[-1]  # Dynamo may start over
    if isinstance(case.expect, Match):
        expect = Match((case.aten,)) if case.aten and level == "aten" else case.expect
        _check_match(expect, found)
    else:
        _check_left_alone(case.expect, found)
    differing = changed(found)
    assert case.exact is False or not differing, differing


def _check_match(expect: Match, level: Level) -> None:
    found = matching.find(level.graph_module.graph)
    seen = tuple((site.variant, str(site.spec)) for site in found.sites)
    assert seen == expect.sites, [str(miss) for miss in found.declined]
    for site in found.sites:
        assert NormSpec.parse(str(site.spec)) == site.spec
    _, report = rewritten(level)
    assert len(report.rewritten) == len(expect.sites), str(report)


def _check_left_alone(expect: Declined | Ignored, level: Level) -> None:
    before = str(level.graph_module.graph)
    made, report = rewritten(level)
    assert not report.rewritten, str(report)
    assert str(made.graph) == before
    if isinstance(expect, Ignored):
        assert not report.declined, str(report)
        return
    if not expect.reason:
        return
    names = {node.name for node in level.graph_module.graph.nodes}
    reasons = [miss.reason for miss in report.declined if miss.node in names]
    assert any(re.search(expect.reason, reason) for reason in reasons), reasons
