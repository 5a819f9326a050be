"""`fxpass audit`: the operators of a model that may follow the number of rows, and what is done."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxpass import cli_rows
from fxpass.cli_common import FAILED, OK, Commands, command, planning, read, write
from fxpass.errors import FxpassError
from fxpass.invariant import audit, collectives, families
from fxpass.invariant.audit import COVERED, Finding
from fxpass.invariant.measured import Table
from fxpass.target import Target, load
from fxpass.target_errors import NoGraphError

_EXAMPLE = """\
  fxpass audit hf:llama
  fxpass audit model.py:make --measure --device cuda --table measured.json
  fxpass audit model.py:make --strict || echo "the mode leaves something as it is"

exit codes: 0 done; 1 with --strict, an operator is not covered; 2 something given is wrong"""


def add(commands: Commands) -> None:
    """The subcommand."""
    about = "list the operators whose results may follow the number of rows"
    parser = command(commands, "audit", about, _EXAMPLE, run)
    cli_rows.add(parser)
    parser.add_argument(
        "--fake", action="store_true", help="build the model without memory, and without its GPU"
    )
    parser.add_argument(
        "--measure", action="store_true", help="run each operator here, on fewer and on more rows"
    )
    parser.add_argument(
        "--table", metavar="FILE", help="measurements to use; --measure adds its own to the file"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if one is not covered")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """List, and measure if asked to."""
    if args.measure and args.fake:
        raise FxpassError("audit: --measure runs the model, so --fake cannot be used")
    table = _table(args)
    target = _target(args)
    with contextlib.redirect_stdout(sys.stderr), planning(), torch.no_grad():
        found = _measured(args, target, table) if args.measure else audit.eager(target, table)
        found += _compiled(target, table)
    if args.measure and args.table:
        write(args.table, table.to_json())
    print(_json(args, found) if args.json else text(args, found))
    uncovered = any(finding.mode != COVERED for finding in found)
    return FAILED if args.strict and uncovered else OK


def _table(args: argparse.Namespace) -> Table:
    """The user's measurements; a file that --measure is to make need not be there yet."""
    if not args.table or (args.measure and not Path(args.table).exists()):
        return Table()
    return Table.from_json(read(args.table), args.table)


def _target(args: argparse.Namespace) -> Target:
    if args.measure:
        return cli_rows.runnable(args)
    with contextlib.redirect_stdout(sys.stderr):
        target = load(args.target, fake=True if args.fake else None)
    if args.device is None:
        return target
    if target.fake or target.model is None:
        raise FxpassError("--device: a model without memory stays where it is made")
    return cli_rows.moved(target, args.device)


def _measured(args: argparse.Namespace, target: Target, table: Table) -> list[Finding]:
    model = cli_rows.model_of(args, target)
    return audit.measured(model, args.rows, table)


def _compiled(target: Target, table: Table) -> list[Finding]:
    """The findings in graphs; without any, why is said, and the rest stands."""
    try:
        return audit.compiled(target, table)
    except NoGraphError as none:
        print(f"fxpass: {none}", file=sys.stderr)
        return []


def _json(args: argparse.Namespace, found: Sequence[Finding]) -> str:
    data: dict[str, Any] = {
        "target": args.target,
        "torch": torch.__version__,
        "findings": [
            {
                "run": finding.run,
                "operator": finding.operator,
                "family": finding.family.name,
                "why": finding.family.why,
                "inputs": finding.inputs,
                "where": finding.where,
                "line": finding.line,
                "count": finding.count,
                "varies": None if finding.measured is None else finding.measured.varies,
                "measured": None if finding.measured is None else _evidence(finding),
                "mode": finding.mode,
            }
            for finding in found
        ],
        "nccl": collectives.missing() if _collective(found) else {},
    }
    return json.dumps(data, indent=1)


def text(args: argparse.Namespace, found: Sequence[Finding]) -> str:
    """The findings for people."""
    from tabulate import tabulate

    count = sum(finding.count for finding in found)
    bare = sum(finding.count for finding in found if finding.mode != COVERED)
    parts = [
        f"{args.target}, torch {torch.__version__}: {count} operators may follow the number of"
        f" rows; the batch-invariant mode replaces {count - bare} of them"
    ]
    for run_, title in (("eager", "in eager mode"), ("compiled", "in the graphs Inductor gets")):
        rows = [_row(finding) for finding in found if finding.run == run_]
        if rows:
            head = (title, "operator", "inputs", "where", "measured", "the mode")
            parts.append(tabulate(rows, headers=head))
    whys = {finding.family.name: finding.family.why for finding in found}
    parts.append("\n".join(f"{name}: {why}" for name, why in whys.items()))
    lines = {f"{f.where}: {f.line}" for f in found if f.mode != COVERED and f.where != "?"}
    if lines:
        parts.append("\n".join(["not covered at", *(f"  {line}" for line in sorted(lines))]))
    if _collective(found):
        parts.append(_nccl())
    return "\n\n".join(part for part in parts if part)


def _row(finding: Finding) -> tuple[object, ...]:
    place = finding.where.rpartition("/")[2]
    known = "no" if finding.measured is None else _evidence(finding)
    return (
        finding.count,
        finding.operator,
        " ".join(finding.inputs),
        place,
        known,
        finding.mode,
    )


def _evidence(finding: Finding) -> str:
    row = finding.measured
    assert row is not None
    return f"{row} (torch {row.torch})"


def _collective(found: Sequence[Finding]) -> bool:
    sums = (families.COLLECTIVE, families.REDUCE_SCATTER)
    return any(finding.family in sums for finding in found)


def _nccl() -> str:
    missing = collectives.missing()
    if not missing:
        return "NCCL: the environment has all settings of fxpass.invariant.collectives"
    lines = [f"  {name}={value}" for name, value in missing.items()]
    head = "NCCL: fxpass.invariant.collectives.pin() would set, before init_process_group"
    return "\n".join([head, *lines])
