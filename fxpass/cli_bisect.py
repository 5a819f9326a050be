"""`fxpass bisect`: the first rewrite that makes a check of the user's fail."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxpass import pipeline, torch_private
from fxpass.backend import rmsnorm_backend
from fxpass.cli_common import (
    FAILED,
    OK,
    Commands,
    add_target,
    command,
    options_of,
    planning,
    target_of,
)
from fxpass.errors import FxpassError
from fxpass.options import Options
from fxpass.report import Report, RewrittenSite
from fxpass.target import Target, function

Check = Callable[..., Any]

_EXAMPLE = """\
  fxpass bisect model.py:make --check model.py:check

  # model.py
  def check(model, x):  # gets the compiled model and the arguments
      torch.testing.assert_close(model(x), expected)

exit codes: 0 the check passes with every rewrite; 1 a rewrite was found; 2 something is wrong"""


def add(commands: Commands) -> None:
    """The subcommand."""
    about = "find the first rewrite that makes your check fail"
    parser = command(commands, "bisect", about, _EXAMPLE, run)
    add_target(parser)
    parser.add_argument(
        "--check",
        required=True,
        metavar="module:function",
        help="called with the model and its arguments; fails by returning False or raising",
    )
    parser.add_argument(
        "--eager", action="store_true", help="run the rewritten graphs without Inductor: faster"
    )


def run(args: argparse.Namespace) -> int:
    """Search, then name the site."""
    options = options_of(args)
    target = target_of(args, runs=True)
    if target.model is None:
        raise FxpassError(f"bisect: {target.name} holds graphs without values, needs a model")
    check = function(args.check)
    reports = _planned(target, options)
    most = max((len(report.rewritten) for report in reports), default=0)

    def fails(fuel: int) -> bool:
        bad = _fails(target, dataclasses.replace(options, fuel=fuel), check, args.eager)
        print(f"{fuel} of {most} rewrites: {'fails' if bad else 'passes'}", file=sys.stderr)
        return bad

    if fails(0):
        raise FxpassError("bisect: the check fails without any rewrite; look at Inductor or at it")
    if not fails(most):
        print(f"the check passes with all {most} rewrites")
        return OK
    fuel = first_failing(fails, most)
    for report in reports:
        if len(report.rewritten) >= fuel:
            print(_culprit(fuel, report.rewritten[fuel - 1]))
    return FAILED


def first_failing(fails: Callable[[int], bool], most: int) -> int:
    """The smallest count that fails, knowing that 0 passes and `most` fails."""
    passing, failing = 0, most
    while failing - passing > 1:
        middle = (passing + failing) // 2
        if fails(middle):
            failing = middle
        else:
            passing = middle
    return failing


def _planned(target: Target, options: Options) -> list[Report]:
    with planning():
        return [pipeline.dry_run(found.graph, options) for found in target.graphs()]


def _fails(target: Target, options: Options, check: Check, eager: bool) -> bool:
    assert target.model is not None
    torch.compiler.reset()
    model = _rewritten(target.model, options) if eager else _compiled(target.model, options)
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        try:
            return check(model, *target.args, **target.kwargs) is False
        except FxpassError:
            raise
        except Exception:
            return True


def _compiled(model: Callable[..., Any], options: Options) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(
        model, backend=rmsnorm_backend, options=dataclasses.asdict(options)
    )
    return made


def _rewritten(model: Callable[..., Any], options: Options) -> Callable[..., Any]:
    """The model with its graphs rewritten and run as they are."""

    def change(graph: fx.Graph) -> None:
        pipeline.run(graph, options)

    return torch_private.through_post_grad(model, change)


def _culprit(number: int, site: RewrittenSite) -> str:
    name = site.module or f"%{site.node}"
    return (
        f"rewrite {number} makes the check fail: {name} ({site.location})\n"
        f"    {site.source}\n"
        f"    {site.variant} -> {site.kernel}; {site.numerics}\n    {site.spec}"
    )
