"""Reading behind computing: a job whose disk is slowed down takes little longer than the slower of the two.

    python -m bench.overlap                 # writes bench/results/overlap-cpu.json

The job is run as it is, which gives the time that computing takes. Then every read of a tensor is made to wait, so that
all reads together take `--factor` times that, and the job is run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import featcal_fast as ff
from bench.machine import machine
from bench.workloads import VISION, Workload, write
from featcal_fast.checkpoints.shards import Shards

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 12}
JOB = Workload(VISION, {**CONFIG, "image_size": 224, "patch_size": 32}, tasks=4, samples=48)


class SlowDisk:
    """Within the context, tensors are read at a given rate, by one thread at a time; without a rate, as they are."""

    def __init__(self, bytes_a_second: float | None) -> None:
        self.rate, self.seconds = bytes_a_second, 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> SlowDisk:
        self._read = read = Shards.read

        def slow(shards: Shards, *args: Any, **kwargs: Any) -> Any:
            with self._lock:
                began, before = time.perf_counter(), shards.bytes_read
                tensors = read(shards, *args, **kwargs)
                if self.rate is not None:
                    due = (shards.bytes_read - before) / self.rate
                    time.sleep(max(0.0, due - (time.perf_counter() - began)))
                self.seconds += time.perf_counter() - began
            return tensors

        Shards.read = slow  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Shards.read = self._read  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=2.0, help="times the computation that reading shall take")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "featcal-bench")
    args = parser.parse_args()
    folder = args.folder / "overlap"
    recipe = write(JOB, folder)
    with SlowDisk(None), tempfile.TemporaryDirectory(dir=folder) as out:
        ff.calibrate(recipe, out=Path(out) / "out")  # warms up
        started = time.perf_counter()
        report = ff.calibrate(recipe, out=Path(out) / "again")
        compute = time.perf_counter() - started
    rate = sum(report.bytes_read.values()) / (args.factor * compute)
    with SlowDisk(rate) as disk, tempfile.TemporaryDirectory(dir=folder) as out:
        started = time.perf_counter()
        ff.calibrate(recipe, out=Path(out) / "out")
        total = time.perf_counter() - started
    found = {
        "compute_seconds": round(compute, 2),
        "read_seconds": round(disk.seconds, 2),
        "total_seconds": round(total, 2),
        "over_the_slower": round(total / max(compute, disk.seconds) - 1, 3),
        "over_the_sum": round(total / (compute + disk.seconds) - 1, 3),
        "MB_a_second": round(rate / 1e6, 1),
        "machine": machine(),
    }
    path = ROOT / "bench" / "results" / "overlap-cpu.json"
    path.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
