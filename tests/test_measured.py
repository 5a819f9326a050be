"""The order of kernels is what the committed measurements say."""

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
from kernel_cases import LLAMA, SPECS

from fxpass.kernels import kernels, measured
from fxpass.spec import NormSpec

RESULTS = Path(__file__).parents[1] / measured.SOURCE


def _ratios() -> dict[tuple[str, int], float]:
    """(variant, hidden) -> triton.row's time over cuda.row's, geometric mean over all points."""
    times: dict[tuple[object, ...], dict[str, float]] = defaultdict(dict)
    for row in json.loads(RESULTS.read_text())["results"]:
        if row["dtype"] == "bf16":
            point = tuple(row[k] for k in ("variant", "hidden", "rounding", "rows", "mode"))
            times[point][row["kernel"]] = row["us"]
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for (variant, hidden, *_), by_kernel in times.items():
        if {"cuda.row", "triton.row"} <= by_kernel.keys():
            found[variant, hidden].append(by_kernel["triton.row"] / by_kernel["cuda.row"])
    return {k: math.exp(sum(map(math.log, v)) / len(v)) for k, v in found.items()}


@pytest.mark.parametrize(("platform", "variant"), measured.TABLE)
def test_table_is_what_was_measured(platform: str, variant: str) -> None:
    ratios = _ratios()
    rows = measured.TABLE[platform, variant]
    assert [hidden for hidden, *_ in rows] == sorted(h for v, h in ratios if v == variant)
    for hidden, order, ratio in rows:
        taken = ratios[variant, hidden]
        assert order == ("cuda.row", "triton.row") if taken >= 1 else ("triton.row", "cuda.row")
        assert ratio == pytest.approx(taken, abs=0.006)


@pytest.mark.parametrize("hidden", [1, 128, 129, 4096, 65_536])
def test_measured_kernels_trade_places_and_others_stay(monkeypatch, hidden) -> None:
    spec = NormSpec.parse(LLAMA)
    names = [kernel.name for kernel in measured.ordered(kernels(), "cuda", spec, hidden)]
    assert names == [kernel.name for kernel in kernels()]  # the registry's order is the table's
    swapped = tuple(
        (most, order[::-1], ratio) for most, order, ratio in measured.TABLE["cuda", "plain"]
    )
    monkeypatch.setitem(measured.TABLE, ("cuda", "plain"), swapped)
    changed = [kernel.name for kernel in measured.ordered(kernels(), "cuda", spec, hidden)]
    first, second = names.index("cuda.row"), names.index("triton.row")
    names[first], names[second] = names[second], names[first]
    assert changed == names


def test_what_was_not_measured_stays() -> None:
    spec = NormSpec.parse(SPECS["residual"])
    for platform, hidden in (("rocm", 128), ("cpu", 128), ("cuda", None)):
        assert measured.ordered(kernels(), platform, spec, hidden) == list(kernels())
