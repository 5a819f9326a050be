"""Exceptions and the two kinds of "no": a pattern *declines*, a kernel *refuses*."""

from __future__ import annotations


class FxpassError(Exception):
    """Wrong use of fxpass (options, contracts), said in one line."""


class OptionsError(FxpassError):
    """An option has an unknown name or a value of the wrong kind."""


class Declined(Exception):  # noqa: N818 - control flow, never reaches the user
    """A subgraph is not the norm it looked like. Carries the reason and the node's name."""

    def __init__(self, reason: str, node: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node
