"""`fxpass kernels` and `fxpass doctor`: what this machine has, without any model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence

from fxpass import doctor, platforms, tables
from fxpass.cli_common import FAILED, OK, Commands, command
from fxpass.dtypes import short
from fxpass.kernels import Kernel, kernels
from fxpass.options import PLATFORMS, Options
from fxpass.platforms import Platform
from fxpass.select import candidates
from fxpass.spec import NormSpec

_KERNELS = """\
  fxpass kernels
  fxpass kernels --platform rocm:gfx942"""
_DOCTOR = """\
  fxpass doctor
  fxpass doctor --strict || echo "something here changes results"
"""


def add(commands: Commands) -> None:
    """Both subcommands."""
    about = "list the kernels: what each needs and promises"
    parser = command(commands, "kernels", about, _KERNELS, run_kernels)
    parser.add_argument("--platform", help=f"only kernels for one of: {', '.join(PLATFORMS)}")
    parser.add_argument("--json", action="store_true", help="print the contracts as JSON")
    about = "examine this machine: versions, providers, caches, hooks, overrides, eps, literals"
    parser = command(commands, "doctor", about, _DOCTOR, run_doctor)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a warning")


def run_kernels(args: argparse.Namespace) -> int:
    """Print the contracts."""
    options = Options.make({"platform": args.platform} if args.platform else None)
    kind = (options.platform or "").partition(":")[0]
    fits = [k for k in kernels() if not kind or {kind, "any"} & set(k.contract.platforms)]
    if args.json:
        print(json.dumps([_contract(kernel) for kernel in fits], indent=2, default=str))
    else:
        print(tables.kernel_rows(fits, "simple").replace("`", " "))
        if options.platform is not None:
            print("\n".join(["", *_order(fits, platforms.named(options.platform))]))
    return OK


def _order(fits: Sequence[Kernel], place: Platform) -> Iterator[str]:
    """Who is asked first on a platform, and who only if named."""
    own = [kernel for kernel in candidates(Options(), place.kind) if kernel in fits]
    yield f"auto on {place} asks in this order: {', '.join(kernel.name for kernel in own)}"
    for kernel in fits:
        if kernel not in own:
            yield f"{kernel.name}: only if named in providers"
        for reason, dtypes in _inexact(kernel, place.arch).items():
            yield f"{kernel.name}: {', '.join(dtypes)} only if named in providers: {reason}"


def _inexact(kernel: Kernel, arch: str) -> dict[str, list[str]]:
    """Reasons why `auto` leaves a kernel out, with the dtypes of x that they are about."""
    found: dict[str, list[str]] = {}
    for name in map(short, kernel.contract.x):
        text = f"x={name} row=mean:f32,rsqrt:f32 element=mul_row:f32,cast:{name}"
        reason = kernel.inexact(NormSpec.parse(text), arch)
        if reason is not None:
            found.setdefault(reason, []).append(name)
    return found


def _contract(kernel: Kernel) -> dict[str, object]:
    return {"name": kernel.name, **dataclasses.asdict(kernel.contract)}


def run_doctor(args: argparse.Namespace) -> int:
    """Print the findings by topic, warnings marked."""
    findings = doctor.examine()
    if args.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        topic = ""
        for finding in findings:
            if finding.topic != topic:
                print(finding.topic)
                topic = finding.topic
            print(f"  {'! ' if finding.warning else ''}{finding.text}")
    warned = any(finding.warning for finding in findings)
    return FAILED if args.strict and warned else OK
