"""What a user sees: a bar, lines, tables, errors, on a terminal or whatever stands in its place."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, NoReturn, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from featcal_fast import files
from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.errors import FeatCalError, OutputError, RankError, printable
from featcal_fast.planning.plan import format_bytes
from featcal_fast.ranks.join import follows, launched
from featcal_fast.reporting.outcome import WORSE
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport, drift_text
from featcal_fast.reporting.usage import shell_quoted, usage
from featcal_fast.untrusted.documents import parse_json

if TYPE_CHECKING:
    from featcal_fast.planning.plan import Plan
    from featcal_fast.planning.sampled import Sampled


class BarProgress(Progress):
    """A bar with layer, task, tokens/s and time left on a terminal; a line a layer elsewhere."""

    def __init__(self, console: Terminal) -> None:
        self._console = console
        self._bar: Bar | None = None
        self._id = TaskID(0)
        self._layers, self._before, self._done, self._started = 0, 0, 0, 0.0

    def warning(self, text: str) -> None:
        self._console.say(f"warning: {text}")

    def scanned(self, model: str, done: int, total: int) -> None:
        if self._bar is None:
            self._start(total)
        if self._bar:
            self._bar.update(self._id, completed=done, description=f"scanning  {printable(model)}")
        if done == total:
            self.close()
            self._console.say(f"scanned {format_bytes(total)} of weights: all are finite")

    def stage(self, layers: int, tokens: int) -> None:
        if self._bar:
            self._bar.update(self._id, total=self._done + layers * tokens)
            return
        self._layers, self._started = self._before + layers, time.perf_counter()
        self._start(layers * tokens)

    def task(self, layer: int, task: str) -> None:
        if self._bar:
            self._bar.update(self._id, description=f"layer {layer + 1}/{self._layers}  {printable(task)}")

    def tokens(self, count: int) -> None:
        self._done += count
        if self._bar:
            rate = self._done / (time.perf_counter() - self._started)
            self._bar.update(self._id, advance=count, rate=f"{rate:,.0f} tokens/s")

    def layer(self, report: LayerReport) -> None:
        if not self._console.is_terminal:
            done = report.index + 1 - self._before
            left = (time.perf_counter() - self._started) / done * (self._layers - report.index - 1)
            drift = f"{drift_text(report.drift_before)} -> {drift_text(report.drift_after)}"
            self._console.say(
                f"layer {report.index + 1}/{self._layers}: drift {drift}, {report.seconds:.1f} s, {left:.0f} s left"
            )

    def resumed(self, layers: int) -> None:
        self._before = layers
        self._console.say(f"resuming: {layers} layers were done")

    def interrupted(self, left: str) -> None:
        complain(left or "interrupted: nothing is left of it")

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _start(self, total: int) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)
        self._id = self._bar.add_task("starting", total=total, rate="")
        self._bar.start()


FAULT = 70  # exit code for what is nobody's fault but ours, as sysexits.h has it
OUTPUT_FAILED = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF, errno.EFBIG}
STYLES = {"warning: ": "yellow", WORSE: "red"}  # by what a line begins with


class Stdout(io.TextIOBase):
    """The standard output, which may be closed or full: what cannot be shown is no reason to end a job."""

    def __init__(self) -> None:
        self._stream = sys.stdout  # as it is now: a bar puts a stream of its own, which writes here, in its place
        self.failed = self._stream is None

    def write(self, text: str) -> int:
        if not self.failed:
            try:
                self._stream.write(text)
                self._stream.flush()
            except (OSError, ValueError):
                self.failed = True
                with suppress(OSError, ValueError):
                    files.discard(self._stream)  # what Python still holds would change the exit code
        return len(text)

    def isatty(self) -> bool:
        return not self.failed and self._stream.isatty()

    def fileno(self) -> int:
        return -1 if self._stream is None else self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"


class Terminal(Console):
    """A terminal, or whatever stands in its place. Nothing in what it is given is markup: names may be a stranger's."""

    def __init__(self) -> None:
        self.stdout = Stdout()
        super().__init__(file=cast(TextIO, self.stdout), markup=False, emoji=False, highlight=False)

    def say(self, text: str) -> None:
        """Lines of text; warnings in yellow, a calibration that made things worse in red."""
        for line in text.split("\n"):
            style = next((style for start, style in STYLES.items() if line.startswith(start)), None)
            self.print(printable(line), style=style, soft_wrap=True)

    def show(self, tables: Iterable[Table], text: str) -> None:
        """Tables, and lines of text below them."""
        for table in tables:
            self.print(table)
        self.say(text)

    def show_plan(self, out: Path | None, rate: float | None, link: float, plan: Plan) -> None:
        """A plan, at a rate of so many TFLOP/s or at what runs took; and what a run has left in the folder to write.

        Of several ranks with a rate, how much sooner 1, 2, 4, ... are done, if `link` GB/s go from one to another.

        Raises:
            OutputError: there is nowhere to show it.
        """
        from featcal_fast.job.resume import left_behind
        from featcal_fast.job.throughput import expected
        from featcal_fast.planning.scaling import Speeds, scale

        tables = plan.tables()
        if plan.ranks and rate:
            sizes = {min(2**power, len(plan.ranks)) for power in range(len(plan.ranks).bit_length() + 1)}
            tables.append(scale(plan, sorted(sizes), Speeds.at(rate * 1e12, link * 1e9)).table())
        self.show(tables, plan.summary(rate * 1e12) if rate else plan.summary(duration=expected(plan)))
        if out and (left := left_behind(out)):
            self.say(left)
        self._check_shown()

    def show_sample(self, sample: Sampled) -> None:
        """Whether it will help. Raises as `show_plan`."""
        self.show([sample.table()], sample.line())
        self._check_shown()

    def _check_shown(self) -> None:
        if self.stdout.failed:
            raise OutputError("standard output cannot be written: the plan is not shown")

    def next_steps(self, out: Path) -> None:
        """Where a calibrated model is, and what to do with it, as snippets to copy."""
        self.say(f"Wrote {out}")
        with suppress(OSError, ValueError):  # it was there just now
            config = parse_json(files.read_bytes(model_folder(out) / "config.json"))
            for title, snippet in usage(config, str(out), [path.name for path in files.list_folder(out)]):
                self.say(f"With {title}:\n{indent(snippet, '    ')}")
        self.say(f"To see whether it is still whole, and loads:\n    featcal-fast check {shell_quoted(str(out))}")


