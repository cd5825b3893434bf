"""Carries an attack out, within bounds, and says what is wrong with how it ended."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import resource
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import featcal_fast as ff
from attacks.core import Attack
from attacks.good import Goods, Job
from featcal_fast.reporting.progress import Progress

SECONDS = 2  # of a processor's time, beyond start-up; more where the machine is slow
WORK, USUAL = 10**6, 0.025  # additions, and about the seconds of them where all tests take eight minutes
MEGABYTES = 500  # beyond what the process has
BUSY = 20  # seconds of a processor's time after which a run is ended
HANG = 30  # seconds after which it is, whatever it does
GRACE = 60  # seconds after which the whole process is, where the run cannot be
HASHED = 2**20  # bytes of a file that is compared by content
SPACE = 8 * 2**30  # bytes of addresses, beyond what the process has: no attack may take the machine with it
LONGEST = 4000  # characters of a message


class Hung(BaseException):
    """A run was ended: it took too long. Nobody may catch it for an error."""


@dataclass
class Verdict:
    """How an attack ended.

    Attributes:
        name: of the attack.
        error: what was said.
        seconds: of a processor's time, of the longer of both runs.
        megabytes: at its peak, likewise.
        faults: what is wrong; nothing, where it was beaten off.
    """

    name: str
    error: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    faults: list[str] = field(default_factory=list)


class _During(Progress):
    def __init__(self, damage: Callable[[], object]) -> None:
        self.damage: Callable[[], object] | None = damage

    def task(self, layer: int, task: str) -> None:
        if self.damage is not None:
            self.damage()
            self.damage = None


def judge(attack: Attack, job: Job) -> Verdict:
    """Damage a job, plan it and calibrate it: both must end in a clear error, soon, and leave everything as it was."""
    attack.damage(job)
    verdict = Verdict(attack.name)

    def recipe() -> Path | ff.Recipe:
        if attack.kind != "mergekit":
            return job.path("recipe.yaml")
        data = {task: job.path(f"data/{task}.safetensors") for task in ("math", "code")}
        return ff.from_mergekit(job.path("merged"), data, out=job.path("out"))

    _one(verdict, "plan", lambda: ff.plan(recipe(), device="cpu"), attack, job, optional=bool(attack.calibrate_only))

    def calibrate() -> object:
        options = dict(attack.options)
        if attack.during is not None:
            during = attack.during
            options["progress"] = _During(lambda: during(job))
        return ff.calibrate(recipe(), device="cpu", **options)

    _one(verdict, "calibrate", calibrate, attack, job)
    return verdict


def _one(
    verdict: Verdict, what: str, program: Callable[[], object], attack: Attack, job: Job, optional: bool = False
) -> None:
    def fault(text: str) -> None:
        verdict.faults.append(f"{what}: {text}")

    before, seen = _held(), snapshot(job.root)
    error: BaseException | None = None
    with _quiet(fault), _measured(verdict, fault):
        try:
            program()
        except (Exception, Hung) as raised:
            error = raised
    if error is None:
        if not optional:
            fault("it was accepted")
    elif isinstance(error, Hung):
        fault(f"it hung\n{_last(error)}")
    elif not isinstance(error, ff.FeatCalError):
        fault(f"{type(error).__name__}: {str(error)[:300]}\n{_last(error)}")
    else:
        verdict.error = str(error)
        for text in wrong_with(verdict.error):
            fault(text)
        for needle in attack.missing(verdict.error):
            fault(f"the error does not name {needle!r}: {verdict.error[:600]}")
    del error  # its frames hold on to open files
    changed = compare(seen, snapshot(job.root))
    if changed and attack.during is None:
        fault(f"files were changed: {', '.join(changed[:5])}")
    if attack.during is not None and any(name.startswith(("job/out", "job/.out")) for name in changed):
        fault("something was left")
    if (after := _held()) != before:
        fault(f"(open files, children): {before} before, {after} after")


def wrong_with(message: str) -> list[str]:
    """What a message must not be."""
    faults = []
    if not all(each.isprintable() or each == "\n" for each in message):
        faults.append(f"the error holds characters that act on a terminal: {message!r:.300}")
    if len(message) >= LONGEST + 100:
        faults.append(f"the error is {len(message)} characters long")
    if "Traceback" in message or not message.strip():
        faults.append(f"the error is no sentence: {message!r:.300}")
    return faults


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder: kind, size, time of change, where a link leads, and what short files hold."""
    found = {}
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        for entry in os.scandir(folder):
            info = entry.stat(follow_symlinks=False)
            name = os.path.relpath(os.fsencode(entry.path), os.fsencode(root)).decode(errors="backslashreplace")
            held: object = os.readlink(entry.path) if stat.S_ISLNK(info.st_mode) else None
            if stat.S_ISREG(info.st_mode) and info.st_size < HASHED and info.st_mode & stat.S_IRUSR:
                held = hashlib.sha256(Path(entry.path).read_bytes()).hexdigest()
            if stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_IXUSR:
                waiting.append(Path(entry.path))
            found[name] = (info.st_mode, info.st_size, info.st_mtime_ns, info.st_ino, held)
    return found


