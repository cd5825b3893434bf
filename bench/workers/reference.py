"""The plain reference (`featcal_fast/reference.py`): `python -m bench.workers.reference FOLDER OUT --dtype DTYPE`.

All models and statistics are in memory; in float64 it is the judge. Timed without reading the models.
"""

from __future__ import annotations

import json

import featcal_fast as ff
from bench.workers import Measured, options
from bench.workers.common import load_batches, load_model, save, tasks_of


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, arguments)
    recipe = json.loads((args.folder / "recipe.json").read_text())
    tasks = tasks_of(args.folder)
    base, merged, *experts = (load_model(args.folder / name, args.dtype) for name in ("base", "merged", *tasks))
    batches = {task: load_batches(args.folder, task, 16, args.dtype) for task in tasks}
    with Measured(args) as measured:
        ff.reference.calibrate_model(
            merged,
            base=base,
            experts=dict(zip(tasks, experts, strict=True)),
            batches=batches,
            settings=ff.Settings.from_dict(recipe["settings"]),
            device=args.device,
        )
    save(merged, args.out)
    measured.say()


if __name__ == "__main__":
    main()
