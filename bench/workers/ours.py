"""featcal_fast on a workload's folder, from disk to disk, in a process of its own.

python -m bench.workers.ours FOLDER OUT BATCH_SIZE
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import featcal_fast as ff


def main(folder: str, out: str, batch_size: str) -> None:
    root = Path(folder)
    tasks = sorted(path.stem for path in root.glob("*.safetensors"))
    recipe = {
        "base_model": str(root / "base"),
        "merged_model": str(root / "merged"),
        "experts": {task: {"model": str(root / task), "data": str(root / f"{task}.safetensors")} for task in tasks},
        "settings": {"ridge_lambda": 0.05, "anchor_rho": 2.0, "teacher_alpha": 0.3},
        "batch_size": int(batch_size),
        "samples": 1 << 30,
        "out": out,
    }
    started = time.perf_counter()
    ff.calibrate(recipe)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak_gib": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
