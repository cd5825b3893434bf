"""What whoever watches is told adds up, for a decoder after an encoder too."""

from __future__ import annotations

import pico
import pytest

import featcal_fast as ff
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport


class Watcher(Progress):
    def __init__(self) -> None:
        self.total = self.done = self.layers = self.closed = 0

    def stage(self, layers: int, tokens: int) -> None:
        self.total = self.done + layers * tokens

    def tokens(self, count: int) -> None:
        self.done += count

    def layer(self, report: LayerReport) -> None:
        self.layers += 1

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_tokens_add_up_to_what_was_announced(kind: str) -> None:
    job, watcher = pico.job(kind, 2), Watcher()
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches, progress=watcher)
    assert watcher.done == watcher.total > 0
    assert watcher.layers == len(report.layers)
    assert watcher.closed == 1
