"""featcal_fast on a workload's folder, from disk to disk: `python -m bench.workers.ours FOLDER OUT --settings JSON`."""

from __future__ import annotations

import argparse
import json
import threading
import time
from contextlib import suppress
from typing import Any

import featcal_kernels.ops
import torch
import transformers

import featcal_fast as ff
from bench.phases import clocked
from bench.workers import Measured, options
from featcal_fast.checkpoints.shards import Shards
from featcal_fast.streaming.malloc import configure_process


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, arguments)
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
    with SlowDisk(args.read_rate) as disk, Energy(args.device) as energy, clocked(args.device) as phases:
        with Measured(args) as measured:
            report = ff.calibrate(recipe, out=args.out, device=args.device, scratch=args.scratch)
        by_phase = phases()
    found |= {
        "seconds_by_phase": {phase: round(seconds, 3) for phase, seconds in by_phase.items()},
        "seconds_in_layers": round(sum(layer.seconds for layer in report.layers), 2),
        "gib_read": round(sum(report.bytes_read.values()) / 2**30, 3),
        "tokens_calibrated": sum(report.tokens.values()),
        "calibrated_weights": report.calibrated,
        "linear_weights": report.calibrated + len(report.kept),
    }
    if energy.joules:
        found["gpu_watt_hours"] = round(energy.joules / 3600, 3)
    if args.read_rate:
        found["seconds_reading"] = round(disk.seconds, 2)
    measured.say(**found)


def _plan(recipe: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    plan = ff.plan({**recipe, "out": str(args.out)}, device=args.device, scratch=args.scratch)
    seconds = time.perf_counter() - started
    items = {"host": plan.host, "device": plan.device_items}
    return {
        "host": round(plan.host_bytes / 2**30, 3),
        "device": round(plan.device_bytes / 2**30, 3),
        "seconds": round(seconds, 3),
        "TFLOP": round(sum(plan.flops.values()) / 1e12, 2),
        "MiB": {f"{kind}: {name}": round(size / 2**20) for kind, all_ in items.items() for name, size in all_.items()},
    }


class SlowDisk:
    """Within the context, tensors are read at a given rate, by one thread at a time; without a rate, as they are."""

    def __init__(self, bytes_a_second: float | None) -> None:
        self.rate, self.seconds = bytes_a_second, 0.0
        self._lock = threading.Lock()

    def __enter__(self) -> SlowDisk:
        self._read = Shards.read
        if self.rate is not None:
            Shards.read = lambda shards, *args, **kwargs: self._slow(shards, *args, **kwargs)  # type: ignore[method-assign]
        return self

    def _slow(self, shards: Shards, *args: Any, **kwargs: Any) -> Any:
        assert self.rate is not None
        with self._lock:
            began, before = time.perf_counter(), shards.bytes_read
            tensors = self._read(shards, *args, **kwargs)
            due = (shards.bytes_read - before) / self.rate
            time.sleep(max(0.0, due - (time.perf_counter() - began)))
            self.seconds += time.perf_counter() - began
        return tensors

    def __exit__(self, *_: object) -> None:
        Shards.read = self._read  # type: ignore[method-assign]


class Energy:
    """The GPU's power, summed up while the context lasts; 0 where it cannot be asked for."""

    def __init__(self, device: torch.device) -> None:
        self.joules = 0.0
        self._on = device.type == "cuda"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Energy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        with suppress(Exception):  # no NVML, or a GPU that does not say
            before = time.perf_counter()
            while self._on and not self._stop.wait(0.1):
                watts, now = torch.cuda.power_draw() / 1000, time.perf_counter()
                self.joules, before = self.joules + watts * (now - before), now


if __name__ == "__main__":
    main()
