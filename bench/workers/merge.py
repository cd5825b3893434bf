"""A merge of a workload's models, from disk to disk: `python -m bench.workers.merge FOLDER OUT --merge JSON`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import transformers

import featcal_fast as ff
from bench.workers import Measured, options
from featcal_fast.streaming.machine import resident_bytes
from featcal_fast.streaming.malloc import configure_process


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, arguments)
    recipe = json.loads((args.folder / "recipe.json").read_text()) | {"merge": args.merge}
    configure_process()  # as the command does
    config = json.loads((args.folder / "base/config.json").read_text())
    getattr(transformers, config["architectures"][0])  # imported
    resident, read, began = resident_bytes(), _read_bytes(), time.process_time()
    with Measured(args) as measured:
        ff.merge(recipe, out=args.out, device=args.device)
    seconds = time.process_time() - began
    measured.say(cpu_seconds=seconds, started_gib=resident / 2**30, gib_read=(_read_bytes() - read) / 2**30)


def _read_bytes() -> int:
    """What the system gave this process of files so far, by its own count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


if __name__ == "__main__":
    main()
