"""Whole jobs from folders to a folder: seconds, and peak memory beside what `plan` says of it.

    python -m bench.jobs                            # the small ones
    python -m bench.jobs clip-b32 clip-l14 flan-t5-base llama-1b      # the paper's settings at their true shapes
    python -m bench.jobs clip-b32 --samples 128 --tasks 4 --layers 6 --scratch /tmp     # what the peak depends on
    python -m bench.jobs --toy clip-b32 llama-8b    # tiny models, to see that everything works

Random weights and data are written under `--folder` once. Each job is planned in one process, from headers, and run in
another, which reads the folders, merges on the fly, calibrates and writes the result; the highest resident memory
(VmHWM) and the highest allocation on a GPU are what counts. Results go to `bench/results/jobs-<device>.json`, job by
job; one that was run before is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import featcal_fast as ff
from bench.machine import machine
from bench.phases import clocked
from bench.workloads import WORKLOADS, Workload, write
from featcal_fast.streaming.machine import configure_process, peak_resident_bytes

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(WORKLOADS)
    parser.add_argument("jobs", nargs="*", default=["clip-small", "llama-small"], metavar="JOB", help=f"of {names}")
    parser.add_argument("--toy", action="store_true", help="tiny models; nothing is kept in bench/results")
    for what in ("samples", "tasks", "layers"):
        parser.add_argument(f"--{what}", type=int, help="in place of the job's own number")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", help="folder for hidden states; without it they wait in memory")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "featcal-bench")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        steps, folder = {"plan": _plan, "run": _run, "both": _both}, Path(args.worker[1])
        print(json.dumps(steps[args.worker[0]](folder, args)))
        return
    for name in args.jobs:
        if name not in WORKLOADS:
            parser.error(f"unknown job {name!r}; expected one of {names}")

    kind = torch.device(args.device).type
    path = (args.folder if args.toy else ROOT / "bench" / "results") / f"jobs-{kind}.json"
    for name in args.jobs:
        work = _changed(WORKLOADS[name].small if args.toy else WORKLOADS[name], args)
        label = name + "".join(
            f"-{getattr(args, key)}-{key}" for key in ("samples", "tasks", "layers") if getattr(args, key)
        )
        folder = args.folder / (f"toy-{label}" if args.toy else label)
        write(work, folder)
        found = _measure(folder, args)
        results = json.loads(path.read_text()) if path.exists() else {}
        key = label + ("-scratch" if args.scratch else "")
        described = {key: value for key, value in asdict(work).items() if key not in ("config", "toy")}
        results[key] = {**described, **found, "machine": machine(args.threads)}
        path.write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps({"job": key, **found}), flush=True)
    print(f"Wrote {path}")


def _changed(work: Workload, args: argparse.Namespace) -> Workload:
    changes = {key: getattr(args, key) for key in ("samples", "tasks") if getattr(args, key)}
    if args.layers:
        keys = [key for key in ("num_hidden_layers", "num_layers", "num_decoder_layers") if key in work.config]
        changes["config"] = {**work.config, **dict.fromkeys(keys, args.layers)}
    return replace(work, **changes)


def _measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Plan and run, each in a process of its own, and a look at what was written."""
    out = folder / "out"
    options = (args.device, args.threads, args.scratch)
    planned, found = _in_a_process("plan", folder, *options), run_job(folder, *options)
    if not same_tensors(folder):
        raise SystemExit(f"{out}: tensors differ in name, shape or dtype from those of {folder / 'base'}")
    shutil.rmtree(out)
    kinds = [kind for kind in ("host", "device") if found[f"peak_{kind}_gib"]]
    errors = {f"plan_{kind}_error": round(planned[kind] / found[f"peak_{kind}_gib"] - 1, 3) for kind in kinds}
    return {**found, "plan": planned, **errors}


def run_job(folder: Path, device: str, threads: int, scratch: str | None) -> dict[str, Any]:
    """Run a workload's recipe in a process of its own; its result is in `folder/out`."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    return _in_a_process("run", folder, device, threads, scratch)


def _in_a_process(step: str, folder: Path, device: str, threads: int, scratch: str | None) -> dict[str, Any]:
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    command = worker_command(step, folder, device, threads, scratch)
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def worker_command(step: str, folder: Path, device: str, threads: int, scratch: str | None = None) -> list[str]:
    """What plans, runs, or does both in one process; its last line is what it found, as JSON."""
    command = [sys.executable, "-m", "bench.jobs", "--worker", step, str(folder), "--device", device]
    return [*command, "--threads", str(threads), *(["--scratch", scratch] if scratch else [])]


def _both(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    planned = _plan(folder, args)
    return {**_run(folder, args), "plan": planned}


def _plan(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    configure_process()  # as the command does
    recipe = json.loads((folder / "recipe.json").read_text())
    started = time.perf_counter()
    plan = ff.plan({**recipe, "out": str(folder / "out")}, device=args.device, scratch=args.scratch)
    seconds = time.perf_counter() - started
    gib = {"host": plan.host_bytes / 2**30, "device": plan.device_bytes / 2**30, "seconds": seconds}
    items = {
        f"{kind}: {name}": size / 2**20
        for kind, all_ in (("host", plan.host), ("device", plan.device_items))
        for name, size in all_.items()
    }
    rounded = {name: round(value, 3) for name, value in gib.items()}
    return {
        **rounded,
        "TFLOP": round(sum(plan.flops.values()) / 1e12, 2),
        "MiB": {k: round(v) for k, v in items.items()},
    }


def _run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    configure_process()
    recipe = json.loads((folder / "recipe.json").read_text())
    on_gpu = torch.device(args.device).type == "cuda"
    started = time.perf_counter()
    with _Energy(on_gpu) as energy, clocked(torch.device(args.device)) as phases:
        report = ff.calibrate(recipe, out=folder / "out", device=args.device, scratch=args.scratch)
        seconds = time.perf_counter() - started
        by_phase = phases()
    return {
        "seconds": round(seconds, 2),
        "seconds_by_phase": by_phase,
        "seconds_in_layers": round(sum(layer.seconds for layer in report.layers), 2),
        "peak_host_gib": round(peak_resident_bytes() / 2**30, 3),
        "peak_device_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else 0,
        "tokens_calibrated": sum(report.tokens.values()),
        "calibrated_weights": report.calibrated,
        "linear_weights": report.calibrated + len(report.kept),
        "gib_read": round(sum(report.bytes_read.values()) / 2**30, 3),
        **({"gpu_watt_hours": round(energy.joules / 3600, 3)} if energy.joules else {}),
    }


class _Energy:
    """The GPU's power, summed up while the context lasts; 0 where it cannot be asked for."""

    def __init__(self, on_gpu: bool) -> None:
        self.joules = 0.0
        self._on = on_gpu
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Energy:
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


def same_tensors(folder: Path) -> bool:
    """Whether a job's result has the names, shapes and dtypes of its base model."""
    return _headers(folder / "out") == _headers(folder / "base")


def _headers(folder: Path) -> dict[str, tuple[list[int], str]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                header = file.get_slice(name)
                found[name] = header.get_shape(), header.get_dtype()
    return found


if __name__ == "__main__":
    main()
