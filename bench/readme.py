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
    """Ours and the official demo on the same inputs: time and memory at ViT-B/32, errors on a small model."""
    large, small = _read("compare-clip-b32-64"), _read("compare-clip-small")
    head = ["", "ViT-B/32: seconds", "peak memory", "small CLIP: error of weights", "biases", "LayerNorm"]
    lines = [_row(head), _row(["---", *["---:"] * 5])]
    for way in ("official", "featcal_fast"):
        median, error = large["median"][way], small["error"][way]
        errors = [f"{error[kind]:.1e}" for kind in ("weight", "bias", "layernorm")]
        lines.append(_row([way, f"{median['seconds']:.0f}", f"{median['peak_gib']:.1f} GiB", *errors]))
    return "\n".join(lines)


def families() -> str:
    """What can be calibrated, from the registry."""
    return families_table().strip()


SECTIONS: dict[str, Callable[[], str]] = {"demo": demo, "families": families, "parity": parity}


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
