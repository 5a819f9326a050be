"""A diff for the terminal: sites that change alike once, near misses with the user's line."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TextIO

from fxpass.diff import Diff, Row, SiteDiff
from fxpass.sites import Decline

_COLOURS = {"-": "31", "+": "32", "@": "36", "!": "33", "#": "1"}


def wants_colour(stream: TextIO) -> bool:
    """A terminal gets colour, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def text(diff: Diff, every: bool = False, graph: bool = False, colour: bool = False) -> str:
    """The diff. `every`: each site, alike or not; `graph`: the whole graphs as well."""
    lines = [f"# {diff.target}: {diff.report.summary()}"]
    for sites in _groups(diff.sites, every):
        lines += ["", *_site(sites)]
    for miss in diff.report.declined:
        lines += ["", *_miss(miss)]
    if graph:
        for index, rows in enumerate(diff.graphs):
            lines += ["", f"# graph {index}", *map(_row, rows)]
    lines += [f"! {error}" for error in diff.report.errors]
    return "\n".join(_painted(line) for line in lines) if colour else "\n".join(lines)


def _groups(sites: Iterable[SiteDiff], every: bool) -> list[list[SiteDiff]]:
    groups: dict[Hashable, list[SiteDiff]] = {}
    for site in sites:
        groups.setdefault(id(site) if every else kind(site), []).append(site)
    return list(groups.values())


def kind(site: SiteDiff) -> Hashable:
    """Equal for sites whose nodes differ in their names only."""
    return site.record.location, site.record.kernel, shape(site.before), shape(site.after)


def shape(lines: Iterable[str]) -> tuple[str, ...]:
    """Lines without the names of nodes."""
    return tuple(re.sub(r"%\w+", "%", line) for line in lines)


def _site(sites: Sequence[SiteDiff]) -> list[str]:
    record = sites[0].record
    name = record.module or f"%{record.node}"
    head = f"@ {name}" + (f" and {len(sites) - 1} more alike" if len(sites) > 1 else "")
    nodes = f"{record.nodes_before} -> {record.nodes_after} nodes"
    lines = [f"{head} ({record.variant} -> {record.kernel}, {nodes}, {record.numerics})"]
    if len(sites) > 1:
        others = [site.record.module or f"%{site.record.node}" for site in sites[1:]]
        shown = ", ".join(others[:3]) + (f", ... {others[-1]}" if len(others) > 3 else "")
        lines.append(f"  also: {shown}")
    lines.append(f"  {record.location}  {record.source}".rstrip())
    for mark, shown_lines in (("-", sites[0].before), ("+", sites[0].after)):
        lines += [f"{mark} {part}" for line in shown_lines for part in line.splitlines()]
    return lines


def _miss(miss: Decline) -> list[str]:
    where = f" in {miss.module}" if miss.module else ""
    lines = [f"! declined %{miss.node}{where}: {miss.reason}"]
    return [*lines, f"  {miss.location}  {miss.source}".rstrip()]


def _row(row: Row) -> str:
    site = "" if row.site is None else f"  # site {row.site}"
    return f"{row.mark} {(row.before or row.after).splitlines()[0]}{site}"


def _painted(line: str) -> str:
    code = _COLOURS.get(line[:1])
    return f"\033[{code}m{line}\033[0m" if code else line
