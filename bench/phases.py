"""Where time goes: a clock of phases, and one that reads a job's by wrapping the steps that the loop is made of."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any

import torch


class Clock:
    """Milliseconds by phase; on a GPU by events, read at the end: how long the device was at it, waiting included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans[phase].append((start, self._now()))

    def read(self) -> dict[str, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return {phase: sum(a.elapsed_time(b) for a, b in spans) for phase, spans in self._spans.items()}
        return {phase: sum(b - a for a, b in spans) * 1e3 for phase, spans in self._spans.items()}

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


STUDENT, MOMENTS = "student's forward", "moments"


@contextmanager
def clocked(device: torch.device) -> Iterator[Callable[[], dict[str, float]]]:
    """Within the context the engine's steps are timed; what it gives tells each phase's seconds so far.

    The rest of a job is opening models, planning, drift, reports and writing.
    """
    clock, loop, streams = Clock(device), "featcal_fast.calibrate", "featcal_fast.streaming.streams"
    # The names of whoever calls them, not what they stand for: plans use that too.
    steps = {
        "Streams.enter": "entering",
        "BlockPrefetcher.next": "waiting for blocks",
        "forward_expert": "experts' forward",
        "forward_student": STUDENT,
        "TaskMoments.add": MOMENTS,
        "Chain.add": "fold",
        "solve_together": "solve",
        "Streams.advance_student": "advance",
        "Streams.save": "keeping hidden states",
    }

    def seconds() -> dict[str, float]:
        found = clock.read()
        if STUDENT in found:  # its moments are taken within it
            found[STUDENT] -= found.get(MOMENTS, 0.0)
        return {phase: found[phase] / 1e3 for phase in steps.values() if phase in found}

    with ExitStack() as stack:
        for step, phase in steps.items():
            name, _, method = step.partition(".")
            caller = import_module(streams if name == "BlockPrefetcher" else loop)
            own = getattr(caller, name)
            stack.callback(setattr, caller, name, own)
            timed = _timed(getattr(own, method) if method else own, clock, phase)
            setattr(caller, name, type(name, (own,), {method: timed}) if method else timed)
        yield seconds


def _timed(step: Callable[..., Any], clock: Clock, phase: str) -> Callable[..., Any]:
    @wraps(step)
    def timed(*args: Any, **options: Any) -> Any:
        with clock(phase):
            return step(*args, **options)

    return timed
