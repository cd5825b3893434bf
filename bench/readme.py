"""Fill the pages' tables from `bench/results/*.json`, so that no figure is typed by hand: `python -m bench.readme`.

A table stands between `<!-- name -->` and `<!-- /name -->`. `--check` only says whether all pages are up to date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from bench.gpu import goals, moments
from bench.gpu.folds import FOLD
from bench.gpu.jobs import JOBS
from bench.gpu.layer import LAYER
from bench.gpu.solves import SOLVE
from bench.harness import tables
from bench.harness.results import RESULTS, ROOT
from bench.harness.runs import command_line
from bench.language import study
from bench.real import sources, summary
from bench.real.units import ARITHMETIC, BASE, EXPERTS
from featcal_fast.models import families_table

PAGES = ("README.md", "bench/README.md", "docs/families.md")
OURS = "featcal_fast"
REAL = ("lm", "encoder")
FIXED = ("preset", "chosen")  # of those that were compared on them
CHOICES = {"digits": (100, 1, "accuracy, %"), "llama": (1, 3, "bits per byte"), "t5": (1, 1, "exact match, %")}
# Columns of the README's table of real models, and their rows.
REAL_ROWS = {"base": BASE, "experts": EXPERTS, "task arithmetic": ARITHMETIC, "FeatCal 128": "FeatCal 128, chosen"}
# The comparisons that the README shows, and what it calls them and what is compared.
COMPARED = {
    "clip-b32-64": "CLIP ViT-B/32, 8 tasks of 64 images",
    "llama-1b-4": "Llama 3.2 1B, 3 tasks of 4 texts, bfloat16",
}
IMPLEMENTATIONS = {
    OURS: OURS,
    "official": "the official code",
    "fusioneval": "FusionEval's schedule",
}
JUDGES = {
    OURS: "ours",
    "official": "the official code",
    "official in float64": "the official code in float64",
}


def demo() -> str:
    """Held-out accuracy of every model of the demo."""
    results, lines = _read("demo"), []
    for name, row in results["accuracy"].items():
        if not name.startswith("expert "):
            closed = results["gap_closed"].get(name)
            line = {"accuracy on held-out digits, %": name} | {task: f"{value:.1f}" for task, value in row.items()}
            lines.append(line | {"gap closed": f"{closed:.0%}" if closed else ""})
    return _table(lines)


def compared() -> str:
    """The comparisons that tell most: seconds, memory, and how far weights are from each other."""
    lines = []
    for name, title in COMPARED.items():
        results = _read(f"compare-{name}")
        lines.append({"": f"**{title}**"})
        for way, label in IMPLEMENTATIONS.items():
            if way in results["median"]:
                median, found = results["median"][way], results["difference"].get(way)
                line = {"": label, "seconds": _seconds(median["seconds"]), "peak memory": _memory(median)}
                error = f"{found['weight']:.1e} from {JUDGES[results['judge']]}" if found else ""
                lines.append(line | {"difference": error})
    return _table(lines, "-rr-")


def parity() -> str:
    """Every comparison's seconds (the median, and all runs where there are several), memory and differences."""
    lines = []
    kinds = {"difference of weights": "weight", "biases": "bias", "LayerNorm": "layernorm"}
    for path in sorted(RESULTS.glob("compare-*.json")):
        results = _read(path.stem)
        hardware = results["machine"]["cpu" if results.get("device", "cpu") == "cpu" else "gpu"]
        lines.append({"": f"**{path.stem.removeprefix('compare-')}**, {hardware}"})
        for way, median in results["median"].items():
            found, runs = results["difference"].get(way, {}), sorted(run["seconds"] for run in results["runs"][way])
            several = f" ({_seconds(runs[0])} to {_seconds(runs[-1])})" if len(runs) > 1 else ""
            line = {
                "": way,
                "seconds": _seconds(median["seconds"]) + several,
                "times ours": f"{median['seconds'] / results['median'][OURS]['seconds']:.2f}",
                "TFLOP": f"{results['tflop'][way]:.1f}" if way in results["tflop"] else "",
                "peak memory": _memory(median),
            }
            line |= {title: f"{found[kind]:.1e}" if found.get(kind) else "" for title, kind in kinds.items()}
            lines.append(line | {"from": results["judge"] if found else ""})
    return _table(lines, "-rrrrrrr-")


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
            planned = {"peak_gib": found["plan"]["host"], "peak_device_gib": found["plan"]["device"]}
            lines.append(
                {
                    "job": label,
                    "tasks": found["tasks"],
                    "samples a task": found["samples"],
                    "tokens in all": f"{found['tokens_calibrated']:,}",
                    "seconds": f"{found['seconds']:.0f}",
                    "peak memory": _memory(found, "peak_host_gib"),
                    "planned": _memory(planned),
                    "TFLOP": found["plan"]["TFLOP"],
                }
            )
    return _table(lines)


