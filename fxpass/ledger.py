"""Reports of everything compiled in this process, safe to add to from several threads."""

from __future__ import annotations

import threading

from fxpass.report import Report


class Ledger:
    """One report that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report = Report()

    def add(self, report: Report) -> None:
        """Take in a report."""
        with self._lock:
            self._report.add(report)

    def take(self, clear: bool) -> Report:
        """A copy of the whole; with `clear`, start anew."""
        with self._lock:
            copy = Report()
            copy.add(self._report)
            if clear:
                self._report = Report()
            return copy


LEDGER = Ledger()


def last_report() -> Report:
    """Everything compiled since `reset_report`, over all graphs and threads."""
    return LEDGER.take(clear=False)


def reset_report() -> Report:
    """Start a new `last_report`; returns the old one."""
    return LEDGER.take(clear=True)
