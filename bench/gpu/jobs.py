"""Whole jobs from folders to a folder, each in a process of its own, beside what `plan` says of them."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

import featcal_fast as ff
from bench.gpu.sections import LeftOut, Row, Section
from bench.gpu.timing import Run
from bench.harness import process
from bench.harness.results import Results, Rows
from bench.jobs import run_job
from bench.workloads import VISION, WORKLOADS, Workload, model_bytes, write
from featcal_fast.streaming.machine import available_host_bytes

MEMORY_BACKED = Path("/dev/shm")


SHORT_LAYERS = 4
SHORT, LARGE = f"llama-8b, {SHORT_LAYERS} layers", "llama-8b"  # the one tells what the other takes


class Job(NamedTuple):
    """A row's name, what is calibrated, whether one expert stands for all (see `write`), about what it takes."""

    name: str
    work: Workload
    linked: bool
    seconds: float

    @property
    def disk_bytes(self) -> int:
        """Of models, the result and, for the official code, the merged model and its result; of images; and of the
        hidden states that are kept to resume from, student's and experts', twice."""
        work, models = self.work, 3 if self.linked else self.work.tasks + 4
        side, width = work.config.get("image_size", 0), work.config.get("hidden_size", 0)
        length = (side // work.config["patch_size"]) ** 2 + 1 if side else work.tokens
        states = 4 * length * width * getattr(torch, work.dtype).itemsize
        return int(1.02 * models * model_bytes(work)) + work.tasks * work.samples * (12 * side**2 + states)


def jobs(dry: bool) -> list[Job]:
    large = WORKLOADS[LARGE]
    found = [
        Job(SHORT, replace(large, config={**large.config, "num_hidden_layers": SHORT_LAYERS}), True, 60.0),
        Job(LARGE, large, True, 160.0),
        Job("clip-b32", WORKLOADS["clip-b32"], False, 60.0),
        Job("llama-1b", WORKLOADS["llama-1b"], True, 40.0),
    ]
    if dry:
        return [job._replace(work=replace(job.work.small, tasks=2), seconds=5.0) for job in found[:3]]
    return found


def rows(run: Run, results: Results) -> Iterator[Row]:
    for job in jobs(run.dry):
        with _written(job, run) as folder:
            yield Row(job.name, partial(_ours, job, folder, run), seconds(job, results))
            if job.work.model == VISION and run.official is not None:
                yield Row(f"{job.name}, official", partial(_official, folder, run), 4 * job.seconds)


def seconds(job: Job, results: Results) -> float:
    """About what a job takes: of the large one by the layers of the short one, if they were measured."""
    short = results.of("jobs").get(SHORT)
    if job.name != LARGE or short is None:
        return job.seconds
    more = job.work.config["num_hidden_layers"] / SHORT_LAYERS - 1
    return short["seconds"] + more * short["seconds_in_layers"]


@contextmanager
def _written(job: Job, run: Run) -> Iterator[Callable[[], Path]]:
    """A job's folder: written when it is first asked for, gone at the end."""
    made: list[Path] = []

    @cache
    def folder() -> Path:
        made.append(Path(tempfile.mkdtemp(prefix="featcal-bench-", dir=_place(job, run))))
        path = made[-1] / "job"
        write(job.work, path, run.device if job.linked else None)
        return path

    try:
        yield folder
    finally:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)


def _place(job: Job, run: Run) -> Path:
    """The first folder that has room for it."""
    free = {}
    for folder in run.folders:
        if folder.is_dir():
            free[folder] = shutil.disk_usage(folder).free
            if MEMORY_BACKED in (folder, *folder.parents):
                free[folder] = min(free[folder], available_host_bytes())
            if free[folder] > job.disk_bytes:
                return folder
    found = ", ".join(f"{folder} has {size / 2**30:.1f} free" for folder, size in free.items()) or "no such folder"
    raise LeftOut(f"takes about {job.disk_bytes / 2**30:.1f} GiB of disk; {found}; --folder names another")


def _ours(job: Job, folder: Callable[[], Path], run: Run, left: float) -> dict[str, Any]:
    began = time.monotonic()
    end, path = began + left, folder()
    written = time.monotonic() - began
    threads = 1 if run.dry else usable_processors()
    row = run_job(path, str(run.device), "--plan", threads=threads, timeout=end - time.monotonic())
    sizes = {name: getattr(job.work, name) for name in ("tasks", "samples", "tokens")}
    where = {"folder": str(path.parent.parent), "seconds_writing": round(written, 2), "threads": threads}
    return {**sizes, **where, **row}


def usable_processors() -> int:
    """How many this process may keep busy: a container's share of them may be smaller than their number."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")  # microseconds of each period, or "max"
    share, period = quota.read_text().split() if quota.exists() else ("max", "1")
    return count if share == "max" else max(1, min(count, int(share) // int(period)))


def _official(folder: Callable[[], Path], run: Run, left: float) -> dict[str, Any]:
    """The official demo's own `calibrate`, without reading models and writing the result."""
    assert run.official is not None
    end, path = time.monotonic() + left, folder()
    if not (path / "merged").exists():
        ff.merge(path / "recipe.json", out=path / "merged")
    command = run.official.command(path, path / "official.safetensors", "--device", run.device)
    return process.last_json(command, end - time.monotonic())


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    found = []
    for name, row in rows.items():
        plan = row.get("plan", {})
        line = {"job": name, "tasks": row.get("tasks"), "samples": row.get("samples"), "seconds": row["seconds"]}
        line |= {"GPU GiB": row.get("peak_device_gib"), "planned": plan.get("device")}
        line |= {"host GiB": row.get("peak_host_gib", row.get("peak_gib")), "planned host": plan.get("host")}
        found.append(line | {"GiB read": row.get("gib_read")})
    return found


def notes(rows: Rows, peak: float) -> list[str]:
    """Where each job's seconds went."""
    phases = {name: row["seconds_by_phase"] for name, row in rows.items() if "seconds_by_phase" in row}
    rest = {name: rows[name]["seconds"] - sum(found.values()) for name, found in phases.items()}
    return [
        f"{name}, seconds: {', '.join(f'{phase} {value:.3g}' for phase, value in found.items())}, "
        f"the rest {rest[name]:.3g}."
        for name, found in phases.items()
    ]


JOBS = Section("jobs", 0.36, rows, "Whole jobs, folders to a folder", lines, notes)
