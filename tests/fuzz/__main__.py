"""Damage good inputs at random, and keep those that are not refused well: `python -m tests.fuzz recipe`."""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from featcal_fast.errors import LONGEST, FeatCalError

SECONDS = 2  # of a processor's time, for one input
BYTES = 2**30  # of memory, beyond what the process has
LARGEST = 2**20  # bytes of an input
CORPUS = 5000  # inputs that are kept for further damage


class Hung(BaseException):
    """An input takes too long. Nobody may catch it for an error."""


def main() -> int:
    """Exit code 1, where something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", help="a module of this folder: recipe, checkpoint, card, mergekit, texts")
    parser.add_argument("files", nargs="*", type=Path, help="inputs to try again, in place of new ones")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-found"), help="folder for inputs that fail")
    arguments = parser.parse_args()
    target = import_module(f"{__package__}.{arguments.target}")
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGPROF, _hang)
    if arguments.files:
        faults = [fault for file in arguments.files if (fault := attempt(target.target, file.read_bytes())[1])]
        print(*faults, sep="\n")
        return bool(faults)
    return fuzz(target, arguments.minutes, random.Random(arguments.seed), arguments.out)


def fuzz(target: ModuleType, minutes: float, chance: random.Random, out: Path) -> int:
    """Damage inputs until the time is over.

    An input that ends somewhere else than all before it is damaged further; so what is read gets deeper and deeper.

    Args:
        target: has `target(data)`, which returns or raises a FeatCalError; `SEEDS`, good inputs; and may have
            `damage(data, chance)`, which knows their form.
        minutes: to go on for.
        chance: where all of it comes from.
        out: for inputs that fail, one for each place that they fail at.
    """
    corpus, endings, found, tried = list(target.SEEDS), set(), 0, 0
    ways: list[Callable[[bytes, random.Random], bytes]] = [damage_bytes]
    ways += [target.damage] if hasattr(target, "damage") else []
    until = time.monotonic() + 60 * minutes
    waiting = list(corpus)  # as they are, first
    while time.monotonic() < until:
        data = waiting.pop() if waiting else chance.choice(corpus)
        for _ in range(chance.randint(1, 4) if tried >= len(target.SEEDS) else 0):
            data = chance.choice(ways)(data, chance)[:LARGEST]
        if chance.random() < 0.05 and tried >= len(target.SEEDS):
            data = _spliced(data, chance.choice(corpus), chance)
        tried += 1
        ending, fault = attempt(target.target, data)
        if ending in endings:
            continue
        endings.add(ending)
        if len(corpus) < CORPUS:
            corpus.append(data)
        if fault:
            found += 1
            out.mkdir(exist_ok=True)
            file = out / f"{target.__name__.rpartition('.')[2]}-{hashlib.sha256(data).hexdigest()[:12]}"
            file.write_bytes(data)
            print(f"{file}: {data[:100]!r}\n{fault}", flush=True)
    print(f"{tried} inputs, which ended in {len(endings)} places; {found} of them wrong")
    return bool(found)


def attempt(target: Callable[[bytes], object], data: bytes) -> tuple[str, str]:
    """Where an input ends, and what is wrong with that; nothing, where it is accepted or refused well."""
    began = time.process_time()
    try:
        with _limited():
            target(data)
        ending = "accepted"
        fault = ""
    except FeatCalError as error:
        words = re.sub(r"'.*?'|[^a-z ]", "", str(error))[-60:]
        ending, fault = f"{_places(error)} {words}", _wrong_with(str(error))
    except (Exception, Hung) as error:
        ending = f"{type(error).__name__} {_places(error)}"
        fault = "".join(traceback.format_exception_only(error))[:1000] + ending
    if not fault and time.process_time() - began > SECONDS:
        fault = f"it took {time.process_time() - began:.1f} s: {ending}"
    return ending, fault


def _wrong_with(message: str) -> str:
    if len(message) > LONGEST + 100:
        return f"the error has {len(message)} characters"
    if not message.strip() or not all(each.isprintable() or each == "\n" for each in message):
        return f"the error cannot be printed: {message!r:.300}"
    return ""


def _places(error: BaseException) -> str:
    """Lines of the package, from the outermost on, and the last of all."""
    places = traceback.extract_tb(error.__traceback__)
    own = [place for place in places if "featcal_fast" in place.filename]
    causes = "" if error.__cause__ is None else f" < {_places(error.__cause__)}"
    return " ".join(f"{Path(place.filename).name}:{place.lineno}" for place in (*own, *places[-1:])) + causes


@contextmanager
def _limited() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_PROF, SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _hang(*_: object) -> None:
    raise Hung


ODD = [
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\t",
    b"[",
    b"{",
    b'"',
    b":",
    b",",
    b"-1",
    b"1e999",
    b"9" * 50,
    b"NaN",
]


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, doubled, moved, cut off."""
    start, end = sorted(chance.randint(0, len(data)) for _ in range(2))
    end = chance.choice([end, min(end, start + 1), min(end, start + 16)])
    part = data[start:end]
    new = chance.choice(
        [
            b"",
            part * 2,
            part * chance.randint(2, 300),
            part[::-1],
            part.swapcase(),
            chance.randbytes(len(part) % 16),
            chance.choice(ODD),
            chance.choice(ODD) + part,
            bytes(byte ^ 1 << chance.randrange(8) for byte in part[:4]) + part[4:],
        ]
    )
    return data[:start] if chance.random() < 0.02 else data[:start] + new + data[end:]


def _spliced(first: bytes, second: bytes, chance: random.Random) -> bytes:
    return first[: chance.randint(0, len(first))] + second[chance.randint(0, len(second)) :]


if __name__ == "__main__":
    sys.exit(main())
