"""Fill the pages' tables from `bench/results/*.json`, so that no figure is typed by hand: `python -m bench.readme`.

A table stands between `<!-- name -->` and `<!-- /name -->`. `--check` only says whether all pages are up to date.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.gpu import goals, layer, moments
from bench.gpu import jobs as jobs_on_gpu
from bench.harness import tables
from featcal_fast.models import families_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PAGES = ("README.md", "bench/README.md", "docs/families.md")
OURS = "featcal_fast"
# The comparisons that the README shows, and what it calls them and what is compared.
COMPARED = {
    "clip-b32-64": "CLIP ViT-B/32, 8 tasks of 64 images",
    "clip-b32-256": "CLIP ViT-B/32, 8 tasks of 256 images",
    "llama-1b-4": "Llama 3.2 1B, 3 tasks of 4 texts, bfloat16",
    "flan-t5-base-16-2-tasks": "FLAN-T5-base, 2 tasks of 16 texts, LoRA",
}
IMPLEMENTATIONS = {
    OURS: OURS,
    "official": "the official demo",
    "fusioneval": "FusionEval's schedule",
    "reference": "plain torch",
}
JUDGES = {
    OURS: "ours",
    "official": "the demo",
    "official in float64": "the demo in float64",
    "float64 reference": "float64",
}


def demo() -> str:
    """Held-out accuracy of every model of the demo."""
    results = _read("demo")
    rows = results["accuracy"]
    tasks = list(next(iter(rows.values())))
    wanted = [name for name in rows if name == "base" or not name.startswith("expert ")]
    lines = []
    for name in wanted:
        closed = results["gap_closed"].get(name)
        lines.append([name, *(f"{rows[name][task]:.1f}" for task in tasks), f"{closed:.0%}" if closed else ""])
    return _table(["accuracy on held-out digits, %", *tasks, "gap closed"], lines)


def compared() -> str:
    """The comparisons that tell most: seconds, memory, and how far weights are from each other."""
    lines = []
    for name, title in COMPARED.items():
        results = _read(f"compare-{name}")
        lines.append([f"**{title}**", *[""] * 3])
        for way, label in IMPLEMENTATIONS.items():
            if way in results["median"]:
                median, found = results["median"][way], results["difference"].get(way)
                error = f"{found['weight']:.1e} from {JUDGES[results['judge']]}" if found else ""
                lines.append([label, _seconds(median["seconds"]), _memory(median), error])
    return _table(["", "seconds", "peak memory", "difference"], lines, "-rr-")


def parity() -> str:
    """Every comparison's seconds (the median, and all runs where there are several), memory and differences."""
    lines = []
    for path in sorted(RESULTS.glob("compare-*.json")):
        results, workload = _read(path.stem), path.stem.removeprefix("compare-")
        hardware = results["machine"]["cpu" if results.get("device", "cpu") == "cpu" else "gpu"]
        lines.append([f"**{workload}**, {hardware}", *[""] * 8])
        ours = results["median"][OURS]["seconds"]
        for way, median in results["median"].items():
            found = results["difference"].get(way)
            errors = [f"{found[kind]:.1e}" if found[kind] else "" for kind in found] if found else [""] * 3
            times = f"{median['seconds'] / ours:.2f}"
            runs = sorted(run["seconds"] for run in results["runs"][way])
            seconds = _seconds(median["seconds"])
            seconds += f" ({' to '.join(_seconds(run) for run in (runs[0], runs[-1]))})" if len(runs) > 1 else ""
            flops = f"{results['tflop'][way]:.1f}" if way in results["tflop"] else ""
            cells = [seconds, times, flops, _memory(median), *errors]
            lines.append([way, *cells, results["judge"] if found else ""])
    head = ["", "seconds", "times ours", "TFLOP", "peak memory", "difference of weights", "biases", "LayerNorm", "from"]
    return _table(head, lines, "-rrrrrrr-")


def _memory(found: dict[str, float], host: str = "peak_gib") -> str:
    device = found.get("peak_device_gib")
    return f"{found[host]:.2f} GiB" + (f", GPU {device:.2f} GiB" if device else "")


def _seconds(value: float) -> str:
    return f"{value:.{0 if value >= 10 else 1}f}"


def jobs() -> str:
    """Whole jobs: what they took, and what the plan had said."""
    lines = []
    for path in sorted(RESULTS.glob("jobs-*.json")):
        for name, found in _read(path.stem).items():
            label = name.removesuffix("-scratch").split(f"-{found['samples']}-samples")[0]
            label += "".join(f", {layers} layers" for layers in re.findall(r"-(\d+)-layers", name))
            label += ", hidden states on disk" if name.endswith("-scratch") else ""
            label += f", {found['machine']['gpu']}" if found["peak_device_gib"] else ""
            sizes = [found["tasks"], found["samples"], f"{found['tokens_calibrated']:,}"]
            planned = {"peak_gib": found["plan"]["host"], "peak_device_gib": found["plan"]["device"]}
            memory = [_memory(found, "peak_host_gib"), _memory(planned)]
            lines.append([label, *sizes, f"{found['seconds']:.0f}", *memory, found["plan"]["TFLOP"]])
    return _table(
        ["job", "tasks", "samples a task", "tokens in all", "seconds", "peak memory", "planned", "TFLOP"], lines
    )


NO_GPU = "*No GPU was measured yet.*"


