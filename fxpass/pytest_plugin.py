"""The pytest fixture `fxpass_report`: what the code under test had rewritten.

    def test_norms(fxpass_report):
        torch.compile(model, backend="rmsnorm")(x)
        fxpass_report.assert_all_rewritten()

`fxpass_report.explain(model, x)` plans instead of compiling, which takes no compiler and no GPU.
Switched on by `pytest_plugins = ["fxpass.pytest_plugin"]` in a conftest.py, or by `-p
fxpass.pytest_plugin`: an entry point would import torch into every pytest run of the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fxpass.capture import explain
from fxpass.ledger import LEDGER, last_report, reset_report
from fxpass.report import Report


class RecordedReport:
    """The report of one test; what is asked of it covers everything since the test began."""

    def __init__(self) -> None:
        self._planned = Report()

    def explain(self, model: Any, *args: Any, **kwargs: Any) -> Report:
        """`fxpass.explain`, taken into this report."""
        found = explain(model, *args, **kwargs)
        self._planned.add(found)
        return found

    @property
    def report(self) -> Report:
        """Everything compiled or planned so far."""
        whole = last_report()
        whole.add(self._planned)
        return whole

    def assert_all_rewritten(self, at_least: int = 1) -> None:
        """Fails, naming each norm by line and reason, if one was left or there are too few."""
        __tracebackhide__ = True
        report = self.report
        faults = [f"  {miss}" for miss in report.declined] + report.errors
        if faults or len(report.rewritten) < at_least:
            found = f"{report.summary()}; expected all of them, and at least {at_least}"
            pytest.fail("\n".join([found, *faults]), pytrace=False)


@pytest.fixture
def fxpass_report() -> Iterator[RecordedReport]:
    """What fxpass does during this test."""
    before = reset_report()
    yield RecordedReport()
    LEDGER.add(before)
