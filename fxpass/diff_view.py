"""`report.diff()`: what `fxpass diff` shows, from Python; in a notebook, the HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from torch import fx

from fxpass import diff, diff_html, diff_text, torch_private
from fxpass.options import Options
from fxpass.report import Kept, Report


class DiffView:
    """A diff that prints as text; `data` has it as records."""

    def __init__(self, data: diff.Diff) -> None:
        self.data = data

    def text(self, every: bool = False, graph: bool = False) -> str:
        """As `fxpass diff` prints it. `every`: each site, alike or not; `graph`: whole graphs."""
        return diff_text.text(self.data, every, graph)

    def html(self) -> str:
        """The page of `fxpass diff --html`, one file without network."""
        return diff_html.page(self.data)

    def to_dict(self) -> dict[str, Any]:
        """The data of `fxpass diff --json`."""
        return self.data.to_dict()

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that no style leaks into the notebook."""
        style = "width:100%;height:45rem;border:1px solid #8888"
        page = escape(self.html())
        return f'<iframe title="fxpass diff" style="{style}" srcdoc="{page}"></iframe>'


def keep(report: Report, graph: fx.Graph, options: Options, name: str = "model") -> None:
    """Let a report show a graph that is not rewritten yet; a copy of it is kept."""

    def show(kept: Sequence[Kept]) -> DiffView:
        return DiffView(diff.of_kept(name, kept))

    inside = torch_private.is_inside_inductor()
    report.kept.append(Kept(diff.copied(graph), options, inside, show))
