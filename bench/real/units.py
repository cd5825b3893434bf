"""What a run of the real models is divided into, and the rows that are finished."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench.harness.results import Results

SECTION = "rows"
ITEMS, BASE, EXPERTS, ARITHMETIC, TIES = "items", "base", "own expert", "task arithmetic", "TIES"
ANCHORS = ("anchor alone, preset", "anchor alone, chosen")


@dataclass(frozen=True)
class Unit:
    """What one process does at a time.

    Attributes:
        study: `lm` or `encoder`.
        form: of the experts, `lora` or `full`.
        seed: of fine-tuning and of the calibration samples.
    """

    study: str
    form: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.study}-{self.form}-{self.seed}"


class Rows:
    """A unit's rows: each is on disk as soon as it is measured, and is not measured again.

    A row holds `items`, by task a number for each test item; how large an item is, and which file it is from, is in
    the row `ITEMS`: `sizes` and `files` by task, and under `apart` the names of those that are no task.
    """

    def __init__(self, kept: Results) -> None:
        self._kept = kept

    def measure(self, key: str, what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if key not in self._kept.of(SECTION):
            began = time.perf_counter()
            row = what()
            self._kept.add(SECTION, key, {**row, "row_seconds": time.perf_counter() - began})
            print(f"{self._kept.path.stem if self._kept.path else ''}: {key}", flush=True)
        return self._kept.of(SECTION)[key]
