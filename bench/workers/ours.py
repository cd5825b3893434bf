"""featcal_fast on a workload's folder, from disk to disk: `python -m bench.workers.ours FOLDER OUT SETTINGS`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import transformers

import featcal_fast as ff
from bench.workers import peak_gib
from featcal_fast.machine import use_whole_machine


def main(folder: str, out: str, settings: str) -> None:
    recipe = json.loads((Path(folder) / "recipe.json").read_text())
    recipe.pop("merge")
    recipe["merged_model"] = str(Path(folder) / "merged")
    recipe["settings"] |= json.loads(settings)
    use_whole_machine()  # as the command does
    getattr(transformers, json.loads((Path(folder) / "base/config.json").read_text())["architectures"][0])  # imported
    started = time.perf_counter()
    ff.calibrate(recipe, out=out)
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak_gib": peak_gib()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
