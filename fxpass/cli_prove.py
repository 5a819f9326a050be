"""`fxpass prove`: a model's rows alone and in batches, bit by bit, and the first node to differ."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch

from fxpass import cli_rows, torch_watch
from fxpass.backend import rmsnorm_backend
from fxpass.cli_common import FAILED, OK, Commands, command, write
from fxpass.errors import FxpassError
from fxpass.invariant import prove, prove_compiled, prove_eager
from fxpass.invariant.measured import machine
from fxpass.invariant.mode import batch_invariant_mode
from fxpass.invariant.prove import KINDS, Case, Model, Proof
from fxpass.invariant.prove_compiled import Compile
from fxpass.invariant.prove_eager import Culprit
from fxpass.options import Options

_EXAMPLE = """\
  fxpass prove model.py:make
  fxpass prove model.py:make --rows 1,2,3,7,8,64,255,256,257 --json proof.json
  fxpass prove hf:llama --eager --no-mode      # what torch does by itself

exit codes: 0 no row differs; 1 rows differ; 2 something given is wrong"""

_DYNAMIC = {"auto": None, "static": False, "dynamic": True}
_MODE = {"batch_invariant": True}
_INSIDE = (
    "equal inside `with fxpass.batch_invariant_mode()`: the option reaches graphs, not what"
    " torch.compile leaves to eager code"
)


@dataclasses.dataclass
class Found:
    """A proof, and where it failed."""

    proof: Proof
    culprits: list[Culprit]


def add(commands: Commands) -> None:
    """The subcommand."""
    about = "run a model's rows alone and in batches; show the first node whose bits differ"
    parser = command(commands, "prove", about, _EXAMPLE, run)
    cli_rows.add(parser)
    how = parser.add_mutually_exclusive_group()
    for name, text in (
        ("eager", "run in eager mode only"),
        ("compiled", "run compiled only"),
        ("both", "run both ways (the default)"),
    ):
        how.add_argument(f"--{name}", dest="how", action="store_const", const=name, help=text)
    parser.add_argument(
        "--mode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in the batch-invariant mode, or as torch does it by itself",
    )
    parser.add_argument(
        "--shapes",
        choices=tuple(_DYNAMIC),
        default="auto",
        help="how to compile: auto, as torch.compile does it; static, once for each number of"
        " rows; dynamic",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - for stdout")


def run(args: argparse.Namespace) -> int:
    """Prove, then print."""
    ways = ("eager", "compiled") if args.how in (None, "both") else (args.how,)
    if "compiled" in ways and args.mode:
        Options.make(_MODE)  # refused here, in one line, rather than inside a compile
    model = cli_rows.model_of(args, cli_rows.runnable(args))
    with contextlib.redirect_stdout(sys.stderr):
        found = [proved(model, way, args.mode, args.rows, _DYNAMIC[args.shapes]) for way in ways]
    data = json.dumps(_data(args, model, found), indent=1) + "\n"
    if args.json == "-":
        sys.stdout.write(data)
    else:
        print(text(args, model, found))
        if args.json:
            write(args.json, data)
    return OK if all(one.proof.holds for one in found) else FAILED


def proved(
    model: Model, how: str, in_mode: bool, counts: tuple[int, ...], dynamic: bool | None
) -> Found:
    """The proof of one way to run, and the first node of each kind of batch that fails."""
    proof = Proof(how, in_mode)
    if how == "eager":
        with batch_invariant_mode() if in_mode else contextlib.nullcontext():
            prove.prove(model, model.model, proof, counts)
            return Found(proof, _search(proof, lambda c: prove_eager.first(model, model.model, c)))
    compile_ = _compiler(in_mode)
    torch.compiler.reset()
    prove.prove(model, compile_(model.model, dynamic), proof, counts)
    if in_mode and not proof.holds and _holds_inside(model, compile_, dynamic, counts):
        proof.notes.append(_INSIDE)
    first = lambda c: prove_compiled.first(model, compile_, dynamic, c)  # noqa: E731
    return Found(proof, _search(proof, first, most=1))


def _holds_inside(
    model: Model, compile_: Compile, dynamic: bool | None, counts: tuple[int, ...]
) -> bool:
    """Whether the rows are equal if what Dynamo leaves to eager code is in the mode as well."""
    again = Proof("compiled", True)
    torch.compiler.reset()
    try:
        with batch_invariant_mode():
            prove.prove(model, compile_(model.model, dynamic), again, counts)
    except FxpassError:  # the model raised
        return False
    return again.holds


def _search(
    proof: Proof, first: Callable[[Case], Culprit | str], most: int | None = None
) -> list[Culprit]:
    """The first node of each failing kind; in compiled code, where it takes long, of one kind."""
    culprits = []
    for case in proof.failing()[:most]:
        found = first(case)
        if isinstance(found, str):
            proof.notes.append(f"first node for {case.kind} with {case.rows} rows: {found}")
        else:
            culprits.append(found)
    return culprits


def _compiler(in_mode: bool) -> Compile:
    """What compiles a model as the user would; each with nothing kept from the last."""
    how: dict[str, Any] = {"backend": rmsnorm_backend, "options": _MODE} if in_mode else {}

    def compile_(model: Callable[..., Any], dynamic: bool | None) -> Callable[..., Any]:
        compiled = torch.compile(torch_watch.apart(model), dynamic=dynamic, **how)

        def call(*args: Any, **kwargs: Any) -> Any:
            with torch_watch.many_recompiles():
                return compiled(*args, **kwargs)

        return call

    return compile_


def _data(args: argparse.Namespace, model: Model, found: list[Found]) -> dict[str, Any]:
    device = cli_rows.device_of(model)
    return {
        "target": args.target,
        "holds": all(one.proof.holds for one in found),
        "torch": torch.__version__,
        "device": machine(device),
        "rows": list(args.rows),
        "batch_dim": args.batch_dim,
        "batch_args": model.rows.batched,
        "kinds": KINDS,
        "runs": [
            {
                "how": one.proof.how,
                "mode": one.proof.in_mode,
                "shapes": args.shapes if one.proof.how == "compiled" else None,
                "holds": one.proof.holds,
                "cases": [_case_data(case) for case in one.proof.cases],
                "first": [_culprit_data(culprit) for culprit in one.culprits],
                "notes": one.proof.notes,
            }
            for one in found
        ],
    }


def _case_data(case: Case) -> dict[str, Any]:
    return {
        "kind": case.kind,
        "rows": case.rows,
        "compared": case.compared,
        "differing": case.differing,
        "largest": _number(case.largest),
        "first_position": case.position if case.differing else None,
    }


def _culprit_data(culprit: Culprit) -> dict[str, Any]:
    return {**dataclasses.asdict(culprit), "largest": _number(culprit.largest)}


def _number(value: float) -> float | str:
    """JSON knows no infinities."""
    return value if math.isfinite(value) else str(value)


def text(args: argparse.Namespace, model: Model, found: list[Found]) -> str:
    """The proofs for people."""
    device = machine(cli_rows.device_of(model))
    names = ", ".join(model.rows.batched)
    head = f"{args.target} on {device}, torch {torch.__version__}; rows: dim {args.batch_dim} of"
    return "\n\n".join([f"{head} {names}", *(_proof(one) for one in found)])


def _proof(found: Found) -> str:
    from tabulate import tabulate

    proof = found.proof
    cells = {(case.rows, case.kind): _cell(case) for case in proof.cases}
    kinds = [kind for kind in KINDS if any(case.kind == kind for case in proof.cases)]
    rows = sorted({case.rows for case in proof.cases})
    table = [[count, *(cells.get((count, kind), "-") for kind in kinds)] for count in rows]
    compared = sum(case.compared for case in proof.cases)
    differing = sum(case.differing for case in proof.cases)
    mode = "in the batch-invariant mode" if proof.in_mode else "without the mode"
    verdict = (
        f"{differing} of {compared} rows differ" if differing else f"{compared} rows, all equal"
    )
    parts = [
        f"{proof.how}, {mode}: {verdict}",
        tabulate(table, headers=("rows", *kinds)),
        *map(_culprit, _alike(found.culprits)),
        *proof.notes,
    ]
    return "\n".join(parts)


def _cell(case: Case) -> str:
    if not case.differing:
        return "equal"
    return f"{case.differing} of {case.compared} differ ({case.largest:.1e})"


def _alike(culprits: list[Culprit]) -> list[list[Culprit]]:
    """Those of one node together."""
    groups: dict[tuple[str, str], list[Culprit]] = {}
    for culprit in culprits:
        groups.setdefault((culprit.node, culprit.where), []).append(culprit)
    return list(groups.values())


def _culprit(alike: list[Culprit]) -> str:
    culprit = alike[0]
    kinds = ", ".join(one.kind for one in alike)
    shapes = f"({', '.join(culprit.inputs)}) -> {', '.join(culprit.results)}"
    far = f"{culprit.elements} of {culprit.total} elements differ"
    if not math.isnan(culprit.largest):
        far += f", by {culprit.largest:.1e} at most"
    if culprit.follows:
        far += f"; the bits follow {culprit.follows}"
    lines = [f"first to differ ({kinds}; {culprit.rows} rows): {culprit.node}{shapes}"]
    lines += [f"{culprit.where}: {culprit.line}", far, *culprit.notes]
    return "\n    ".join(lines)
