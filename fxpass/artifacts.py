"""What the pass did to a graph, written where people look for what a compile did.

A structured trace (TORCH_TRACE, read by tlparse) gets the artifacts `fxpass_before`,
`fxpass_after` and `fxpass_report`; TORCH_COMPILE_DEBUG gets files beside Inductor's own. A graph
without norms leaves nothing, as does one that Inductor takes from its code cache.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import fx

from fxpass import printing, torch_private
from fxpass.report import Report

log = logging.getLogger("fxpass")

_SUFFIXES = {"fxpass_before": ".txt", "fxpass_after": ".txt", "fxpass_report": ".json"}
_ENCODINGS = {".txt": "string", ".json": "json"}


def recorded(graph: fx.Graph, run: Callable[[], Report], strict: bool) -> Report:
    """The report of `run`, which rewrites the graph; a failure to write one is only logged."""
    folder, trace = torch_private.debug_folder(), torch_private.is_tracing()
    if not folder and not trace:  # printing a large graph costs as much as the pass
        return run()
    before = _guarded(lambda: _text(graph), strict)
    found = run()
    if found.rewritten or found.declined or found.errors:
        _guarded(lambda: _write(before or "", graph, found, folder, trace), strict)
    return found


def _text(graph: fx.Graph) -> str:
    return "\n".join(printing.lines(graph).values()) + "\n"


def _guarded(step: Callable[[], str | None], strict: bool) -> str | None:
    """Runs a step that must not break a compile."""
    try:
        return step()
    except Exception as error:
        if strict:
            raise
        log.warning("fxpass: artifacts not written: %s: %s", type(error).__name__, error)
        return None


def _write(before: str, graph: fx.Graph, found: Report, folder: str | None, trace: bool) -> None:
    texts = dict(zip(_SUFFIXES, (before, _text(graph), found.to_json()), strict=True))
    if trace:
        for name, text in texts.items():
            torch_private.trace_artifact(name, _ENCODINGS[_SUFFIXES[name]], text)
    if folder:
        number = _free(Path(folder))
        for name, text in texts.items():
            Path(folder, f"{name}{number}{_SUFFIXES[name]}").write_text(text, encoding="utf-8")


def _free(folder: Path) -> str:
    """Empty for the first graph of a compile; the bodies of cond and the like share its folder."""
    number = ""
    while (folder / f"fxpass_report{number}.json").exists():
        number = f"_{int(number[1:] or 0) + 1}"
    return number