def merging() -> str:
    """Merges on the fly: what they took, and what they read beside the inputs' size."""
    lines = []
    for path in sorted(RESULTS.glob("merging-*.json")):
        for method, found in _read(path.stem).items():
            label = method + (f", {found['steps']} steps" if "steps" in found else "")
            label += f", {found['machine']['gpu']}" if found.get("peak_device_gib") else ""
            lines.append(
                {
                    "merge": label,
                    "layers": found["layers"],
                    "seconds": _seconds(found["seconds"]),
                    "of CPU": _seconds(found["cpu_seconds"]),
                    "peak memory": _memory(found),
                    "before it": f"{found['started_gib']:.2f} GiB",
                    "inputs": f"{found['gib_of_inputs']:.2f} GiB",
                    "read": f"{found['gib_read']:.2f} GiB",
                }
            )
    return _table(lines)


NO_GPU = "*No GPU was measured yet.*"


def gpu() -> str:
    """The figures with a goal that `bench.gpu` measured, on one GPU, but those of sums: there is no room for more."""
    return "\n\n".join(gpu_goals(found, without="moments") for found in _gpus()[-1:]) or NO_GPU


def gpu_in_full() -> str:
    """All that `bench.gpu` measured on each GPU."""
    return "\n\n".join(gpu_tables(found) for found in _gpus()) or NO_GPU


def _gpus() -> list[dict[str, Any]]:
    return [_read(path.stem) for path in sorted(RESULTS.glob("gpu-*.json"))]


def gpu_goals(results: dict[str, Any], without: str = "") -> str:
    """One GPU's figures that are held against a goal, without those of a section."""
    return _table(
        [
            {
                results["environment"]["device"]: f"{figure.section}: {figure.what}",
                "found": figure.found,
                "goal": figure.goal,
                "met": "yes" if figure.met else "no",
            }
            for figure in goals.figures(*_gpu_rows(results))
            if figure.section != without
        ]
    )


def gpu_tables(results: dict[str, Any]) -> str:
    """One GPU's figures and goals, and the tables of the sections that time something."""
    made_on = results["environment"]
    rows, peak = _gpu_rows(results)
    names = ("driver, power limit, clock", "torch", "triton", "transformers")
    known = [f"{name} {made_on[name]}" for name in names if made_on.get(name)]
    parts = [f"**{made_on['device']}** ({'; '.join(known)}). Its peak in a bfloat16 product: {peak:.3g} TFLOP/s."]
    parts.append(gpu_goals(results))
    for section in (LAYER, SOLVE, FOLD, moments.MOMENTS, JOBS):
        # Of the sums, those over as many tokens as an engine's layer is given at a time.
        found = rows.get(section.name, {}).items()
        shown = {key: row for key, row in found if row.get("n") in (None, moments.TOKENS[0])}
        if lines := section.lines(shown, peak):
            cells = [{name: "" if x is None else tables.text(x) for name, x in line.items()} for line in lines]
            parts += [f"{section.title}:", _table(cells), " ".join(section.notes(shown, peak))]
    return "\n\n".join(filter(None, parts))


