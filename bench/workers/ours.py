"""featcal_fast on a workload's folder, from disk to disk: `python -m bench.workers.ours FOLDER OUT --settings JSON`."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import featcal_kernels.ops
import transformers

import featcal_fast as ff
from bench.harness.results import write_whole
from bench.phases import clocked
from bench.workers import Measured, options
from featcal_fast.checkpoints.shards import Shards
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport
from featcal_fast.streaming.malloc import configure_process


def main(arguments: list[str] | None = None) -> None:
    args, began = options(__doc__, arguments), time.perf_counter()
    recipe = json.loads((args.folder / "recipe.json").read_text())
    recipe["settings"] |= args.settings
    if args.merged:
        del recipe["merge"]
        recipe["merged_model"] = str(args.folder / "merged")
    configure_process()  # as the command does
    if args.plain_ops:
        featcal_kernels.ops._gpu_module = lambda device: None
    config = json.loads((args.folder / "base/config.json").read_text())
    getattr(transformers, config["architectures"][0])  # imported
    found: dict[str, Any] = {"plan": _plan(recipe, args)} if args.plan else {}
    with SlowDisk(args.read_rate) as disk, clocked(args.device) as phases:
        progress = SoFar(args.so_far, began, phases) if args.so_far else None
        with Measured(args) as measured:
            report = ff.calibrate(
                recipe, out=args.out, device=args.device, scratch=args.scratch, progress=progress, fresh=True
            )
        by_phase = phases()
    found |= {
        "seconds_by_phase": {phase: round(seconds, 3) for phase, seconds in by_phase.items()},
        "seconds_in_layers": round(sum(layer.seconds for layer in report.layers), 2),
        "gib_read": round(sum(report.bytes_read.values()) / 2**30, 3),
        "tokens_calibrated": sum(report.tokens.values()),
        "calibrated_weights": report.calibrated,
        "linear_weights": report.calibrated + len(report.kept),
    }
    if args.read_rate:
        found["seconds_reading"] = round(disk.seconds, 2)
    measured.say(**found)


def _plan(recipe: dict[str, Any], args: argparse.Namespace) -> dict[str, float]:
    plan = ff.plan({**recipe, "out": str(args.out)}, device=args.device, scratch=args.scratch)
    return {
        "host": round(plan.host_bytes / 2**30, 3),
        "device": round(plan.device_bytes / 2**30, 3),
        "TFLOP": round(sum(plan.flops.values()) / 1e12, 2),
    }


class SoFar(Progress):
    """Keeps how far a run is, for when it is ended; for that the host waits for the device after each layer."""

    def __init__(self, path: Path, began: float, phases: Callable[[], dict[str, float]]) -> None:
        self._path, self._began, self._phases = path, began, phases
        self._done = self._all = 0

    def stage(self, layers: int, tokens: int) -> None:
        self._all = self._done + layers
        self._keep()

    def layer(self, report: LayerReport) -> None:
        self._done += 1
        self._keep()

    def _keep(self) -> None:
        phases = self._phases()
        found = {"layers": self._done, "of": self._all, "seconds": time.perf_counter() - self._began}
        write_whole(self._path, {**found, "seconds_by_phase": phases})


class SlowDisk:
    """Within the context, tensors are read at a given rate, by one thread at a time; without a rate, as they are."""

    def __init__(self, bytes_a_second: float | None) -> None:
        self.rate, self.seconds = bytes_a_second, 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> SlowDisk:
        self._fill = Shards._fill
        if self.rate is not None:
            Shards._fill = lambda *args: self._slow(*args)  # type: ignore[method-assign]
        return self

    def _slow(self, shards: Shards, *args: Any) -> None:
        assert self.rate is not None
        with self._lock:
            began, before = time.perf_counter(), shards.bytes_read
            self._fill(shards, *args)
            due = (shards.bytes_read - before) / self.rate
            time.sleep(max(0.0, due - (time.perf_counter() - began)))
            self.seconds += time.perf_counter() - began

    def __exit__(self, *_: object) -> None:
        Shards._fill = self._fill  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
