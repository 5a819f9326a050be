"""RMSNorm on the CPU, microseconds a call: eager, F.rms_norm, Inductor, fxpass, the row kernel.

    python benchmarks/cpu_norm.py --json benchmarks/results/cpu_norm.json

All columns of a row are measured in turns within one run, so that a busy machine slows them alike;
medians. Inductor drops the rounding between the norm and the weight, and F.rms_norm has none there;
fxpass and the row kernel keep it, like eager. `ratio` is fxpass over Inductor, both through
torch.compile and so both with Dynamo's guards; `cpu.row` is the kernel called directly.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import timeit
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

import fxpass
from fxpass.kernels import cpu
from fxpass.spec import NormSpec

SHAPES = ((1, 4096), (32, 4096), (2048, 4096), (65_536, 128))
SPEC = NormSpec.parse(
    "x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32 element=mul_row:f32,cast:bf16,mul_weight:bf16"
    " weight=bf16"
)
EPS = 1e-6
TURNS = 25
TURN_S = 0.02


class LlamaRMSNorm(torch.nn.Module):
    """As Hugging Face writes it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(hidden, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise in float32, round, then scale."""
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * h.to(x.dtype)


class SameRMSNorm(LlamaRMSNorm):
    """The same module with code of its own: Dynamo looks compiled code up by code object."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise in float32, round, then scale."""
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        return self.weight * h.to(x.dtype)


def columns(hidden: int, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is compared, by name, ready to be called."""
    module = LlamaRMSNorm(hidden)
    weight = module.weight.detach()
    torch.compiler.reset()
    compiled = torch.compile(module, dynamic=False)
    same = SameRMSNorm(hidden)
    same.weight = module.weight
    rewritten = torch.compile(
        same, dynamic=False, backend=fxpass.rmsnorm_backend, options={"expect": 1}
    )
    row = cpu.entry(SPEC)
    assert (row(x, None, weight, None, EPS) != module(x)).float().mean() < 1e-3  # type: ignore[union-attr]
    return {
        "eager": lambda: module(x),
        "F.rms_norm": lambda: torch.nn.functional.rms_norm(x, (hidden,), weight, EPS),
        "inductor": lambda: compiled(x),
        "fxpass": lambda: rewritten(x),
        "cpu.row": lambda: row(x, None, weight, None, EPS),
    }


def medians(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds of each call, measured in turns."""
    counts = {}
    for name, call in calls.items():
        call()
        counts[name] = max(1, int(TURN_S / min(timeit.repeat(call, number=1, repeat=5))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            times[name].append(timeit.timeit(call, number=counts[name]) / counts[name] * 1e6)
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def measure(thread_counts: list[int]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for threads in thread_counts:
        torch.set_num_threads(threads)
        for count, hidden in SHAPES:
            x = torch.randn(count, hidden, dtype=torch.bfloat16)
            with torch.no_grad():
                found = medians(columns(hidden, x))
            ratio = {"ratio": round(found["fxpass"] / found["inductor"], 3)}
            rows.append({"threads": threads, "rows": count, "hidden": hidden, **found, **ratio})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = measure(given.threads)
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    if given.json:
        about = {
            "unit": "microseconds, median",
            "dtype": "bfloat16",
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }
        given.json.write_text(json.dumps({**about, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
