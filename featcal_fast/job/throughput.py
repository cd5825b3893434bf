"""How long runs took on this machine, kept in the user's cache folder, and what that says of one to come.

`rates.json` holds the newest runs, a line's worth each. A job is compared with those on the same device, with as many
threads, in a process set up alike, in the same dtype and of like widths, by the operations of each kind of work: a CPU
multiplies bfloat16 many times faster than it solves, and how much of a job is which depends on its samples.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import quantiles

import torch

from featcal_fast import files
from featcal_fast.job.products import Speeds, measure_products
from featcal_fast.planning.duration import Duration
from featcal_fast.planning.plan import Plan
from featcal_fast.reporting.forms import FormError, build
from featcal_fast.streaming.machine import processor
from featcal_fast.streaming.malloc import is_configured
from featcal_fast.untrusted.documents import parse_json

SHORTEST, LONG_ENOUGH = 20, 60  # seconds of a run that says something, and of one that says enough
EACH, MOST = 16, 256  # runs that are kept of those that are alike, and in all
ALIKE = 2  # factor by which widths may differ
# Times that a run may take longer than the median, or less: data is uneven, and machines are busy. One run says less
# than several do.
SPREAD, SPREAD_OF_FEW, FEW = 1.25, 1.5, 2
# What runs took on a CPU: so many times what their products alone would have, and besides, at most, some seconds and
# what it takes to read, dequantise, merge, hash and write so many bytes a second.
LEAST_TIMES, MOST_TIMES, BESIDE, BYTES = 0.8, 2.2, 5, 1e8
LARGEST = 1e30  # number that means something


@dataclass(frozen=True)
class Run:
    """What a run took, or what there is to be done by one.

    Attributes:
        device: the name of the processor or of the GPU.
        threads: of the processor; 0 on a GPU.
        program: whether the process was set up for it, as the command's is: on a CPU, others take longer.
        dtype: of the products in models' layers.
        width: of the largest matrix, the geometric mean of its sides.
        flops: floating-point operations by kind of work.
        seconds: wall clock.
    """

    device: str
    threads: int
    program: bool
    dtype: str
    width: float
    flops: dict[str, float]
    seconds: float = 0.0

    @property
    def kind(self) -> tuple[str, int, bool, str]:
        return self.device, self.threads, self.program, self.dtype

    def is_like(self, other: Run) -> bool:
        return self.kind == other.kind and 1 / ALIKE <= self.width / other.width <= ALIKE

    @property
    def is_sound(self) -> bool:
        """Whether a run's numbers may be these."""
        numbers = [self.width, self.seconds, sum(self.flops.values())]
        return all(1 <= each < LARGEST for each in numbers) and min(self.flops.values()) >= 0


def expected(plan: Plan) -> Duration | None:
    """How long a job will take, by the median of like runs here; on a CPU without any, by products measured now.

    On a CPU runs count whose products alone would take half a minute, or half of what the job's would: others are of
    what there is besides. On a GPU, those of at least a minute, or of half of the job's operations.

    Args:
        plan: of the job.

    Returns:
        None for a GPU that is not here, or on which nothing like it was run; and for several ranks.
    """
    if plan.ranks:
        return None
    with suppress(RuntimeError, AssertionError):  # no such device, no memory
        job = _described(plan, plan.flops)
        like = [run for run in _known() if run.is_like(job)]
        if torch.device(plan.device).type == "cpu":
            speeds, now = measure_products(plan)
            alone = speeds.seconds(job.flops)
            if runs := [run for run in like if speeds.seconds(run.flops) >= min(LONG_ENOUGH, alone) / 2]:
                return _as_runs(runs, speeds, alone)
            moved = sum(plan.bytes_read.values()) + sum(plan.bytes_written.values())
            busy = max(now.seconds(job.flops), 1e-9) / max(alone, 1e-9)
            most = (MOST_TIMES * alone + BESIDE + moved / BYTES) * busy
            return Duration(LEAST_TIMES * alone, most, "by products measured just now")
        alike = Speeds({"any": 1.0})  # each kind of work runs on the same units
        alone = alike.seconds(job.flops)
        if runs := [run for run in like if run.seconds >= LONG_ENOUGH or alike.seconds(run.flops) >= alone / 2]:
            return _as_runs(runs, alike, alone)
    return None


def remember(plan: Plan, first: int, seconds: float) -> None:
    """Keep what a run took for estimates to come; where that cannot be, do nothing.

    Args:
        plan: of the job.
        first: the layer that the run began with; those before it were done by another one.
        seconds: of this run alone.
    """
    done: Counter[str] = Counter()
    for layer in plan.layers[first:]:
        done.update(layer.flops)
    if seconds < SHORTEST or sum(done.values()) < sum(plan.flops.values()) / 2:
        return  # what there is beside the layers weighs too much
    with suppress(OSError, RuntimeError, AssertionError):
        run = replace(_described(plan, dict(done)), seconds=round(seconds, 2))
        path, others = _path(), _known()
        same = [each for each in others if each.is_like(run)]
        kept = [each for each in others if each not in same[: 1 - EACH]]
        if not path.parent.is_dir():
            files.make_folder(path.parent)
        lines = ",\n".join(json.dumps(asdict(each)) for each in [*kept, run][-MOST:])
        files.replace_bytes(path, f'{{"runs": [\n{lines}\n]}}\n'.encode())


def _described(plan: Plan, flops: dict[str, float]) -> Run:
    device = torch.device(plan.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    threads, program = (0, False) if device.type == "cuda" else (torch.get_num_threads(), is_configured())
    return Run(name, threads, program, plan.dtype, round(math.sqrt(math.prod(plan.largest_matrix))), flops)


def _as_runs(runs: list[Run], speeds: Speeds, alone: float) -> Duration:
    """What runs took, for a job whose products would take `alone`: around their median, and what half of them took."""
    times = [run.seconds / speeds.seconds(run.flops) for run in runs]
    first, middle, last = quantiles(times, method="inclusive") if len(times) > 1 else times * 3
    spread = SPREAD if len(runs) > FEW else SPREAD_OF_FEW
    count = "a run" if len(runs) == 1 else f"{len(runs)} runs"
    low, high = min(first, middle / spread), max(last, middle * spread)
    return Duration(low * alone, high * alone, f"as {count} like it took here")


def _known() -> list[Run]:
    """What the file holds that may be runs, the newest last; nothing where it cannot be read, or is none of ours."""
    try:
        found = parse_json(files.read_bytes(_path()))
    except (OSError, RuntimeError, ValueError):  # RuntimeError: no home
        return []
    lines = found.get("runs") if isinstance(found, dict) else None
    runs = []
    for line in lines[-MOST:] if isinstance(lines, list) else []:
        with suppress(FormError):
            if (run := build(Run, line)).is_sound:
                runs.append(run)
    return runs


def _path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "featcal_fast" / "rates.json"
