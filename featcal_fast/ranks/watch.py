"""What became of the other ranks: one that fails tells the rest, and one that says nothing any more is missed.

Nobody waits for ever for a rank that is gone: waiting for another rank is interrupted by its failure, and a process
that waits for something else (for a GPU, whose own transfers wait for a lost one) is ended.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from featcal_fast.errors import RankError, one_line

BEAT = 0.5  # seconds between two signs of life
MISSED = 30.0  # seconds without one from the next rank: the longest that the interpreter may be kept from its threads
GRACE = 10.0  # seconds for a rank to end by itself once another has failed
FAILED = "failed"


class Watch:
    """Signs of life of all ranks, in the store by which they found each other.

    Args:
        store: of this thread's own: others may block theirs.
        rank, size: of this process.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self.rank, self._next = store, rank, (rank + 1) % size
        self._ended = threading.Event()
        self._hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # whether the first rank keeps the store
        self.failure = ""
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises:
        RankError: another rank has failed."""
        if self.failure:
            raise RankError(self.failure)

    def look(self, seconds: float) -> str:
        """What failed, if that is told within so many seconds."""
        until = time.monotonic() + seconds
        while not self.failure and time.monotonic() < until:
            time.sleep(0.02)
        return self.failure

    def fail(self, why: str) -> str:
        """Tell the others that this rank ends early; the first one's word counts.

        Returns:
            What another rank said before, which then is the reason; empty if this is the first.
        """
        mine = json.dumps([self.rank, f"{described(self.rank)}: {one_line(why)}"])
        with suppress(RuntimeError):  # whoever keeps the store is gone
            first = self._store.compare_set(FAILED, "", mine)
            if not self.rank and self._hosts:
                time.sleep(3 * BEAT)  # the store goes with this process: the others shall hear of it first
            return _told(self.rank, first)
        return ""

    def end(self) -> None:
        """All is done."""
        self._ended.set()
        self._thread.join(5 * BEAT)

    def _run(self) -> None:
        beats, seen, since = 0, b"", time.monotonic()
        while not self._ended.wait(BEAT) and not self.failure:
            try:
                if self._store.check([FAILED]):
                    self.failure = _told(self.rank, self._store.get(FAILED))
                    break
                beats += 1
                self._store.set(f"beat {self.rank}", str(beats))
                if self._store.check([f"beat {self._next}"]):
                    found = self._store.get(f"beat {self._next}")
                    if found != seen:
                        seen, since = found, time.monotonic()
                    elif time.monotonic() - since > MISSED:
                        gone = f"no sign of life for {MISSED:.0f} seconds; its process or machine is gone"
                        why = f"rank {self._next}: {gone}"
                        self._store.compare_set(FAILED, "", json.dumps([self._next, why]))
            except (RuntimeError, ValueError):
                if not self._ended.is_set():
                    self.failure = "the process that keeps the ranks' common store is gone"
        if self.failure and not self._ended.wait(GRACE):
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(f"error: rank {self.rank}: {self.failure}\n")
                sys.stderr.flush()
            os._exit(1)


def _told(rank: int, failed: bytes) -> str:
    """What is said of a failure; empty if it is this rank's own."""
    whose, why = json.loads(failed)
    return "" if whose == rank else f"another rank has failed: {why}"


def described(rank: int) -> str:
    """A rank, for people."""
    return f"rank {rank} (process {os.getpid()} on {platform.node()})"


def own_store(prefix: str) -> Store:
    """A connection of its own to the store that all ranks know by the environment.

    Raises:
        RuntimeError: there is none.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, None, False, timedelta(seconds=60))
    return PrefixStore(prefix, store)
