"""`fxpass explain`: which norms would be rewritten, by what, and why the others would not."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from fxpass import pipeline
from fxpass.cli_baseline import lost, parse
from fxpass.cli_common import (
    FAILED,
    OK,
    Commands,
    add_target,
    command,
    options_of,
    planning,
    read,
    target_of,
)
from fxpass.options import Options
from fxpass.report import Report, RewrittenSite
from fxpass.sites import Decline
from fxpass.target import Target

T = TypeVar("T")

_EXAMPLE = """\
  fxpass explain hf:llama
  fxpass explain model.py:make --expect all
  fxpass explain model.py:make --json > baseline.json
  fxpass explain model.py:make --baseline baseline.json || echo "a norm was lost"

exit codes: 0 all is well; 1 a check (--expect, --baseline) failed; 2 something given is wrong"""


def add(commands: Commands) -> None:
    """The subcommand."""
    about = "show which norms would be rewritten, and why the others would not"
    parser = command(commands, "explain", about, _EXAMPLE, run)
    add_target(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--all", action="store_true", help="one row per norm, alike or not")
    parser.add_argument(
        "--expect", metavar="N", type=_expected, help="fail if fewer than N norms, or not `all`"
    )
    parser.add_argument("--baseline", metavar="FILE", help="fail if a norm of this report is lost")


def _expected(text: str) -> int | str:
    if text == "all" or text.isdigit():
        return text if text == "all" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor 'all'")


def run(args: argparse.Namespace) -> int:
    """Print the report, then check it."""
    options = options_of(args)
    before = parse(read(args.baseline), args.baseline) if args.baseline else None
    report = explained(target_of(args), options, args.train)
    print(report.to_json() if args.json else text(report, every=args.all))
    faults = [*_unmet(report, args.expect)]
    if before is not None:
        faults += [str(miss) for miss in lost(before, report)]
    if faults and not args.json:
        print()
    return _told(faults)


def _told(faults: Sequence[str]) -> int:
    """Faults go to stderr, so that they are seen where stdout goes to a file."""
    for fault in faults:
        print(f"fxpass: {fault}", file=sys.stderr)
    return FAILED if faults else OK


def explained(target: Target, options: Options, train: bool = False) -> Report:
    """The report over all graphs of a target."""
    report = Report()
    with planning():
        for graph_module in target.graphs(train):
            report.add(pipeline.dry_run(graph_module.graph, options))
    return report


def _unmet(report: Report, expect: int | str | None) -> list[str]:
    """Why the report is not what was expected, or nothing."""
    found = len(report.rewritten)
    if expect is None or (expect != "all" and found >= int(expect)):
        return []
    if expect == "all" and found and not report.declined and not report.errors:
        return []
    wanted = "all norms" if expect == "all" else f"{expect} norms"
    said = [f"expected {wanted} rewritten, found {found} of {found + len(report.declined)}"]
    return said + [f"{miss}" for miss in report.declined] + report.errors


def text(report: Report, every: bool = False) -> str:
    """The report for people: alike norms in one row, refusals and near misses by reason."""
    from tabulate import tabulate

    parts = [report.summary()]
    groups = _grouped(report.rewritten, id if every else _kind)
    if groups:
        head = ("norms", "where", "source", "variant", "kernel", "layout", "bytes", "numerics")
        parts.append(tabulate([_row(sites) for sites in groups], headers=head))
    refusals = _grouped((said for s in report.rewritten for said in s.refusals), _unnamed)
    if refusals:
        rows = [(len(alike), *_kernel_and_reason(alike[0])) for alike in refusals]
        parts.append(tabulate(rows, headers=("norms", "refused", "reason")))
    parts += [_miss(misses) for misses in _grouped(report.declined, id if every else _same_miss)]
    return "\n\n".join(parts + report.errors)


def _grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _kind(site: RewrittenSite) -> Hashable:
    """Sites are alike if they differ in the numbers of their module path only."""
    return (
        *(_pattern(site.module), site.location, site.variant, site.kernel, site.layout_nodes),
        *(tuple(map(_unnamed, site.refusals)), site.numerics, site.spec, site.hidden),
    )


def _unnamed(reason: str) -> str:
    """A reason to compare by: without the numbers in names of nodes, where alike norms differ."""
    return re.sub(r"(?<=[a-z])_\d+\b", "", reason)


def _pattern(module: str) -> str:
    return re.sub(r"\d+", "*", module)


def _row(sites: Sequence[RewrittenSite]) -> tuple[object, ...]:
    site = sites[0]
    where = site.module or f"%{site.node}" if len(sites) == 1 else _pattern(site.module)
    copied = "?" if site.bytes_copied is None else site.bytes_copied * len(sites)
    layout = ", ".join(node.partition(" ")[0] for node in site.layout_nodes) or "-"
    place = os.path.basename(site.location)
    numbers = (layout, copied, site.numerics)
    variant = site.variant + (" + residual" if " residual=" in site.spec else "")
    return (len(sites), where or "-", place, variant, site.kernel, *numbers)


def _kernel_and_reason(refusal: str) -> tuple[str, str]:
    """`refused cpu.row: reason` in two."""
    kernel, _, reason = refusal.removeprefix("refused ").partition(": ")
    return (kernel, reason) if reason else ("", refusal)


def _same_miss(miss: Decline) -> Hashable:
    return _pattern(miss.module), miss.location, _unnamed(miss.reason)


def _miss(misses: Sequence[Decline]) -> str:
    """A near miss with the user's line under it."""
    miss = misses[0]
    where = miss.module if len(misses) == 1 else f"{len(misses)} x {_pattern(miss.module)}"
    name = f" in {where}" if where.strip(" x") else ""
    source = f"\n    {miss.source}" if miss.source else ""
    return f"declined {miss.location} at %{miss.node}{name}{source}\n    {miss.reason}"
