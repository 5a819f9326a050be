"""Draws the norm benchmark: time over a copy of the same bytes, by rows, a panel per hidden.

python benchmarks/plot_norm.py build/bench/norm.json norm.svg [--variant residual]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpu_cases import CAST_FIRST
from gpu_summary import NAMED_HERE

STYLES = {
    "cuda.row": ("#000000", "o", "-", 2.0),
    "triton.row": ("#1f5fbf", "s", "-", 2.0),
    "named": ("#7a7a7a", "x", ":", 1.2),
    "liger": ("#d98200", "^", "--", 1.2),
    "inductor": ("#b03060", "v", "-.", 1.2),
    "inductor_epc": ("#5c9e4a", "D", "-.", 1.2),
    "F.rms_norm": ("#a0a0a0", "+", "--", 1.0),
}
"""Colour, marker, line and width; markers and lines differ, so that it reads in grey."""
LABELS = {"named": "fastest of FlashInfer, quack, SGLang"}
TOP = 4.0
"""Upper end of the axis: what is slower leaves the panel."""


def series(record: dict[str, Any], variant: str, hidden: int) -> dict[str, dict[int, float]]:
    """Time over the copy's, by column and rows; hot where the point was measured hot."""
    found: dict[str, dict[int, float]] = {}
    wanted = (variant, CAST_FIRST, "bf16", hidden)
    rows = [
        r
        for r in record["results"]
        if (r["variant"], r["rounding"], r["dtype"], r["hidden"]) == wanted
    ]
    hot = {r["rows"] for r in rows if r["mode"] == "hot"}
    for row in rows:
        if row["mode"] == "cold" and row["rows"] in hot:
            continue
        name = "named" if row["kernel"] in NAMED_HERE else row["kernel"]
        if name in STYLES:
            column, over = found.setdefault(name, {}), 1 / row["of_copy"]
            column[row["rows"]] = min(over, column.get(row["rows"], over))
    return found


def draw(record: dict[str, Any], target: Path, variant: str = "plain") -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.fonttype"] = "none"
    lengths = sorted({r["hidden"] for r in record["results"] if r["variant"] == variant})
    across = min(3, len(lengths)) or 1
    down = max(1, -(-len(lengths) // across))
    figure, grid = plt.subplots(
        down, across, figsize=(3.6 * across, 2.6 * down), sharey=True, squeeze=False
    )
    handles: dict[str, Any] = {}
    for panel, hidden in zip(grid.flat, lengths, strict=False):
        for name, (colour, marker, line, width) in STYLES.items():
            points = sorted(series(record, variant, hidden).get(name, {}).items())
            if points:
                (handles[LABELS.get(name, name)],) = panel.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle=line,
                    linewidth=width,
                    markersize=4,
                )
        panel.axhline(1, color="black", linewidth=0.6)
        panel.set(xscale="log", ylim=(0.7, TOP), title=f"hidden {hidden}")
        panel.grid(axis="y", linewidth=0.3)
    for panel in [*grid.flat][len(lengths) :]:
        panel.axis("off")
    for panel in grid[:, 0]:
        panel.set_ylabel("time / copy")
    for panel in grid[-1]:
        panel.set_xlabel("rows")
    title = "with residual add" if variant == "residual" else variant
    figure.suptitle(f"RMSNorm, bf16, {title}: {record['gpu']}, torch {record['torch']}")
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 0.98))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("picture", type=Path, help=".svg or .png")
    parser.add_argument("--variant", choices=("plain", "residual", "qk"), default="plain")
    given = parser.parse_args()
    draw(json.loads(given.json.read_text()), given.picture, given.variant)


if __name__ == "__main__":
    main()
