"""Fill the README's tables from `bench/results/*.json`, so that no figure is typed by hand: `python -m bench.readme`.

A table stands between `<!-- name -->` and `<!-- /name -->`. `--check` only says whether the README is up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu import goals, layer, moments, tables
from bench.gpu import jobs as jobs_on_gpu
from featcal_fast.models import families_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def demo() -> str:
    """Held-out accuracy of every model of the demo."""
    results = _read("demo")
    rows = results["accuracy"]
    tasks = list(next(iter(rows.values())))
    wanted = [name for name in rows if name == "base" or not name.startswith("expert ")]
    lines = [
        _row(["accuracy on held-out digits, %", *tasks, "gap closed"]),
        _row(["---", *["---:"] * (len(tasks) + 1)]),
    ]
    for name in wanted:
        closed = results["gap_closed"].get(name)
        lines.append(_row([name, *(f"{rows[name][task]:.1f}" for task in tasks), f"{closed:.0%}" if closed else ""]))
    return "\n".join(lines)


def parity() -> str:
    """Every comparison's seconds (the median, and all runs where there are several), memory and differences."""
    head = ["", "seconds", "times ours", "TFLOP", "peak memory", "difference of weights", "biases", "LayerNorm", "from"]
    lines = [_row(head), _row(["---", *["---:"] * 7, "---"])]
    for path in sorted(RESULTS.glob("compare-*.json")):
        results, workload = _read(path.stem), path.stem.removeprefix("compare-")
        hardware = results["machine"]["cpu" if results.get("device", "cpu") == "cpu" else "gpu"]
        lines.append(_row([f"**{workload}**, {hardware}", *[""] * 8]))
        ours = results["median"]["featcal_fast"]["seconds"]
        for way, median in results["median"].items():
            found = results["difference"].get(way)
            errors = [f"{found[kind]:.1e}" if found[kind] else "" for kind in found] if found else [""] * 3
            times = f"{median['seconds'] / ours:.2f}"
            runs = sorted(run["seconds"] for run in results["runs"][way])
            seconds = _seconds(median["seconds"])
            seconds += f" ({' to '.join(_seconds(run) for run in (runs[0], runs[-1]))})" if len(runs) > 1 else ""
            flops = f"{results['tflop'][way]:.1f}" if way in results["tflop"] else ""
            cells = [seconds, times, flops, _memory(median), *errors]
            lines.append(_row([way, *cells, results["judge"] if found else ""]))
    return "\n".join(lines)


def _memory(found: dict[str, float], host: str = "peak_gib") -> str:
    device = found.get("peak_device_gib")
    return f"{found[host]:.2f} GiB" + (f", GPU {device:.2f} GiB" if device else "")


def _seconds(value: float) -> str:
    return f"{value:.{0 if value >= 10 else 1}f}"


def jobs() -> str:
    """Whole jobs: what they took, and what the plan had said."""
    head = ["job", "tasks", "samples a task", "tokens in all", "seconds", "peak memory", "planned", "TFLOP"]
    lines = [_row(head), _row(["---", *["---:"] * 7])]
    for path in sorted(RESULTS.glob("jobs-*.json")):
        for name, found in _read(path.stem).items():
            label = name.removesuffix("-scratch").split(f"-{found['samples']}-samples")[0]
            label += "".join(f", {layers} layers" for layers in re.findall(r"-(\d+)-layers", name))
            label += ", hidden states on disk" if name.endswith("-scratch") else ""
            label += f", {found['machine']['gpu']}" if found["peak_device_gib"] else ""
            sizes = [found["tasks"], found["samples"], f"{found['tokens_calibrated']:,}"]
            planned = {"peak_gib": found["plan"]["host"], "peak_device_gib": found["plan"]["device"]}
            memory = [_memory(found, "peak_host_gib"), _memory(planned)]
            cells = [label, *sizes, f"{found['seconds']:.0f}", *memory, found["plan"]["TFLOP"]]
            lines.append(_row([str(cell) for cell in cells]))
    return "\n".join(lines)


def gpu() -> str:
    """What `bench.gpu` measured on each GPU."""
    paths = sorted(RESULTS.glob("gpu-*.json"))
    return "\n\n".join(gpu_tables(_read(path.stem)) for path in paths) or "*No GPU was measured yet.*"


