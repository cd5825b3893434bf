"""The figures with a goal: the last table of a run, and the README's."""

from __future__ import annotations

from typing import Any, NamedTuple

from bench.gpu import layer
from bench.gpu.moments import times
from bench.harness.results import Rows

SLOWER = 0.97  # below this share of our time, another way is faster than noise explains


class Figure(NamedTuple):
    """A line of the table: the section it is from, what it says, what was found, the goal, and whether it is met."""

    section: str
    what: str
    found: str
    goal: str
    met: bool


def figures(sections: dict[str, Rows], peak: float) -> list[Figure]:
    """What was measured, in order; nothing of what was not."""
    found = [
        Figure(
            "checks",
            f"tests: {row['passed']} passed, {row['skipped']} skipped" + ", cut off" * bool(row["unfinished"]),
            f"{row['failed']} failed",
            "0",
            not row["failed"] and not row["unfinished"],
        )
        for row in sections.get("checks", {}).values()
    ]
    found += _layer(sections.get("layer", {}), peak)
    found += _moments(sections.get("moments", {}), peak)
    return found + _jobs(sections.get("jobs", {}))


def _layer(rows: Rows, peak: float) -> list[Figure]:
    engine = layer.ours(rows)
    if engine is None:
        return []
    ours = layer.total(engine)
    share = sum(layer.ideal(rows, peak).values()) / ours
    found = [Figure("layer", f"{ours:.0f} ms, of the ideal", f"{share:.0%}", "60%", share >= 0.6)]
    schedules = [name for name in (layer.OFFICIAL, layer.FUSIONEVAL) if name in rows]
    return found + [_ratio("layer", name, layer.total(rows[name]) / ours) for name in schedules]


def _ratio(section: str, other: str, ratio: float) -> Figure:
    return Figure(section, f"{other}, by ours", f"{ratio:.1f}x", "10x", ratio >= 10)


def _moments(rows: Rows, peak: float) -> list[Figure]:
    found = []
    # q, k, v and gate, up share their inputs' sums; o; down: three products of one shape and one of another
    parts = [(count, rows.get(f"bfloat16 {d} 4096 16384")) for count, d in ((3, 4096), (1, 14336))]
    if all(row is not None for _, row in parts):
        spent = sum(count * row["ms"]["taken"] for count, row in parts if row)
        flops = sum(count * row["flops"] for count, row in parts if row)
        share = flops / spent * 1e-9 / peak
        found.append(Figure("moments", "of a Llama-8B layer at 16k, of the peak", f"{share:.0%}", "85%", share >= 0.85))
    halves = [row for row in rows.values() if row["dtype"] == "bfloat16"]
    if halves:
        ratios = [min(filter(None, (times(row, way) for way in ("torch", "squares")))) for row in halves]
        slower = sum(ratio < SLOWER for ratio in ratios)
        text = f"{min(ratios):.2f}x, {slower} of {len(ratios)} slower"
        found.append(Figure("moments", "cuBLAS's time by ours, the least", text, "1x", not slower))
    errors = [row["error"] for row in rows.values() if row["dtype"] == "float32" and "error" in row]
    if errors:
        text = f"{max(errors):.0e}"
        found.append(Figure("moments", "float32: largest error", text, "2e-05", max(errors) <= 2e-5))
    return found


def _jobs(rows: Rows) -> list[Figure]:
    found = []
    if large := rows.get("llama-8b"):
        seconds, memory = large["seconds"], large.get("peak_device_gib", 0)
        found.append(Figure("jobs", "llama-8b: seconds", f"{seconds:.3g}", "120", seconds <= 120))
        found.append(Figure("jobs", "llama-8b: GPU GiB", f"{memory:.2f}", "8", memory <= 8))
    for name, row in rows.items():
        ours = rows.get(name.removesuffix(", official"))
        if ours not in (None, row):
            found.append(_ratio("jobs", name, row["seconds"] / ours["seconds"]))
    return found


def as_table(found: list[Figure], parts: dict[str, dict[str, Any]]) -> str:
    """80 columns, and what is missing of each section."""
    lines = [f"{'':8}{'':41}{'found':>21}{'goal':>6}"]
    for figure in found:
        mark = "ok" if figure.met else "NO"
        lines.append(f"{figure.section:8}{figure.what[:40]:41}{figure.found:>21}{figure.goal:>6} {mark}")
    for what, key in (("failed", "failed"), ("left out", "left_out")):
        counts = [f"{section} {len(part[key])}" for section, part in parts.items() if part[key]]
        lines += [f"Rows {what}: {', '.join(counts)}"] if counts else []
    return "\n".join(lines)
