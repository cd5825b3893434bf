"""The figures that matter, and the goals that they are held against: the last table of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.gpu import layer, solves, tiles
from bench.gpu.moments import times
from bench.harness.results import Rows

SLOWER = 0.97  # below this share of our time, another way is faster than noise explains


@dataclass(frozen=True)
class Figure:
    """A line of the table.

    Attributes:
        section: where it is from.
        what: it says.
        found: as text.
        goal: as text; empty for none.
        met: whether it is.
    """

    section: str
    what: str
    found: str
    goal: str = ""
    met: bool = True


def figures(sections: dict[str, Rows], peak: float) -> list[Figure]:
    """What was measured, in order; nothing of what was not."""
    found: list[Figure] = []
    for row in sections.get("checks", {}).values():
        what = f"tests: {row['passed']} passed, {row['skipped']} skipped" + ", cut off" * bool(row["unfinished"])
        met = not row["failed"] and not row["unfinished"]
        found.append(Figure("checks", what, f"{row['failed']} failed", "0", met))
    found.append(Figure("peak", "a bfloat16 product, TFLOP/s", f"{peak:.3g}"))
    found += _tiles(sections.get("tiles", {}))
    found += [*_layer(sections.get("layer", {}), peak), *_moments(sections.get("moments", {}), peak)]
    for row in sections.get("solve", {}).values():
        what = f"{row['systems']} of {row['d']}: LU's time by ours"
        error = max(value for way, value in row["error"].items() if way != "LU") if "error" in row else None
        text = f"{row['ms']['LU'] / solves.fastest(row):.1f}x" + (f", error {error:.0e}" if error else "")
        found.append(Figure("solve", what, text))
    ops = [op for row in sections.get("fold", {}).values() for op in row["ops"].values()]
    if ops:
        least = min(op["torch ms"] / op["ms"] for op in ops)
        found.append(Figure("fold", "torch's time by ours, the least", f"{least:.2f}x"))
    found += _jobs(sections.get("jobs", {}))
    for name, row in sections.get("drift", {}).items():
        found.append(Figure("drift", f"{name}: last by first", f"{row['ratio']:.3f}"))
    return found


def _tiles(rows: Rows) -> list[Figure]:
    found = []
    for kind in tiles.COUNTS:
        timed = [row for row in rows.values() if row["kind"] == kind]
        if timed:
            gain = tiles.mean_ms(timed, next(iter(timed[0]["ms"]))) / tiles.mean_ms(timed, tiles.best(timed))
            found.append(Figure("tiles", f"{kind}: the table's by the best", f"{gain:.2f}x"))
    return found


def _layer(rows: Rows, peak: float) -> list[Figure]:
    engine = layer.ours(rows)
    if engine is None:
        return []
    ours = layer.total(engine)
    share = sum(layer.ideal(rows, peak).values()) / ours
    found = [Figure("layer", f"{ours:.0f} ms, of the ideal", f"{share:.0%}", "60%", share >= 0.6)]
    if layer.COMPILED in rows and layer.ENGINE in rows:
        gain = layer.total(rows[layer.ENGINE]) / ours
        found.append(Figure("layer", f"{layer.ENGINE}, by compiled", f"{gain:.2f}x"))
    for name in (layer.OFFICIAL, layer.FUSIONEVAL):
        if name in rows:
            ratio = layer.total(rows[name]) / ours
            found.append(Figure("layer", f"{name}, by ours", f"{ratio:.1f}x", "10x", ratio >= 10))
    return found


def _moments(rows: Rows, peak: float) -> list[Figure]:
    found = []
    # q, k, v and gate, up share their inputs' sums; o; down: three products of one shape and one of another
    parts = [(count, rows.get(f"bfloat16 {d} 4096 16384")) for count, d in ((3, 4096), (1, 14336))]
    if all(row is not None for _, row in parts):
        spent = sum(count * row["ms"]["taken"] for count, row in parts if row)
        flops = sum(count * row["TFLOP/s"] * row["ms"]["taken"] for count, row in parts if row)
        share = flops / spent / peak
        found.append(Figure("moments", "of a Llama-8B layer at 16k, of the peak", f"{share:.0%}", "85%", share >= 0.85))
    halves = [row for row in rows.values() if row["dtype"] == "bfloat16"]
    if halves:
        ratios = [min(filter(None, (times(row, way) for way in ("torch", "blas", "squares")))) for row in halves]
        slower = sum(ratio < SLOWER for ratio in ratios)
        text = f"{min(ratios):.2f}x, {slower} of {len(ratios)} slower"
        found.append(Figure("moments", "cuBLAS's time by ours, the least", text, "1x", not slower))
    for dtype, goal in (("float32", 2e-5), ("bfloat16", None)):
        errors = [row["error"] for row in rows.values() if row["dtype"] == dtype and "error" in row]
        if errors:
            met = goal is None or max(errors) <= goal
            found.append(Figure("moments", f"{dtype}: largest error", f"{max(errors):.0e}", f"{goal or ''}", met))
    return found


def _jobs(rows: Rows) -> list[Figure]:
    found = []
    for name, row in rows.items():
        seconds, memory = row["seconds"], row.get("peak_device_gib", 0)
        if name == "llama-8b":
            found.append(Figure("jobs", f"{name}: seconds", f"{seconds:.3g}", "120", seconds <= 120))
            found.append(Figure("jobs", f"{name}: GPU GiB", f"{memory:.2f}", "8", memory <= 8))
        elif name.endswith(", official"):
            ours = rows.get(name.removesuffix(", official"))
            if ours is None:
                continue
            ratio = seconds / ours["seconds"]
            found.append(Figure("jobs", f"{name}: by ours", f"{ratio:.1f}x", "10x", ratio >= 10))
        else:
            found.append(Figure("jobs", f"{name}: seconds", f"{seconds:.3g}"))
    return found


def as_table(found: list[Figure], parts: dict[str, dict[str, Any]]) -> str:
    """80 columns, and what is missing of each section."""
    lines = [f"{'':8}{'':41}{'found':>21}{'goal':>6}"]
    for figure in found:
        mark = "" if not figure.goal else "ok" if figure.met else "NO"
        lines.append(f"{figure.section:8}{figure.what[:40]:41}{figure.found:>21}{figure.goal:>6} {mark}".rstrip())
    for what, key in (("failed", "failed"), ("left out", "left_out")):
        counts = [f"{section} {len(part[key])}" for section, part in parts.items() if part[key]]
        lines += [f"Rows {what}: {', '.join(counts)}"] if counts else []
    return "\n".join(lines)
