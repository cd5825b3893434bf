"""featcal_fast on a workload's folder, from disk to disk: `python -m bench.workers.ours FOLDER OUT --settings JSON`."""

from __future__ import annotations

import json

import featcal_kernels.ops
import transformers

import featcal_fast as ff
from bench.workers import Measured, options
from featcal_fast.streaming.machine import configure_process


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, arguments)
    recipe = json.loads((args.folder / "recipe.json").read_text())
    recipe.pop("merge")
    recipe["merged_model"] = str(args.folder / "merged")
    recipe["settings"] |= args.settings
    configure_process()  # as the command does
    if args.plain_ops:
        featcal_kernels.ops._gpu_module = lambda device: None
    config = json.loads((args.folder / "base/config.json").read_text())
    getattr(transformers, config["architectures"][0])  # imported
    with Measured(args) as measured:
        ff.calibrate(recipe, out=args.out, device=args.device)
    measured.say()


if __name__ == "__main__":
    main()
