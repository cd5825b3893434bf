"""Where a run's time goes: each moment counts for one phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# In the order in which a run comes to them; docs/report.md says what each is.
PHASES = (
    *("opening", "data", "planning", "scanning", "copying", "entering", "reading", "accumulating", "solving"),
    *("advancing", "writing", "judging", "keeping", "finishing"),
)


class Clock:
    """Wall-clock seconds by phase, from when it is made on; the first phase until another one is entered.

    It reads the host's clock and waits for no device: what a GPU has still to do counts where the host waits for it.
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._phase, self._since = PHASES[0], time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Within the block time counts for `phase`, but for that of blocks in it; then for the phase before it."""
        before = self._enter(phase)
        try:
            yield
        finally:
            self._enter(before)

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, up to now; all phases are there, in their order."""
        self._enter(self._phase)
        return dict(self._seconds)

    def _enter(self, phase: str) -> str:
        """The phase that was left."""
        now, before = time.perf_counter(), self._phase
        self._seconds[before] += now - self._since
        self._phase, self._since = phase, now
        return before