def gpu_tables(results: dict[str, Any]) -> str:
    """One GPU's figures and goals, a layer by each schedule, its sums, and whole jobs."""
    found = results["environment"]
    rows = {name: part["rows"] for name, part in results["sections"].items()}
    peak = next(iter(rows["peak"].values()))["TFLOP/s"]
    names = ("driver, power limit, clock", "torch", "triton", "transformers")
    known = [f"{name} {found[name]}" for name in names if found.get(name)]
    parts = [f"**{found['device']}** ({'; '.join(known)}). Its peak in a bfloat16 product: {peak:.3g} TFLOP/s."]
    figures = [
        {"": figure.section, "figure": figure.what, "found": figure.found, "goal": figure.goal, "met": _met(figure)}
        for figure in goals.figures(rows, peak)
    ]
    shown = {"The figures that matter": figures}
    shown["A Llama-3.1-8B-shaped layer, milliseconds"] = layer.lines(rows.get("layer", {}), peak)
    sums = [row for row in rows.get("moments", {}).values() if row["n"] == moments.TOKENS[0] * 1024]
    shown["Sums over 16k tokens: a Gram matrix [d, d] and a cross moment [m, d]"] = moments.lines(sums, peak)
    shown["Whole jobs, folders to a folder"] = jobs_on_gpu.lines(rows.get("jobs", {}))
    for title, lines in shown.items():
        if lines:
            columns = list(dict.fromkeys(name for line in lines for name in line))
            cells = [[_figure(line.get(name)) for name in columns] for line in lines]
            rule = ["---", *["---:"] * (len(columns) - 1)]
            parts += [f"{title}:", "\n".join(_row(each) for each in (columns, rule, *cells))]
    parts += [" ".join([*layer.notes(rows.get("layer", {}), peak), *moments.NOTES])]
    return "\n\n".join(parts)


def _met(figure: goals.Figure) -> str:
    return "" if not figure.goal else "yes" if figure.met else "no"


def _figure(value: Any) -> str:
    return "" if value is None else tables.text(value)


def digits() -> str:
    """Mean held-out accuracy by merger, repair and samples."""
    results = _read("accuracy-digits")
    cells = {(row["merger"], row["repair"], row["samples"]): row["mean_and_std"]["mean"] for row in results["summary"]}
    samples = [8, 64, 256]
    lines = [_row(["held-out accuracy, %", "merged", *(f"{n} images a task" for n in samples)])]
    lines.append(_row(["---", *["---:"] * (len(samples) + 1)]))
    for merger in dict.fromkeys(merger for merger, *_ in cells):
        lines.append(_row([merger, _spread(cells[merger, "plain", None]), *[""] * len(samples)]))
        for repair in dict.fromkeys(repair for name, repair, n in cells if name == merger and n):
            lines.append(_row([f"+ {repair}", "", *(_spread(cells[merger, repair, n]) for n in samples)]))
    return "\n".join(lines)


def llama() -> str:
    """Bits per byte of the byte-level Llama."""
    return _study("accuracy-llama", "bits per byte", 3)


def t5() -> str:
    """Token accuracy of the small T5."""
    return _study("accuracy-t5", "token accuracy, %", 1)


def _study(name: str, metric: str, digits: int) -> str:
    results = _read(name)
    scores, closed = results["scores"][metric], results["gap_closed"][metric]
    columns = list(next(iter(scores.values())))
    lines = [_row([f"held-out {metric}", *columns, "gap closed"]), _row(["---", *["---:"] * (len(columns) + 1)])]
    for model, row in scores.items():
        mean = f"{row['mean']['mean']:.{digits}f} ± {row['mean']['std']:.{digits}f}"
        cells = [f"{row[column]['mean']:.{digits}f}" for column in columns if column != "mean"]
        lines.append(_row([model, *cells, mean, f"{closed[model]['mean']:.0%}" if model in closed else ""]))
    return "\n".join(lines)


def _spread(found: list[float]) -> str:
    return f"{found[0]:.1f} ± {found[1]:.1f}"


def families() -> str:
    """What can be calibrated, from the registry."""
    return families_table().strip()


SECTIONS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "digits": digits,
    "families": families,
    "gpu": gpu,
    "jobs": jobs,
    "llama": llama,
    "parity": parity,
    "t5": t5,
}


def filled(text: str) -> str:
    """`text` with every section's table made anew."""
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        assert pattern.search(text), f"the README has no place for {name}"
        text = pattern.sub(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = filled(text)
    if "--check" in sys.argv:
        raise SystemExit(0 if new == text else "README.md is not up to date: python -m bench.readme")
    readme.write_text(new)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
