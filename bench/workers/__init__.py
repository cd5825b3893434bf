"""What `bench.compare` runs, each in a process of its own: `python -m bench.workers.NAME FOLDER OUT ...`.

`FOLDER` holds a workload: `base`, `merged`, a folder an expert, `<task>.safetensors`, `recipe.json`. A worker writes
the calibrated weights to `OUT` and prints `{"seconds": ..., "peak_gib": ...}` as its last line.
"""

from __future__ import annotations

from pathlib import Path


def peak_gib() -> float:
    """The most memory this process held. Not `ru_maxrss`: a child takes over its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20
