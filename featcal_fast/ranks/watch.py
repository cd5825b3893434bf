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
KEEPER_GONE = "another rank has failed: rank 0: its connection was lost; its process or machine is gone"
AGENT_GONE = "another rank has failed: the process that keeps the ranks' common store is gone"


class Watch:
    """Signs of life of all ranks, in the store by which they found each other.

    Args:
        store: of this thread's own: others may block theirs.
        rank, size: of this process.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self.rank, self._size, self._next = store, rank, size, (rank + 1) % size
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

    def look(self) -> str:
        """What failed, if that is told before long; else who gives no sign of life meanwhile, which all are told; empty
        if all do."""
        until, before = time.monotonic() + 4 * BEAT, self._beats()
        while not self.failure and time.monotonic() < until:
            time.sleep(0.02)
        now = self._beats()
        for rank in range(self._size):
            silent = before is not None and now is not None and now.get(rank) == before.get(rank)
            if silent and rank != self.rank and not self.failure:
                self._say_gone(rank, "its connection was lost")
        return self.failure

    def leave(self) -> None:
        """This rank ends, for what another has told."""
        if not self.rank and self._hosts:
            time.sleep(3 * BEAT)  # the store goes with this process: the others shall hear of it first

    def fail(self, why: str) -> str:
        """Tell the others that this rank ends early; the first one's word counts.

        Returns:
            What another rank said before, which then is the reason; empty if this is the first.
        """
        mine = json.dumps([self.rank, f"{described(self.rank)}: {one_line(why)}"])
        with suppress(RuntimeError):  # whoever keeps the store is gone
            first = self._store.compare_set(FAILED, "", mine)
            self.leave()
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
                        self._say_gone(self._next, f"no sign of life for {MISSED:.0f} seconds")
            except (RuntimeError, ValueError):
                if not self._ended.is_set():
                    self.failure = KEEPER_GONE if self._hosts else AGENT_GONE
        if self.failure and not self._ended.wait(GRACE):
            with suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(f"error: rank {self.rank}: {self.failure}\n")
                sys.stderr.flush()
            os._exit(1)

    def _beats(self) -> dict[int, bytes] | None:
        """The last sign of life of each rank that gave one; None where whoever keeps the store is gone."""
        with suppress(RuntimeError):
            return {
                rank: self._store.get(f"beat {rank}")
                for rank in range(self._size)
                if self._store.check([f"beat {rank}"])
            }
        return None

    def _say_gone(self, rank: int, why: str) -> None:
        gone = json.dumps([rank, f"rank {rank}: {why}; its process or machine is gone"])
        with suppress(RuntimeError):
            self.failure = _told(self.rank, self._store.compare_set(FAILED, "", gone))


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