def _gpu_rows(results: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Rows by section, and TFLOP/s at the peak."""
    rows = {name: part["rows"] for name, part in results["sections"].items()}
    return rows, next(iter(rows["peak"].values()))["TFLOP/s"]


def digits() -> str:
    """Mean held-out accuracy by merger, repair and samples."""
    cells, lines = {}, []
    for row in _read("accuracy-digits")["summary"]:
        mean, std = row["mean_and_std"]["mean"]
        cells[row["merger"], row["repair"], row["samples"]] = f"{mean:.1f} ± {std:.1f}"
    for merger, repair in dict.fromkeys((merger, repair) for merger, repair, _ in cells):
        line = {"held-out accuracy, %": merger if repair == "plain" else f"+ {repair}"}
        line["merged"] = cells.get((merger, repair, None), "")
        lines.append(line | {f"{n} images a task": cells.get((merger, repair, n), "") for n in (8, 64, 256)})
    return _table(lines)


def chosen() -> str:
    """Settings that choose themselves beside sixty fixed ones, for each kind of models and number of samples."""
    lines = []
    for kind, (scale, digits, measure) in CHOICES.items():
        if not (RESULTS / f"choice-{kind}.json").exists():
            continue
        for count, found in _read(f"choice-{kind}")["summary"].items():
            told = {
                name: f"{scale * found[name][0]:.{digits}f} ± {scale * found[name][1]:.{digits}f}"
                for name in ("merged", "default", "best of grid", "auto", "auto against best")
            }
            lines.append(
                {
                    "": f"{kind}, {count} samples a task: {measure}",
                    "merged": told["merged"],
                    "default": told["default"],
                    "median of 60": f"{scale * found['fixed']['median']:.{digits}f}",
                    "best of 60": told["best of grid"],
                    "`auto`": told["auto"],
                    "`auto` less best": told["auto against best"],
                    "time": f"{found['time']:.2f}",
                }
            )
    return _table(lines)


def chosen_real() -> str:
    """Settings that choose themselves, and the gate, beside fixed settings on real models' validation texts."""
    lines: dict[str, dict[str, object]] = {}
    for name in REAL:
        found = _read(f"settings-real-{name}")
        held_out = found["with held-out samples"]
        named = {each: next(key for key, repair in found["grid"].items() if repair == found[each]) for each in FIXED}
        rows = {f"{each}, all texts": (found, key) for each, key in (*named.items(), ("best fixed", found["best"]))}
        rows |= {key: (held_out, key) for key in held_out["grid"]}
        for count, (row, (part, key)) in product(found["samples"], rows.items()):
            score, line = part["scores"][f"{key}, {count}"], lines.setdefault(row, {"settings": row})
            mean, seconds = f"{found['scale'] * score['mean']:.{found['digits']}f}", _seconds(score["took"]["seconds"])
            line[f"{found['study']}, {count} texts a task: {found['measure']} (seconds)"] = f"{mean} ({seconds})"
    return _table(list(lines.values()))


def real() -> str:
    """Of each study on real models, the merge that was tuned, the repairs of it, and how sure the difference is."""
    lines = []
    for name in REAL:
        results = _read(f"real-{name}")
        form, (digits, scale) = next(iter(results["forms"])), (results["digits"], results["scale"])
        rows = results["forms"][form]["rows"]
        line = {"": f"{results['study']}: {results['measure']}"}
        for title, key in REAL_ROWS.items():
            line[title] = f"{scale * rows[key]['mean']:.{digits}f}"
        lead = summary.lead(rows[REAL_ROWS["FeatCal 128"]]["differences"][ARITHMETIC], digits, scale)
        lines.append(line | {"FeatCal's difference": lead})
    return _table(lines)


def real_rows(name: str, form: str) -> str:
    """Every row of a study, for one form of its experts."""
    results = _read(f"real-{name}")
    return _table(summary.lines(results, form, results["measure"]))


def real_cost() -> str:
    """What FeatCal took on the real models beside what its plan said: means over seeds, the largest memory."""
    lines = []
    for name in REAL:
        results = _read(f"real-{name}")
        for form, found in results["forms"].items():
            for key, row in found["rows"].items():
                if took := row.get("took"):
                    lines.append(
                        {
                            "calibration": f"{results['study']}, {form}: {key}",
                            "seconds": _seconds(took["seconds"]),
                            "peak memory": f"{took['peak_gib']:.2f} GiB",
                            "planned": f"{took['planned_gib']:.2f} GiB",
                            "TFLOP": f"{took['tflop']:.2f}",
                        }
                    )
    return _table(lines)


def helps() -> str:
    """What a sample foretold of small models' merges."""
    lines = []
    for name, title in (("digits", "digits"), ("llama", "a small Llama"), ("t5", "a small T5")):
        results = _read(f"helps-{name}")
        line = {"merges of": title}
        for said in ("captured", "distance"):
            line |= {f"{said}: {gain}": f"{value:.2f}" for gain, value in results["rank correlation"][said].items()}
        for share, found in results["drift removed"].items():
            line[f"drift removed, {share}"] = f"{found['least']:.0%} to {found['most']:.0%} ({found['merges']} merges)"
        lines.append(line)
    return _table(lines)


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
    "helps": helps,
    "jobs": jobs,
    "llama": lambda: _table(study.lines(_read("accuracy-llama"), "bits per byte", 3)),
    "merging": merging,
    "parity": parity,
    "real": real,
    "real cost": real_cost,
    "real encoder": lambda: real_rows("encoder", "full"),
    "real lm full": lambda: real_rows("lm", "full"),
    "real lm lora": lambda: real_rows("lm", "lora"),
    "real sources": lambda: _table(sources.table(), "--r--"),
    "settings": chosen,
    "settings real": chosen_real,
    "t5": lambda: _table(study.lines(_read("accuracy-t5"), "token accuracy, %", 1)),
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
    parser = command_line(__doc__)
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


def _table(lines: Sequence[dict[str, object]], align: str = "") -> str:
    """A Markdown table; `align` has an `r` for each column that is aligned to the right: all but the first."""
    head = list(dict.fromkeys(name for line in lines for name in line))
    rule = ["---:" if mark == "r" else "---" for mark in align or "-" + "r" * (len(head) - 1)]
    rows = ([line.get(name, "") for name in head] for line in lines)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (head, rule, *rows))


if __name__ == "__main__":
    main()
