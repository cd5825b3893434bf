"""The plain reference in float64 on a workload's folder: `python -m bench.workers.judge FOLDER OUT`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

import featcal_fast as ff


def main(folder: str, out: str) -> None:
    root = Path(folder)
    tasks = sorted(path.stem for path in root.glob("*.safetensors"))
    base, merged, *experts = (
        CLIPVisionModel.from_pretrained(root / name).double() for name in ("base", "merged", *tasks)
    )
    batches = {task: [{k: v.double() for k, v in load_file(root / f"{task}.safetensors").items()}] for task in tasks}
    started = time.perf_counter()
    ff.reference.calibrate_model(merged, base=base, experts=dict(zip(tasks, experts, strict=True)), batches=batches)
    save_file({name: value.contiguous() for name, value in merged.state_dict().items()}, out)
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main(*sys.argv[1:])
