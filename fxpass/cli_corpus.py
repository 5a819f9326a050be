"""`fxpass corpus`: whether the installed torch still hands every spelling to the pass."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

from fxpass import corpus
from fxpass.cli_common import FAILED, OK, Commands, command, write

_EXAMPLE = """\
  fxpass corpus
  fxpass corpus --json corpus.json || echo "this torch hides norms from the pass"

exit codes: 0 all is as it should be; 1 a norm is not found at a hook, or a near miss is taken"""


def add(commands: Commands) -> None:
    """The subcommand."""
    about = "replay a corpus of spellings through the installed torch, at every hook"
    parser = command(commands, "corpus", about, _EXAMPLE, run)
    parser.add_argument("--json", metavar="FILE", help="write the matrix, with reasons, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the matrix, and what is wrong in it."""
    lines = corpus.replay()
    if args.json:
        write(args.json, json.dumps(corpus.to_dict(lines), indent=1) + "\n")
    print(text(lines))
    faults = [fault for line in lines for fault in line.faults]
    for fault in faults:
        print(f"fxpass: {fault}", file=sys.stderr)
    return FAILED if faults else OK


def text(lines: Sequence[corpus.Line]) -> str:
    """The matrix, near misses last."""
    from tabulate import tabulate

    norms = sum(bool(line.norms) for line in lines)
    faults = sum(bool(line.faults) for line in lines)
    head = f"torch {torch.__version__}: {norms} spellings, {len(lines) - norms} near misses"
    parts = [f"{head}, {faults} not as they should be"]
    for title, wanted in (("spelling", True), ("near miss", False)):
        rows = [
            [line.name, *(line.cells[hook].state for hook in corpus.HOOKS)]
            for line in lines
            if bool(line.norms) is wanted
        ]
        parts.append(tabulate(rows, headers=(title, *corpus.HOOKS)))
    return "\n\n".join(parts)
