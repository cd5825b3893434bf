"""A run that was stopped goes on, with the same bits: what it left, and what is left for the next one.

The output's own files hold the weights of the layers that are done. Beside them are the hidden states that left the
last of these layers, and a manifest: first what the job is (`fingerprint`), then, each time that everything so far is
on the disk, a line that says so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from featcal_fast import files
from featcal_fast.calibrate import Output
from featcal_fast.checkpoints import REPORT, CheckpointWriter, Manifest, WorkFolder, work_path, write_errors
from featcal_fast.errors import FeatCalError, ResumeError
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.job.check import MAX_REPORT
from featcal_fast.job.fingerprint import Digested, Facts, differences
from featcal_fast.job.interrupts import finish_first
from featcal_fast.models.structure import Layer
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.forms import FormError, build
from featcal_fast.reporting.outcome import Outcome
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport, Report, finite
from featcal_fast.streaming.scratch import Snapshots
from featcal_fast.streaming.sources import CheckpointSource
from featcal_fast.streaming.streams import Streams

PATIENCE = 30  # times what it took to keep a run the last time, until the next, where nobody says how often to

WAYS = "--resume goes on from there, --fresh starts over"

# What the lines of a manifest hold: the first one, and those of the layers.
FIRST: dict[str, tuple[type, ...]] = {"fingerprint": (dict,), "layers": (int, type(None))}
LAYER: dict[str, tuple[type, ...]] = {
    **{"layer": (int,), "stage_ends": (bool,), "states": (dict, type(None)), "reports": (list,), "kept": (dict,)},
    **{"outcome": (dict, type(None)), "tensors": (dict,), "data": (dict,), "chunk": (int, type(None))},
    **{"phases": (dict,), "bytes_read": (dict,)},
}
COUNTS = ("phases", "bytes_read")  # of a layer: numbers by name


class Past:
    """What an earlier run into the same output has made durable: lines of its manifest.

    Attributes:
        layers: how many are done.
        hashes: of the tensors that are written.
        chunk: tokens that passed a layer at a time; None if nothing was run.
        phases: seconds that it took, by phase.
        bytes_read: by model.
        put_back: whether merged weights were to take the place of all calibrated ones.
    """

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        first: dict[str, Any] = entries[0] if entries else {"fingerprint": {}}
        self.facts: Facts | None = first["fingerprint"] if entries else None
        self.total: int = first.get("layers") or 0
        self.finished = bool(entries) and "finished" in entries[-1]
        self.lines = [entry for entry in entries[1:] if "layer" in entry]
        for entry, form in [(first, FIRST), *((line, LAYER) for line in self.lines)]:
            for key, kinds in form.items():
                if not isinstance(entry.get(key), kinds):
                    raise TypeError(key)
        for each in (number for line in self.lines for key in COUNTS for number in line[key].values()):
            if type(each) not in (int, float):
                raise TypeError(each)
        last: dict[str, Any] = self.lines[-1] if self.lines else {}
        self.layers: int = last.get("layer", -1) + 1
        self.chunk: int | None = last.get("chunk")
        self.phases: dict[str, float] = last.get("phases", {})
        self.bytes_read: dict[str, int] = last.get("bytes_read", {})
        self.hashes: dict[str, str] = {}
        self.states: dict[int, Any] = {}  # that are still needed, by layer
        self.reports: dict[int, list[LayerReport]] = {}  # that became durable, by the last one's layer
        for line in self.lines:
            self.reports[line["layer"]] = [build(LayerReport, each) for each in line["reports"]]
            self.hashes |= line["tensors"]
            if line["states"] and (line is last or line["stage_ends"]):
                self.states[line["layer"]] = line["states"]
        self.put_back = any("put_back" in entry for entry in entries)
        for name in (name for entry in entries for name in entry.get("put_back", ())):
            self.hashes.pop(name, None)

    def phases_with(self, clock: Clock) -> dict[str, float]:
        """Seconds by phase of all runs up to now, the last of which has `clock`."""
        return {phase: self.phases.get(phase, 0.0) + own for phase, own in clock.seconds.items()}

    def check(self, facts: Facts) -> None:
        """Raises:
        ResumeError: it was another job, or on another machine."""
        compared = ("recipe", "inputs") if self.finished else tuple(facts)
        if self.facts is None:
            return
        if different := differences(*({name: each.get(name) for name in compared} for each in (self.facts, facts))):
            raise ResumeError(
                f"out: the interrupted run cannot be gone on with, its bits might be others: {different}; put that "
                "back and --resume, or start over with --fresh"
            )

    def check_chunk(self, chunk: int) -> None:
        """Raises:
        ResumeError: there is no memory for as many tokens at a time as passed a layer before."""
        if self.chunk is not None and chunk < self.chunk:
            raise ResumeError(
                f"out: in the interrupted run {self.chunk:,} tokens passed a layer at a time, for which memory does "
                f"not do now ({chunk:,} would fit); free memory and try again, or --fresh starts over"
            )


def find_past(work: WorkFolder, *, resume: bool, fresh: bool) -> Past:
    """What an earlier run has left in the work folder: to go on with, or, with `fresh`, nothing any more.

    Raises:
        ResumeError: something was left, and nobody said what to do with it.
    """
    with write_errors(work.out):
        if fresh or work.published:
            work.clear()
        if work.left_behind and not resume:
            raise ResumeError(left_behind(work.out))
        past = read_past(work.manifest)
        if not past.layers and not work.finished:
            work.clear()
            return Past([])
    return past


def read_past(manifest: Manifest) -> Past:
    """What a manifest tells.

    Raises:
        ResumeError: it is of another form.
    """
    try:
        return Past(manifest.entries)
    except (KeyError, TypeError, AttributeError, FormError):
        raise ResumeError(f"{manifest.path} is of another version of featcal_fast; --fresh starts over") from None


def finished_report(work: WorkFolder) -> Report:
    """What an earlier run says, which lacked nothing but the output's name.

    Raises:
        ResumeError: it does not, any more.
    """
    path = work.model / REPORT
    try:
        return Report.from_json(files.read_text(path, MAX_REPORT))
    except (OSError, ValueError, FeatCalError) as error:
        raise ResumeError(f"out: {path} is not as the finished run wrote it: {error}; --fresh starts over") from error


def left_behind(out: Path) -> str:
    """What an interrupted run into `out` has left, and what can be done with it; empty if nothing."""
    folder = work_path(out)
    with write_errors(out):
        if not folder.is_dir():
            return ""
        manifest = Manifest(folder / "manifest")
    past = read_past(manifest)
    if manifest.finished:
        if not (folder / "model").is_dir():  # it has its name
            return ""
        return (
            f"out: {folder} holds a finished model that could not be given its name, {out}: --resume gives it, "
            "--fresh removes it and starts over"
        )
    if past.layers:
        return f"out: an interrupted run into {out} has left {past.layers} of {past.total} layers in {folder}: {WAYS}"
    return f"out: an interrupted run into {out} has left {folder}, no layer of it done: --resume or --fresh starts over"


@contextmanager
def telling_what_is_kept(work: WorkFolder, progress: Progress) -> Iterator[None]:
    """Whatever ends a run early says whether it can be gone on with."""
    try:
        yield
    except ResumeError:
        raise
    except FeatCalError as error:
        if work.keep and not work.finished:
            error.args = (f"{error}; what is done is kept: {WAYS}",)
        raise
    except (KeyboardInterrupt, SystemExit):
        if (work.out / REPORT).exists():
            progress.interrupted(f"out: {work.out} was finished before the signal came")
        else:
            progress.interrupted(left_behind(work.out) if work.keep else "")
        raise


class Resumable(Output):
    """Writes layers to the output, and now and then makes sure that the run can go on after them.

    Args:
        student: the merged model, for the output's names of its tensors.
        writer: of the output.
        work: where it is made.
        models: that are read.
        past: what is done already.
        batches: of every task.
        every: after how many layers what is done is made durable; None for as often as that takes a thirtieth of the
            time, 0 for never.
        clock: of this run.
    """

    def __init__(
        self,
        student: CheckpointSource,
        writer: CheckpointWriter,
        work: WorkFolder,
        models: RecipeModels,
        past: Past,
        batches: Mapping[str, Digested],
        every: int | None,
        clock: Clock,
    ) -> None:
        super().__init__(self._write, self._put_back)
        self._student, self._writer, self._work, self._models = student, writer, work, models
        self._past, self._batches, self._every, self._clock = past, batches, every, clock
        self.first = self._durable = past.layers
        self.was_put_back = past.put_back
        self._recorded = set(past.hashes)  # tensors
        self._since = time.perf_counter()
        self._cost = 0.0  # seconds that it took the last time
        if every != 0 or past.layers:
            self.snapshots = Snapshots(work.states, [states["file"] for states in past.states.values()])

    def __enter__(self) -> Resumable:
        return self

    def __exit__(self, *_: object) -> None:
        if self.snapshots is not None:
            self.snapshots.close()

    @property
    def bytes_read(self) -> dict[str, int]:
        """By model, of all runs so far."""
        return {label: self._past.bytes_read.get(label, 0) + size for label, size in self._models.bytes_read.items()}

    def restore(self, layer: Layer, report: Report, streams: Streams) -> None:
        line = next((line for line in self._past.lines if line["layer"] == layer.index), None)
        if line is None:  # it comes with a later one
            return
        self._check_data(line["data"])
        report.layers += self._past.reports[layer.index]
        report.kept |= line["kept"]
        report.outcome = None if line["outcome"] is None else build(Outcome, line["outcome"])
        if layer.index in self._past.states:
            streams.restore(self._past.states[layer.index])

    def _put_back(self) -> None:
        layers = range(len(self._student.structure.layers))
        names = {name for index in layers for name in self._student.block_tensors(index)}
        if self._durable and not self._past.put_back:
            with write_errors(self._work.out):
                self._work.manifest.append({"put_back": sorted(names)})  # before the first of them is another
        self._writer.forget(names)

    def keep(self, layer: Layer, report: Report, streams: Streams) -> None:
        if self._every == 0 or not self._due(layer):
            return
        began = time.perf_counter()
        with finish_first():
            self._make_durable(layer, report, streams)
        self._since = time.perf_counter()
        self._cost = self._since - began

    def _write(self, index: int, parameters: dict[str, Tensor]) -> None:
        self._writer.write(self._student.stored(index, parameters))

    def _due(self, layer: Layer) -> bool:
        if self._following(layer) is None or self._stage_ends(layer):
            return True
        if self._every is not None:
            return layer.index + 1 - self._durable >= self._every
        return time.perf_counter() - self._since >= PATIENCE * self._cost

    def _make_durable(self, layer: Layer, report: Report, streams: Streams) -> None:
        self._writer.sync()
        hashes = self._writer.hashed()
        written = hashes.keys() - self._recorded
        line: dict[str, Any] = {
            "layer": layer.index,
            "stage_ends": self._stage_ends(layer),
            "states": None if self._following(layer) is None else streams.save(),
            "reports": finite([asdict(each) for each in report.layers[self._durable :]]),
            "kept": report.kept,
            "outcome": None if report.outcome is None else finite(asdict(report.outcome)),
            "tensors": {name: hashes[name] for name in sorted(written)},
            "data": {task: each.digest for task, each in self._batches.items()},
            "chunk": streams.chunk,
            "phases": self._past.phases_with(self._clock),
            "bytes_read": self.bytes_read,
        }
        with write_errors(self._work.out):
            self._work.manifest.append(line)
        self._work.keep = True
        self._durable = layer.index + 1
        self._recorded |= written
        if line["states"] is not None:
            streams.saved()

    def _following(self, layer: Layer) -> Layer | None:
        layers = self._student.structure.layers
        return layers[layer.index + 1] if layer.index + 1 < len(layers) else None

    def _stage_ends(self, layer: Layer) -> bool:
        following = self._following(layer)
        return following is not None and following.stage != layer.stage

    def _check_data(self, before: Mapping[str, str]) -> None:
        for task, batches in self._batches.items():
            if batches.digest != before[task]:
                raise ResumeError(
                    f"out: the interrupted run cannot be gone on with: the calibration data of task {task} has another "
                    "content than it had; --fresh starts over"
                )
