"""The plain reference (`featcal_fast/reference.py`): `python -m bench.workers.reference FOLDER OUT DTYPE`.

All models and statistics are in memory; in float64 it is the judge. Timed without reading the models.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import featcal_fast as ff
from bench.workers.common import finish, load_batches, load_model, tasks_of


def main(folder: str, out: str, dtype_name: str) -> None:
    root, dtype = Path(folder), getattr(torch, dtype_name)
    recipe = json.loads((root / "recipe.json").read_text())
    tasks = tasks_of(root)
    base, merged, *experts = (load_model(root / name, dtype) for name in ("base", "merged", *tasks))
    batches = {task: load_batches(root, task, 16, dtype) for task in tasks}
    started = time.perf_counter()
    ff.reference.calibrate_model(
        merged,
        base=base,
        experts=dict(zip(tasks, experts, strict=True)),
        batches=batches,
        settings=ff.Settings.from_dict(recipe["settings"]),
    )
    finish(merged, out, started)


if __name__ == "__main__":
    main(*sys.argv[1:])
