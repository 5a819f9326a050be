"""Host time of one call, microseconds: what Python and the driver take before the GPU has to wait.

    python benchmarks/host.py --out build/bench            # about 40 s on an H200
    python benchmarks/host.py --device cpu --tiny          # does the script run? not a benchmark

Shapes are those of decode steps, small enough that the device keeps up. `ours` and `torch` call the
same meaning; `new` is a call of ours whose shapes are new, of a kernel that is already compiled (a
cache that grows by a token). Best of seven loops, since other processes only add.

In compiled code a norm's time is what it adds to a chain of products, and `torch` is Inductor's own
norm there: what a rewrite costs the host of a model that runs without CUDA graphs.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu_cases import cast_then_scale
from gpu_timing import Recorder, add_arguments, header, warm_up
from tabulate import tabulate

import fxpass
from fxpass.kernels import by_name
from fxpass.kernels.invariant import dispatch
from fxpass.spec import NormSpec

Tensor = torch.Tensor
LLAMA = (
    "x=bf16 row=mean:f32,add_eps:f32,rsqrt:f32"
    " element=mul_row:f32,cast:bf16,mul_weight:bf16 weight=bf16"
)
CACHE = 2048
CHAIN = 16
"""Norms in a chain."""
FIRST_NEW = 600
"""Keys of the first step of a growing cache; the next ones are not multiples of 16."""


class Case(NamedTuple):
    """One operation, twice."""

    name: str
    ours: Callable[[], Any]
    torch: Callable[[], Any]
    new: Callable[[int], Any] | None = None


def cases(device: str) -> Iterator[Case]:
    """What is measured."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    for name, rows, k, n in (
        ("product 1 x 64 x 4096", 1, 64, 4096),
        ("product 1 x 4096 x 1024, split", 1, 4096, 1024),
        ("product 64 x 64 x 4096, descriptors", 64, 64, 4096),
    ):
        a, b = randn(rows, k), randn(n, k).t()
        yield Case(name, lambda a=a, b=b: dispatch.matmul(a, b), lambda a=a, b=b: torch.mm(a, b))
    q, cache, mask = randn(1, 32, 1, 128), randn(1, 8, CACHE, 128), randn(1, 1, 1, CACHE) > -2
    sdpa = torch.nn.functional.scaled_dot_product_attention
    yield Case(
        "attention of one token, 8 of 32 heads, mask",
        lambda: dispatch.attention(q, cache, cache, mask, causal=False, scale=None),
        lambda: sdpa(q, cache, cache, attn_mask=mask, enable_gqa=True),
        lambda i: dispatch.attention(
            q, cache[:, :, :i], cache[:, :, :i], None, causal=False, scale=None
        ),
    )
    x, weight = randn(1, 4096), randn(4096)
    yield Case("mean", lambda: dispatch.row_mean(x, dtype=x.dtype), lambda: x.mean(-1))
    yield Case(
        "softmax",
        lambda: dispatch.row_softmax(x, dtype=x.dtype, log=False),
        lambda: x.softmax(-1),
    )
    for kernel in ("cuda.row", "triton.row") if device == "cuda" else ("cpu.row",):
        entry = by_name(kernel).entry(NormSpec.parse(LLAMA))
        yield Case(
            f"norm, {kernel}",
            lambda entry=entry: entry(x, None, weight, None, 1e-6),
            lambda: torch.nn.functional.rms_norm(x, (4096,), weight, 1e-6),
        )


def products_alone(x: Tensor, residual: Tensor | None, weight: Tensor, b: Tensor) -> object:
    """What surrounds the norms."""
    for _ in range(CHAIN):
        x = x @ b
    return x


def norms(x: Tensor, residual: Tensor | None, weight: Tensor, b: Tensor) -> object:
    """A norm before each product; of the sum that goes on, if there is a residual."""
    for _ in range(CHAIN):
        made: Any = cast_then_scale(x, residual, weight)
        out, residual = (made, None) if residual is None else made
        x = out @ b
    return x if residual is None else x + residual


def in_compiled_code(device: str, calls: int) -> Iterator[dict[str, Any]]:
    """A row for each of our kernels and each kind of norm."""
    of_device = {"device": device, "dtype": torch.bfloat16}
    x, added = (torch.randn(8, 1024, **of_device) for _ in range(2))
    weights = (torch.randn(1024, **of_device), torch.randn(1024, 1024, **of_device))

    def whole_us(chain: Callable[..., object], residual: Tensor | None, **how: Any) -> float:
        torch.compiler.reset()
        compiled = torch.compile(chain, fullgraph=True, **how)
        for _ in range(20):
            compiled(x, residual, *weights)
        return best_us(lambda: compiled(x, residual, *weights), device, max(calls // CHAIN, 2))

    alone = whole_us(products_alone, None)
    for label, residual in (("norm", None), ("add and norm", added)):
        own = whole_us(norms, residual) - alone
        for provider in ("cuda", "triton") if device == "cuda" else ("cpu",):
            options = {"providers": (provider,), "expect": CHAIN}
            how = {"backend": fxpass.rmsnorm_backend, "options": options}
            ours = whole_us(norms, residual, **how) - alone
            yield {
                "name": f"{label} in compiled code, {provider}.row",
                "ours_us": round(ours / CHAIN, 2),
                "torch_us": round(own / CHAIN, 2),
                "new_us": None,
            }


def best_us(call: Callable[[], Any], device: str, calls: int) -> float:
    """The best mean of several loops."""
    found = []
    for _ in range(7):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls * 1e6)
    return round(min(found), 2)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measured(case: Case, device: str, calls: int) -> dict[str, Any]:
    """One row."""
    for call in (case.ours, case.torch):
        for _ in range(20):
            call()
    row = {"name": case.name, "ours_us": best_us(case.ours, device, calls)}
    row["torch_us"] = best_us(case.torch, device, calls)
    row["new_us"] = None
    if case.new is not None:
        steps = itertools.count(FIRST_NEW + 1)
        for _ in range(2 * 16):  # both kinds of length have a kernel then
            case.new(next(steps))
        steps = (step for step in steps if step % 16)
        row["new_us"] = best_us(lambda: case.new(next(steps)), device, calls // 10)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser, 30)
    args = parser.parse_args()
    warm_up(args.device)
    recorder = Recorder(args.out, "host", header(args))
    for case in cases(args.device):
        recorder.add([measured(case, args.device, 20 if args.tiny else 300)])
    for row in in_compiled_code(args.device, 20 if args.tiny else 300):
        recorder.add([row])
    recorder.save()
    print(tabulate(recorder.rows, headers="keys", missingval="-"))


if __name__ == "__main__":
    main()
