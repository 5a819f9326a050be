"""Do rows of a model depend on their batch, over every model type of transformers and diffusers?

    python benchmarks/invariant_coverage.py              all transformers types, resumable
    python benchmarks/invariant_coverage.py --diffusers  diffusers transformer classes
    python benchmarks/invariant_coverage.py --only qwen3_next,vit --again --compile

Every type is built tiny with random weights (nothing is downloaded) and run in batch-invariant mode
on the CPU: five samples together, then single ones and two. `differ` counts the outputs of which a
row has other bits, `differ_plain` those without the mode; `operators` names what reached a kernel
whose rows are not known to be invariant. Left out are types without a batch (packed patches) and
those that draw random numbers. Results go to benchmarks/results/invariant_<library>.json.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import each_type
import torch
from each_type import RESULTS
from tabulate import tabulate
from zoo import hf

import fxpass
from fxpass.invariant.recorder import Recorder

BATCH = 5
PARTS = (slice(0, 1), slice(4, 5), slice(2, 4))
Call = Callable[..., Any]


def main() -> int:
    parser = each_type.arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="compiled, not eager")
    parser.add_argument("--dtype", default="float32", help="of weights and inputs")
    args = parser.parse_args()
    how = "invariant_compiled" if args.compile else "invariant"
    path = args.out or RESULTS / f"{how}_{each_type.library(args)}.json"
    shown = each_type.run(each_type.names(args), path, args, probe, _line, _total, _warm_up)
    print(_table(shown))
    return 1 if any(result.get("differ") for result in shown.values()) else 0


def _warm_up() -> None:
    torch._inductor.config.compile_threads = 1
    with torch.no_grad(), fxpass.batch_invariant_mode():
        torch.randn(2, 8) @ torch.randn(8, 8)


def probe(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build, run whole and in parts, compare: the record of one model type."""
    stage = "build-failed"
    try:
        built = each_type.build(name, args, batch=BATCH, dtype=getattr(torch, args.dtype))
        if not any(map(_has_rows, built.inputs.values())):
            return {"status": "no-batch"}
        stage = "plain-failed"
        plain = _outputs(built.model, built.inputs)
        if _are_random(built.model, built.inputs, plain):
            return {"status": "random"}
        differ_plain = _differing(built.model, built.inputs, plain)
        stage = "mode-failed"
        torch._dynamo.reset()
        found = _compiled(built) if args.compile else _eager(built)
    except Exception as error:
        return {"status": stage, "error": each_type.error(error)}
    return {"status": "ok", "outputs": len(plain), "differ_plain": differ_plain, **found}


def _eager(built: hf.Built) -> dict[str, Any]:
    with fxpass.batch_invariant_mode():
        with torch.no_grad(), Recorder() as recorder:
            built.model(**built.inputs)
        whole = _outputs(built.model, built.inputs)
        differ = _differing(built.model, built.inputs, whole)
    unknown = Counter(f"{u.operator}: {u.reason}" for u in recorder.unknown)
    return {"differ": differ, "operators": dict(unknown)}


def _compiled(built: hf.Built) -> dict[str, Any]:
    fxpass.reset_report()
    options = {"batch_invariant": True, "strict": True}
    call = torch.compile(built.model, backend=fxpass.rmsnorm_backend, options=options)
    whole = _outputs(call, built.inputs)
    differ = _differing(call, built.inputs, whole)
    return {"differ": differ, "calls": dict(fxpass.last_report().invariant), "operators": {}}


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == BATCH


def _outputs(call: Call, inputs: dict[str, Any], seed: int = 0) -> list[torch.Tensor]:
    """The floating-point tensors a call returns, caches left out."""
    torch.manual_seed(seed)
    with torch.no_grad():
        made = call(**inputs)
    leaves = torch.utils._pytree.tree_leaves(dict(made) if hasattr(made, "items") else made)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point()]


def _are_random(call: Call, inputs: dict[str, Any], whole: list[torch.Tensor]) -> bool:
    again = _outputs(call, inputs, seed=1)
    return any(not _same(one, other) for one, other in zip(whole, again, strict=True))


def _differing(call: Call, inputs: dict[str, Any], whole: list[torch.Tensor]) -> int:
    """How many outputs have a row with other bits in a smaller batch."""
    differing = set()
    for part in PARTS:
        some = {key: value[part] if _has_rows(value) else value for key, value in inputs.items()}
        made = _outputs(call, some)
        for index, (one, all_rows) in enumerate(zip(made, whole, strict=True)):
            if _has_rows(all_rows) and not _same(one, all_rows[part]):
                differing.add(index)
    return len(differing)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    equal = one.shape == other.shape and ((one == other) | (one.isnan() & other.isnan())).all()
    return bool(equal)


def _line(result: dict[str, Any]) -> str:
    unknown = ", ".join(result["operators"])
    return (
        f"{result['differ']} of {result['outputs']} outputs differ,"
        f" {result['differ_plain']} without the mode ({result['seconds']} s) {unknown}"
    )


def _total(results: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "types": len(results),
        "differ": sum(result["differ"] > 0 for result in results),
        "differ_plain": sum(result["differ_plain"] > 0 for result in results),
        "unknown_operators": sum(bool(result["operators"]) for result in results),
    }


def _table(results: dict[str, Any]) -> str:
    ok = {name: result for name, result in results.items() if result["status"] == "ok"}
    rows = [
        (name, result["outputs"], result["differ"], result["differ_plain"], *result["operators"])
        for name, result in sorted(ok.items())
        if result["differ"] or result["operators"]
    ]
    shown = tabulate(rows, ("type", "outputs", "differ", "without the mode", "not known"))
    return f"{shown}\n{_total(list(ok.values()))}\n{each_type.statuses(results)}"


if __name__ == "__main__":
    sys.exit(main())
