"""A run that was stopped goes on, with the same bits: what it left, and what is left for the next one.

The output's own files hold the weights of the layers that are done. Beside them are the hidden states that left the
last of these layers, and a manifest: first what the job is (`fingerprint`), then, each time that everything so far is
on the disk, a line that says so.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from featcal_fast import files
from featcal_fast.calibrate import Output
from featcal_fast.checkpoints import (
    REPORT,
    CheckpointWriter,
    Manifest,
    WorkFolder,
    make_states,
    work_path,
    write_errors,
)
from featcal_fast.errors import FeatCalError, RankError, ResumeError
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.job.check import MAX_REPORT
from featcal_fast.job.fingerprint import Digested, Facts, differences
from featcal_fast.job.interrupts import finish_first
from featcal_fast.models.structure import Layer
from featcal_fast.ranks.world import World
from featcal_fast.reporting.clock import Clock
from featcal_fast.reporting.forms import FormError, build
from featcal_fast.reporting.outcome import Outcome
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport, Report, finite
from featcal_fast.streaming.scratch import Snapshots, remove_others, scratch_errors
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
Data = dict[str, list[Any]]  # by task: SHA-256 of its batches, and `Digested.sizes`
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
        durable: names of the files of hidden states that it can go on from.
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
        self.durable: list[str] = [part["file"] for states in self.states.values() for part in states.values()]

    def told(self, work: WorkFolder, keeps: bool) -> dict[str, Any]:
        """What all ranks have to know of it, as JSON has it.

        Args:
            work: where the output is made.
            keeps: whether hidden states to go on from are.
        """
        return {
            "out": str(work.out),
            "folder": str(work.states) if keeps else None,
            "durable": self.durable,
            "layers": self.layers,
            "lines": [line["layer"] for line in self.lines],
            "states": {str(layer): states for layer, states in self.states.items()},
            "put_back": self.put_back,
        }

    def bytes_with(self, bytes_read: Mapping[str, int]) -> dict[str, int]:
        """Bytes by model of all runs up to now, the last of which has `bytes_read`."""
        return {label: self.bytes_read.get(label, 0) + size for label, size in bytes_read.items()}

    def phases_with(self, clock: Clock) -> dict[str, float]:
        """Seconds by phase of all runs up to now, the last of which has `clock`."""
        return {phase: self.phases.get(phase, 0.0) + own for phase, own in clock.seconds.items()}

    def check(self, facts: Facts) -> None:
        """Raises:
        ResumeError: it was another job, or on another machine."""
        compared = ("recipe", "inputs") if self.finished else tuple(facts)
        if self.facts is None:
            return
        before, now = ({name: each.get(name) for name in compared} for each in (self.facts, facts))
        if different := differences(before, now):
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


def find_past(work: WorkFolder, facts: Facts, *, resume: bool, fresh: bool) -> Past:
    """What an earlier run has left in the work folder: to go on with, or, with `fresh`, nothing any more.

    Raises:
        ResumeError: something was left, and nobody said what to do with it; or it is of another job than `facts`.
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
    past.check(facts)
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


class Member(Output):
    """What every rank does so that a run can go on: it keeps the hidden states of its own samples.

    Args:
        told: by the first rank, of `Resumable.tell`.
        batches: of this rank's tasks.
        models: that are read.
        world: all ranks.
    """

    def __init__(
        self, told: Mapping[str, Any], batches: Mapping[str, Digested], models: RecipeModels, world: World
    ) -> None:
        super().__init__(self._write, self._put_back)
        self._batches, self._models, self._world = batches, models, world
        self._lines, self._states = set(told["lines"]), told["states"]
        self.first, self.was_put_back = told["layers"], told["put_back"]
        self._opened: list[Snapshots] = []
        if told["folder"] is not None:
            folder, durable = Path(told["folder"]), told["durable"]
            if world.leads_machine:
                if not folder.exists():  # a disk of this machine's own
                    with scratch_errors(folder):
                        make_states(folder, Path(told["out"]))
                remove_others(folder, durable)
            world.gather(None)  # before there are others

            def snapshots(number: int) -> Snapshots:
                self._opened.append(Snapshots(folder, str(number), durable))
                return self._opened[-1]

            self.snapshots = snapshots

    def __enter__(self) -> Member:
        return self

    def __exit__(self, *_: object) -> None:
        for snapshots in self._opened:
            snapshots.close()

    def restore(self, layer: Layer, report: Report, streams: Streams) -> None:
        if layer.index not in self._lines:  # it comes with a later one
            return
        self._restored(layer, report, data_of_all(self._batches, self._world))
        if (states := self._states.get(str(layer.index))) is not None:
            streams.restore(states)

    def keep(self, layer: Layer, report: Report, streams: Streams) -> None:
        if not self._world.tell(self._due(layer)):
            return
        with finish_first():
            states = None if layer is streams.last_layer else self._world.merge(streams.save())
            data, bytes_read = data_of_all(self._batches, self._world), bytes_of_all(self._models, self._world)
            self._record(layer, report, streams, states, data, bytes_read)
            self._world.tell(True)  # it is on the disk
            if states is not None:
                streams.saved()

    def _write(self, index: int, parameters: dict[str, Tensor]) -> None:
        """The first rank writes."""

    def _put_back(self) -> None:
        """Likewise."""

    def _due(self, layer: Layer) -> bool:
        """Likewise it knows when."""
        return False

    def _restored(self, layer: Layer, report: Report, data: Data) -> None:
        """Likewise it has the report."""

    def _record(
        self,
        layer: Layer,
        report: Report,
        streams: Streams,
        states: Mapping[str, Any] | None,
        data: Data,
        bytes_read: Mapping[str, int],
    ) -> None:
        """Likewise the manifest."""


