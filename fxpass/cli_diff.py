"""`fxpass diff`: what the rewrite changes, site by site."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys

from fxpass import diff_text, numerics
from fxpass.cli_common import (
    OK,
    Commands,
    add_target,
    command,
    options_of,
    planning,
    target_of,
    write,
)
from fxpass.diff import of_graphs
from fxpass.diff_html import page

_EXAMPLE = """\
  fxpass diff hf:llama
  fxpass diff model.py:make --graph | less -R
  fxpass diff model.py:make --html diff.html --json diff.json
  fxpass diff model.py:make --numerics"""


def add(commands: Commands) -> None:
    """The subcommand."""
    about = "show the graph before and after, site by site"
    parser = command(commands, "diff", about, _EXAMPLE, run)
    add_target(parser)
    parser.add_argument("--all", action="store_true", help="every site, alike or not")
    parser.add_argument("--graph", action="store_true", help="the whole graphs as well")
    parser.add_argument(
        "--numerics", action="store_true", help="run both, per norm and as a whole, and compare"
    )
    parser.add_argument("--json", metavar="FILE", help="write the diff as JSON")
    parser.add_argument("--html", metavar="FILE", help="write one self-contained web page")
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="(NO_COLOR is heeded)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the diff, and write the files that were asked for."""
    options = options_of(args)
    target = target_of(args, runs=args.numerics)
    with planning():
        diff = of_graphs(target.name, target.graphs(args.train), options)
    data = diff.to_dict()
    numbers = None
    if args.numerics:
        with contextlib.redirect_stdout(sys.stderr):  # the model may print
            numbers = numerics.measure(target, options)
        data["numerics"] = numbers.to_dict()
    if args.json:
        write(args.json, json.dumps(data, indent=1))
    if args.html:
        write(args.html, page(diff, data.get("numerics")))
    print(diff_text.text(diff, args.all, args.graph, _colour(args.color)))
    if numbers:
        print(f"\n{numerics.text(numbers)}")
    return OK


def _colour(wish: str) -> bool:
    return wish == "always" or (wish == "auto" and diff_text.wants_colour(sys.stdout))