def complain(text: str, style: str = "red") -> None:
    """Lines on standard error."""
    Console(stderr=True).print(text, style=style, soft_wrap=True, highlight=False, markup=False, emoji=False)


def trace(error: Exception) -> None:
    """An error's traceback, on standard error."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        complain(printable(line), style="dim")


def tell(error: Exception, debug: str) -> int:
    """Tell an error in a line on standard error.

    Args:
        error: that ends the process.
        debug: the option that shows its traceback.

    Returns:
        The exit code to end with.
    """
    if isinstance(error, FeatCalError):
        complain(f"{_whose()}error: {error}")
        return 1
    if isinstance(error, OSError) and error.filename is None and error.errno in OUTPUT_FAILED:  # of a help page, say
        files.discard(sys.stdout)
        complain(f"error: standard output cannot be written: {error.strerror}")
        return 1
    what = printable(f"{_whose()}unexpected error: {type(error).__name__}: {error}").replace("\n", " ")
    complain(f"{what}; this is a fault of featcal_fast: run it again with {debug} and report that")
    return FAULT


def end(code: int) -> NoReturn:
    """End the process.

    One of several ranks ends at once: threads of torch's that still wait for others would abort it instead.
    """
    with suppress(RankError):
        if launched() > 1:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(code)
    raise SystemExit(code)


def _whose() -> str:
    """Which rank tells it, where another is the first."""
    with suppress(RankError):
        return f"rank {rank}: " if (rank := follows()) else ""
    return ""