class Resumable(Member):
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
        world: all ranks, of which this is the first.
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
        world: World,
    ) -> None:
        keeps = every != 0 or bool(past.layers)
        super().__init__(world.tell(past.told(work, keeps)), batches, models, world)
        self._student, self._writer, self._work = student, writer, work
        self._past, self._every, self._clock = past, every, clock
        self._durable = past.layers
        self._recorded = set(past.hashes)  # tensors
        self._since = time.perf_counter()
        self._began = 0.0
        self._cost = 0.0  # seconds that it took the last time

    def keep(self, layer: Layer, report: Report, streams: Streams) -> None:
        self._began = time.perf_counter()
        super().keep(layer, report, streams)

    def _write(self, index: int, parameters: dict[str, Tensor]) -> None:
        self._writer.write(self._student.stored(index, parameters))

    def _put_back(self) -> None:
        layers = range(len(self._student.structure.layers))
        names = {name for index in layers for name in self._student.block_tensors(index)}
        if self._durable and not self._past.put_back:
            with write_errors(self._work.out):
                self._work.manifest.append({"put_back": sorted(names)})  # before the first of them is another
        self._writer.forget(names)

    def _due(self, layer: Layer) -> bool:
        if self._every == 0:
            return False
        if self._following(layer) is None or self._stage_ends(layer):
            return True
        if self._every is not None:
            return layer.index + 1 - self._durable >= self._every
        return time.perf_counter() - self._since >= PATIENCE * self._cost

    def _restored(self, layer: Layer, report: Report, data: Data) -> None:
        line = next(line for line in self._past.lines if line["layer"] == layer.index)
        for task, (digest, *_) in data.items():
            if digest != line["data"][task]:
                raise ResumeError(
                    f"out: the interrupted run cannot be gone on with: the calibration data of task {task} has another "
                    "content than it had; --fresh starts over"
                )
        report.layers += self._past.reports[layer.index]
        report.kept |= line["kept"]
        report.outcome = None if line["outcome"] is None else build(Outcome, line["outcome"])

    def _record(
        self,
        layer: Layer,
        report: Report,
        streams: Streams,
        states: Mapping[str, Any] | None,
        data: Data,
        bytes_read: Mapping[str, int],
    ) -> None:
        self._writer.sync()
        hashes = self._writer.hashed()
        written = hashes.keys() - self._recorded
        line: dict[str, Any] = {
            "layer": layer.index,
            "stage_ends": self._stage_ends(layer),
            "states": states,
            "reports": finite([asdict(each) for each in report.layers[self._durable :]]),
            "kept": report.kept,
            "outcome": None if report.outcome is None else finite(asdict(report.outcome)),
            "tensors": {name: hashes[name] for name in sorted(written)},
            "data": {task: digest for task, (digest, *_) in data.items()},
            "chunk": streams.chunk,
            "phases": self._past.phases_with(self._clock),
            "bytes_read": self._past.bytes_with(bytes_read),
        }
        with write_errors(self._work.out):
            self._work.manifest.append(line)
        self._work.keep = True
        self._durable = layer.index + 1
        self._recorded |= written
        self._since = time.perf_counter()
        self._cost = self._since - self._began

    def _following(self, layer: Layer) -> Layer | None:
        layers = self._student.structure.layers
        return layers[layer.index + 1] if layer.index + 1 < len(layers) else None

    def _stage_ends(self, layer: Layer) -> bool:
        following = self._following(layer)
        return following is not None and following.stage != layer.stage


def data_of_all(batches: Mapping[str, Digested], world: World) -> Data:
    """Of every task what its batches' `Digested` has, in order of the tasks on the ranks.

    Raises:
        RankError: ranks that share a task's samples have read others.
    """
    found: Data = {}
    for own in world.gather({task: [each.digest, *each.sizes] for task, each in batches.items()}):
        for task, values in own.items():
            if found.setdefault(task, values) != values:
                raise RankError(f"data of {task}: ranks have read different samples; give all of them the same files")
    return found


def bytes_of_all(models: RecipeModels, world: World) -> dict[str, int]:
    """Bytes of tensors that all ranks have read, by model."""
    total: Counter[str] = Counter()
    for own in world.gather(models.bytes_read):
        total.update(own)
    return dict(total)
