"""The short table of the norm benchmark: our kernels against the fastest of the others.

"this run" is what was measured beside ours; "named" are the times of `results/h200_peers.csv`, of
another run, each multiplied by how the copy of the same bytes compares between the two runs. A
number above 1 says how many times faster ours is. "same" counts only those that round as the
eager code does.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu_cases import CAST_FIRST, Case
from tabulate import tabulate

NAMED = Path(__file__).parent / "results" / "h200_peers.csv"
BIG = 64_000_000
"""Bytes from which the share of the ceiling is given: nothing but bandwidth counts there."""
BANDS = (("1-64", 1, 64), ("512-2048", 512, 2048), ("8192-", 8192, 1 << 40))
SAME_SHARE = 0.999
"""Least share of elements equal to eager's for the same rounding; another one has about 0.74."""
NAMED_HERE = ("flashinfer", "quack", "sgl")
COMPARED = ("F.rms_norm", "inductor", "inductor_epc", "liger", *NAMED_HERE)
OTHERS = (*COMPARED, "copy", "eager_hf")
NAMED_SAME = {
    (CAST_FIRST, "plain"): {"liger", "sgl_hf", "inductor_epc"},
    (CAST_FIRST, "qk"): {"liger", "sgl_hf", "inductor_epc"},
    (CAST_FIRST, "residual"): {"liger", "inductor_epc"},
}
"""By `Numerics` of that run. Rounding once: see ONCE, and with a residual ONCE_ADDED."""
ONCE = {"F.rms_norm", "inductor", "sgl", "sgl_qknorm", "vllm", "vllm_bi", "triton_bi", "quack"} | {
    "fi_cuda",
    "fi_cuda_pdl",
    "fi_cute_pdl",
}
ONCE_ADDED = {"F.rms_norm", "vllm", "vllm_bi", "triton_bi"}

Point = tuple[Any, ...]
"""variant, dtype, rows, hidden, mode."""


class Times:
    """Microseconds by point and column, of one rounding order."""

    def __init__(self, rounding: str, rows: Iterable[dict[str, Any]]) -> None:
        self.rounding = rounding
        self.us: dict[Point, dict[str, float]] = {}
        self.equal: dict[tuple[Point, str], float] = {}
        for row in rows:
            point = (row["variant"], row["dtype"], row["rows"], row["hidden"], row["mode"])
            self.us.setdefault(point, {})[row["kernel"]] = row["us"]
            if row["eq_eager"] is not None:
                self.equal[point, row["kernel"]] = row["eq_eager"]
        self.own = [name for name in _names(self.us) if name not in OTHERS]

    def fastest(self, point: Point, same: bool) -> float | None:
        """The fastest of the others in this run; None where they were not all measured."""
        found = self.us[point]
        if not any(name.startswith("inductor") or name in NAMED_HERE for name in found):
            return None
        fitting = [
            us
            for name, us in found.items()
            if name in COMPARED and (not same or self.equal[point, name] >= SAME_SHARE)
        ]
        return min(fitting, default=None)

    def fastest_named(self, named: dict[Point, dict[str, float]], point: Point, same: bool) -> Any:
        """The fastest of the named ones, corrected by the copies of the two runs."""
        then = named.get(point)
        if then is None:
            return None
        variant = point[0]
        once = ONCE_ADDED if variant == "residual" else ONCE
        fitting = NAMED_SAME.get((self.rounding, variant), once)
        times = [u for name, u in then.items() if name != "copy" and (not same or name in fitting)]
        return min(times) * self.us[point]["copy"] / then["copy"] if times else None


def _names(table: dict[Point, dict[str, float]]) -> list[str]:
    return sorted({name for found in table.values() for name in found})


def named_times() -> dict[Point, dict[str, float]]:
    """What others were measured at in another run."""
    found: dict[Point, dict[str, float]] = {}
    with NAMED.open() as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            point = (row["variant"], row["dtype"], int(row["rows"]), int(row["hidden"]))
            found.setdefault((*point, row["mode"]), {})[row["peer"]] = float(row["us"])
    return found


def geometric(values: Sequence[float]) -> float | None:
    """Geometric mean, None of nothing."""
    return statistics.geometric_mean(values) if values else None


def _moved(point: Point) -> int:
    variant, dtype, rows, hidden, _ = point
    return Case(variant, CAST_FIRST, dtype, rows, hidden).moved


def _lowest(ratios: dict[Point, float]) -> str:
    if not ratios:
        return "-"
    point = min(ratios, key=lambda at: ratios[at])
    return f"{ratios[point]:.2f} at {point[2]}x{point[3]} {point[4]}"


def _line(times: Times, named: dict[Point, Any], name: str, points: list[Point]) -> dict[str, Any]:
    """The numbers of one kernel over some points."""

    def ratios(best: Any) -> dict[Point, float]:
        pairs = {point: best(point) for point in points}
        return {p: us / times.us[p][name] for p, us in pairs.items() if us is not None}

    run = ratios(lambda p: times.fastest(p, same=False))
    same = ratios(lambda p: times.fastest(p, same=True))
    others = ratios(lambda p: times.fastest_named(named, p, same=False))
    others_same = ratios(lambda p: times.fastest_named(named, p, same=True))
    big = [times.us[p]["copy"] / times.us[p][name] for p in points if _moved(p) >= BIG]
    return {
        "this run": geometric([*run.values()]),
        "least": _lowest(run),
        "same": geometric([*same.values()]),
        "named": geometric([*others.values()]),
        "least ": _lowest(others),
        "same ": geometric([*others_same.values()]),
        "n": f"{len(run)}, {len(others)}",
        "of copy, big": geometric(big),
    }


def summary(record: dict[str, Any]) -> str:
    """The tables, and what was not measured."""
    named = named_times()
    lines = []
    kinds = dict.fromkeys((r["variant"], r["rounding"], r["dtype"]) for r in record["results"])
    for variant, rounding, dtype in kinds:
        kind = (variant, rounding, dtype)
        rows = [r for r in record["results"] if (r["variant"], r["rounding"], r["dtype"]) == kind]
        times = Times(rounding, rows)
        for name in times.own:
            for band, least, most in BANDS:
                points = [p for p, t in times.us.items() if least <= p[2] <= most and name in t]
                if points:
                    label = f"{variant} {rounding}" + f" {dtype}" * (dtype != "bf16")
                    line = _line(times, named, name, points)
                    lines.append({"norm": label, "kernel": name, "rows": band, **line})
    about = ", ".join(
        f"{key} {record[key]}" for key in ("gpu", "torch", "triton", "commit", "date")
    )
    problems = [f"! {what}: {why}" for what, why in record.get("not_measured", {}).items()]
    more = [f"! and {len(problems) - 12} more in the JSON file"] if len(problems) > 12 else []
    cut = [f"! cut: {record['cut']}"] if "cut" in record else []
    table = tabulate(lines, headers="keys", floatfmt=".2f", missingval="-")
    explained = (
        "Times faster than the fastest of the others (geometric mean, least); same: of those that"
        " round alike. n: points."
    )
    return "\n".join([about, explained, table, *problems[:12], *more, *cut])
