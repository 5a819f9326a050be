"""What `prove` and `audit` share: a TARGET that runs, and which of its arguments have rows."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

import torch

from fxpass import torch_private, torch_watch
from fxpass.errors import FxpassError
from fxpass.invariant import prove
from fxpass.invariant.prove import Model
from fxpass.target import Target, load


def add(parser: Any) -> None:
    """The options that say what to run, where, and how many rows of it."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="module:callable or file.py:callable that returns (model, args[, kwargs]);"
        " hf:TYPE or hf:config.json, with @full for its full size",
    )
    parser.add_argument(
        "--rows",
        type=_counts,
        default=prove.ROWS,
        metavar="N,N,...",
        help=f"numbers of rows (default {','.join(map(str, prove.ROWS))})",
    )
    parser.add_argument(
        "--batch-dim", type=int, default=0, metavar="D", help="the dim rows are in (default 0)"
    )
    parser.add_argument(
        "--batch-args",
        metavar="A,A,...",
        help="arguments with rows, by position or keyword (default: all whose size there is that"
        " of the first)",
    )
    parser.add_argument("--device", help="move the model and its arguments there: cuda, cuda:1")


def _counts(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: needs numbers above 0, as 1,2,64")
    return tuple(sorted({int(part) for part in parts}))


def runnable(args: argparse.Namespace) -> Target:
    """The TARGET with memory, on the device asked for. Raises FxpassError if it cannot run."""
    with contextlib.redirect_stdout(sys.stderr):
        target = load(args.target, fake=False)
    if target.model is None:
        raise FxpassError(
            f"{args.command}: {target.name} holds graphs without values, needs a model"
        )
    return target if args.device is None else moved(target, args.device)


def moved(target: Target, name: str) -> Target:
    """A target on another device. Raises FxpassError if there is none."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FxpassError(f"--device {name}: {reason}") from error
    model: Any = target.model
    leaves, spec = torch_watch.flattened((target.args, target.kwargs))
    there = [leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    made, kwargs = torch_private.unflattened(there, spec)
    if isinstance(model, torch.nn.Module):
        model = model.to(device)
    return Target(target.name, model, made, kwargs)


def model_of(args: argparse.Namespace, target: Target) -> Model:
    """The target's model, with the rows of its arguments."""
    assert target.model is not None
    named = args.batch_args.split(",") if args.batch_args else None
    with contextlib.redirect_stdout(sys.stderr):
        return prove.model_of(
            target.name, target.model, target.args, target.kwargs, args.batch_dim, named
        )


def device_of(model: Model) -> torch.device:
    """Where the rows are."""
    return next(iter(model.rows.pool.values())).device
