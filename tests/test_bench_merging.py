"""The benchmark of merges goes through its motions: tiny models, in this process, and the table of what they took."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench import merging, readme
from bench.harness import process
from bench.workers import merge
from featcal_fast.merging.methods import METHODS


def test_every_merge_is_measured() -> None:
    assert merging.MERGES.keys() == METHODS.keys()


def test_a_merge_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_this_process(command: Sequence[str], **_: object) -> dict[str, Any]:
        with suppress(SystemExit):  # of --check
            merge.main(list(command[3:]))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(process, "last_json", in_this_process)
    monkeypatch.setattr(merge, "configure_process", lambda: None)
    merging.main(["wudi", "--toy", "--device", "cpu", "--threads", "1", "--folder", str(tmp_path)])
    found = json.loads((tmp_path / "merging-cpu.json").read_text())["wudi"]
    assert found["layers"] == merging.FEW_LAYERS
    assert found["gib_read"] >= found["gib_of_inputs"] > 2 * found["gib_written"] > 0
    assert found["peak_gib"] >= found["started_gib"] > 0
    assert not [*tmp_path.glob("*/out")]

    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.merging().splitlines()[2].startswith(f"| wudi, {merging.FEW_STEPS} steps | {merging.FEW_LAYERS} |")
