"""`fxpass kernels` and `fxpass doctor`: what this machine has, without any model."""

from __future__ import annotations

import argparse
import dataclasses
import json

from fxpass import doctor, tables
from fxpass.cli_common import FAILED, OK, Commands, command
from fxpass.kernels import Kernel, kernels
from fxpass.options import PLATFORMS, Options

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
    return OK


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
