"""What the subcommands share: the TARGET and its options, and where their output goes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fxpass import torch_private
from fxpass.errors import FxpassError
from fxpass.options import ROUNDINGS, Options, names
from fxpass.select import check_providers
from fxpass.target import Target, load

Run = Callable[[argparse.Namespace], int]
Commands = Any
"""What argparse's `add_subparsers` returns, which has no public type."""

OK, FAILED, WRONG = 0, 1, 2
"""Exit codes: all is well; a check failed; the command, a file or the target is wrong."""


def command(commands: Commands, name: str, about: str, example: str, run: Run) -> Any:
    """A subcommand whose help ends in an example."""
    parser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog="example:\n" + example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback", action="store_true", help="show the whole traceback of an error"
    )
    parser.set_defaults(run=run)
    return parser


def add_target(parser: argparse.ArgumentParser) -> None:
    """The TARGET argument and how to plan for it."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="module:callable or file.py:callable that returns (model, args[, kwargs]);"
        " hf:TYPE or hf:config.json, with @full for its full size; a .pt2 of torch.export;"
        " a folder written with TORCH_COMPILE_DEBUG or TORCH_TRACE",
    )
    parser.add_argument(
        "--fake", action="store_true", help="build the model without memory, and without its GPU"
    )
    parser.add_argument(
        "--train", action="store_true", help="plan the forward of a training step, with gradients"
    )
    add_platform(parser)
    parser.add_argument("--providers", help="providers in order of preference, as cpu,reference")
    parser.add_argument("--rounding", choices=ROUNDINGS, help="override the model's rounding order")


def add_platform(parser: argparse.ArgumentParser) -> None:
    """`--platform`, where the options know it."""
    if "platform" in names():
        parser.add_argument(
            "--platform", help="plan for hardware that is not here: cuda:sm_90, rocm:gfx942 or cpu"
        )


def options_of(args: argparse.Namespace, **changes: Any) -> Options:
    """The options given on the command line, over those of the environment."""
    given = {name: getattr(args, name, None) for name in ("platform", "providers", "rounding")}
    options = Options.make({name: v for name, v in given.items() if v is not None}, **changes)
    check_providers(options)
    return options


def target_of(args: argparse.Namespace, runs: bool = False) -> Target:
    """The TARGET, with what its code prints kept out of our output. `runs`: it must have memory."""
    if runs and args.fake:
        raise FxpassError(f"{args.command}: runs the model, so --fake cannot be used")
    if runs and args.train:
        raise FxpassError(f"{args.command}: runs the model without gradients, so without --train")
    with contextlib.redirect_stdout(sys.stderr):
        return load(args.target, fake=False if runs else (args.fake or None))


@contextlib.contextmanager
def planning() -> Iterator[None]:
    """As Inductor would plan: its own code is a provider, and nothing else prints to stdout."""
    with contextlib.redirect_stdout(sys.stderr), torch_private.inside_inductor():
        yield


def write(path: str, text: str) -> None:
    """A file the user named. Raises FxpassError if it cannot be written."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FxpassError(f"cannot write {path}: {error.strerror}") from error


def read(path: str) -> str:
    """A file the user named. Raises FxpassError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FxpassError(f"cannot read {path}: {getattr(error, 'strerror', error)}") from error