def compare(before: dict[str, tuple[object, ...]], after: dict[str, tuple[object, ...]]) -> list[str]:
    """Names that are new, gone, or not what they were; times of folders do not count."""

    def same(name: str) -> bool:
        old, new = before[name], after[name]
        if stat.S_ISDIR(old[0]):  # type: ignore[arg-type]
            return (old[0], old[3]) == (new[0], new[3])
        return old == new

    return sorted(
        name for name in before.keys() | after.keys() if name not in before or name not in after or not same(name)
    )


@contextmanager
def _measured(verdict: Verdict, fault: Callable[[str], None]) -> Iterator[None]:
    """Bounds a run's time and memory, and says where it took more than it may."""
    began, since = _processor(), time.monotonic()

    def end(*_: object) -> None:
        if _processor() - began > BUSY or time.monotonic() - since > HANG:
            raise Hung

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    resident, children = _status("VmRSS"), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") * 1024 + SPACE, limits[1]))
    previous = signal.signal(signal.SIGALRM, end)
    faulthandler.dump_traceback_later(GRACE, exit=True)
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    seconds, grown = _processor() - began, (_status("VmHWM") - resident) / 1024
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if largest > children:  # it is the largest child's of all times
        grown = max(grown, (largest - resident) / 1024)
    verdict.seconds, verdict.megabytes = max(verdict.seconds, seconds), max(verdict.megabytes, grown)
    if seconds > SECONDS and seconds > SECONDS * _slowness():
        fault(f"it took {seconds:.1f} s")
    if grown > MEGABYTES:
        fault(f"it took {grown:.0f} MB")


def _slowness() -> float:
    """How many times as long as usual Python takes here and now, beside whatever else is running."""
    began = _processor()
    for _ in range(WORK):
        began += 0
    return (_processor() - began) / USUAL


@contextmanager
def _quiet(fault: Callable[[str], None]) -> Iterator[None]:
    """Nothing that ends a program with noise may reach standard error, whichever library writes it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as noise:
        os.dup2(noise.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        noise.seek(0)
        said = noise.read(10**6).decode(errors="replace")
    for word in ("Traceback", "panicked", "Segmentation"):
        if word in said:
            fault(f"standard error holds {word!r}: {said[max(0, said.index(word) - 100) :][:300]}")


def _processor() -> float:
    return sum(os.times()[:4])


def _status(key: str) -> int:
    """KiB of this process, by `/proc`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise AssertionError(key)


def _held() -> tuple[int, int]:
    """Open files and children of this process."""
    children = 0
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError):  # threads end when they like
            children += len(Path(f"/proc/self/task/{task}/children").read_text().split())
    return len(os.listdir("/proc/self/fd")), children


def _last(error: BaseException) -> str:
    """Where it came from: the last places of the package itself, and the last of all."""
    places = traceback.extract_tb(error.__traceback__)
    own = [place for place in places if "featcal_fast" in place.filename][-3:]
    return "\n".join(f"    {place.filename}:{place.lineno} {place.line}" for place in (*own, *places[-1:]))


def reads_everything() -> bool:
    """Whether rights of files mean nothing to this process, as to most of root's."""
    with tempfile.NamedTemporaryFile() as file:
        os.chmod(file.name, 0)
        return os.access(file.name, os.R_OK)


def warm_up(goods: Goods, root: Path) -> None:
    """Plan and calibrate what is good: libraries are imported, and what they keep is there."""
    for kind in ("llama", "texts", "clip"):
        job = goods.copy(kind, root / kind)
        ff.plan(job.path("recipe.yaml"), device="cpu")
        ff.calibrate(job.path("recipe.yaml"), device="cpu")
