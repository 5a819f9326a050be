"""The command line: `fxpass` and `python -m fxpass`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence

from fxpass import (
    __version__,
    cli_audit,
    cli_bisect,
    cli_corpus,
    cli_diff,
    cli_explain,
    cli_machine,
    cli_prove,
)
from fxpass.cli_common import WRONG
from fxpass.errors import FxpassError

_ABOUT = "Find every RMSNorm of a model, show what a rewrite changes and what it leaves, and why."
_COMMANDS = (cli_explain, cli_diff, cli_bisect, cli_corpus, cli_machine, cli_prove, cli_audit)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit code. Errors are one line, and exit code 2."""
    try:
        args = parser().parse_args(argv)
    except SystemExit as stop:  # argparse has said what it had to say
        return int(stop.code or 0)
    with _quiet(args.traceback):
        try:
            code: int = args.run(args)
            sys.stdout.flush()
            return code
        except FxpassError as error:
            if args.traceback:
                traceback.print_exc()
            print(f"fxpass: {error}", file=sys.stderr)
            return WRONG
        except BrokenPipeError:  # `fxpass ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except KeyboardInterrupt:
            return 130


def parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    made = argparse.ArgumentParser(prog="fxpass", description=_ABOUT)
    made.add_argument("--version", action="version", version=f"fxpass {__version__}")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in _COMMANDS:
        module.add(commands)
    return made


@contextlib.contextmanager
def _quiet(loud: bool) -> Iterator[None]:
    """No warnings and logs of torch, which would bury the one line that matters."""
    if loud:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