def gpu() -> str:
    """The figures with a goal that `bench.gpu` measured, on one GPU: there is no room for more."""
    return "\n\n".join(gpu_goals(found) for found in _gpus()[-1:]) or NO_GPU


def gpu_in_full() -> str:
    """All that `bench.gpu` measured on each GPU."""
    return "\n\n".join(gpu_tables(found) for found in _gpus()) or NO_GPU


def _gpus() -> list[dict[str, Any]]:
    return [_read(path.stem) for path in sorted(RESULTS.glob("gpu-*.json"))]


def gpu_goals(results: dict[str, Any]) -> str:
    """One GPU's figures that are held against a goal."""
    figures = [figure for figure in goals.figures(*_gpu_rows(results)) if figure.goal]
    lines = [[f"{figure.section}: {figure.what}", figure.found, figure.goal, _met(figure)] for figure in figures]
    return _table([results["environment"]["device"], "found", "goal", "met"], lines)


def gpu_tables(results: dict[str, Any]) -> str:
    """One GPU's figures and goals, a layer by each schedule, its sums, and whole jobs."""
    found = results["environment"]
    rows, peak = _gpu_rows(results)
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
            parts += [f"{title}:", _table(columns, [[_figure(line.get(name)) for name in columns] for line in lines])]
    parts += [" ".join([*layer.notes(rows.get("layer", {}), peak), *moments.NOTES])]
    return "\n\n".join(parts)


def _gpu_rows(results: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Rows by section, and TFLOP/s at the peak."""
    rows = {name: part["rows"] for name, part in results["sections"].items()}
    return rows, next(iter(rows["peak"].values()))["TFLOP/s"]


def _met(figure: goals.Figure) -> str:
    return "" if not figure.goal else "yes" if figure.met else "no"


def _figure(value: Any) -> str:
    return "" if value is None else tables.text(value)


def digits() -> str:
    """Mean held-out accuracy by merger, repair and samples."""
    results = _read("accuracy-digits")
    cells = {(row["merger"], row["repair"], row["samples"]): row["mean_and_std"]["mean"] for row in results["summary"]}
    samples, lines = [8, 64, 256], []
    for merger in dict.fromkeys(merger for merger, *_ in cells):
        lines.append([merger, _spread(cells[merger, "plain", None]), *[""] * len(samples)])
        for repair in dict.fromkeys(repair for name, repair, n in cells if name == merger and n):
            lines.append([f"+ {repair}", "", *(_spread(cells[merger, repair, n]) for n in samples)])
    return _table(["held-out accuracy, %", "merged", *(f"{n} images a task" for n in samples)], lines)


def llama() -> str:
    """Bits per byte of the byte-level Llama."""
    return _study("accuracy-llama", "bits per byte", 3)


def t5() -> str:
    """Token accuracy of the small T5."""
    return _study("accuracy-t5", "token accuracy, %", 1)


def _study(name: str, metric: str, digits: int) -> str:
    results, lines = _read(name), []
    scores, closed = results["scores"][metric], results["gap_closed"][metric]
    columns = list(next(iter(scores.values())))
    for model, row in scores.items():
        mean = f"{row['mean']['mean']:.{digits}f} ± {row['mean']['std']:.{digits}f}"
        cells = [f"{row[column]['mean']:.{digits}f}" for column in columns if column != "mean"]
        lines.append([model, *cells, mean, f"{closed[model]['mean']:.0%}" if model in closed else ""])
    return _table([f"held-out {metric}", *columns, "gap closed"], lines)


def _spread(found: list[float]) -> str:
    return f"{found[0]:.1f} ± {found[1]:.1f}"


def families() -> str:
    """What can be calibrated, from the registry."""
    return families_table().strip()


SECTIONS: dict[str, Callable[[], str]] = {
    "compared": compared,
    "demo": demo,
    "digits": digits,
    "families": families,
    "gpu": gpu,
    "gpu in full": gpu_in_full,
    "jobs": jobs,
    "llama": llama,
    "parity": parity,
    "t5": t5,
}


def filled(text: str) -> str:
    """`text` with every section's table made anew.

    Raises:
        ValueError: a marker that is not known, or not closed.
    """
    markers = re.findall(r"<!-- (.+?) -->", text)
    for opening, closing in zip(markers[::2], [*markers[1::2], ""], strict=False):
        if opening not in SECTIONS or closing != f"/{opening}":
            raise ValueError(
                f"found <!-- {opening} --> and <!-- {closing} -->, expected a pair of one of {', '.join(SECTIONS)}"
            )
    return re.sub(
        r"(<!-- ([^/].*?) -->\n).*?(<!-- /\2 -->)",
        lambda match: f"{match[1]}{SECTIONS[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is not up to date")
    check = parser.parse_args().check
    before = {path: (ROOT / path).read_text() for path in PAGES}
    changed = {path: new for path, text in before.items() if (new := filled(text)) != text}
    if check and changed:
        raise SystemExit(f"not up to date: {', '.join(changed)}; python -m bench.readme")
    for path, text in changed.items():
        (ROOT / path).write_text(text)


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(head: list[str], rows: Iterable[Iterable[object]], align: str = "") -> str:
    """A Markdown table; `align` has an `r` for each column that is aligned to the right: all but the first."""
    marks = align or "-" + "r" * (len(head) - 1)
    rule = ["---:" if mark == "r" else "---" for mark in marks]
    return "\n".join("| " + " | ".join(str(cell) for cell in cells) + " |" for cells in (head, rule, *rows))


if __name__ == "__main__":
    main()
