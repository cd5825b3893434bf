"""While a rank waits for others, its expert runs the next layer on its first samples: once, and with the same bits."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from rank_processes import run_ranks
from runs import EXHAUSTIVE
from safetensors.torch import load_file

import featcal_fast as ff
from featcal_fast.forward.runner import BlockRunner
from featcal_fast.streaming.hidden_states import HiddenStates


@pytest.mark.parametrize("kind", ["llama", *["t5"] * EXHAUSTIVE])
def test_what_an_expert_ran_ahead_is_not_run_again(kind: str, tmp_path: Path) -> None:
    recipe = {**pico.save(pico.job(kind, 2), tmp_path), "held_out": 0}
    counts: Counter[str] = Counter()
    run_ahead, capture = HiddenStates.run_ahead, BlockRunner.capture

    def ahead(*arguments: object) -> None:
        counts["ahead"] += 1
        run_ahead(*arguments)

    def captured(runner: BlockRunner, *arguments: Any, **more: Any) -> torch.Tensor | None:
        counts["captures"] += not arguments[3].is_meta  # what is only planned does not count
        return capture(runner, *arguments, **more)

    def counted(folder: str) -> str:
        HiddenStates.run_ahead, BlockRunner.capture = ahead, captured
        ff.calibrate({**recipe, "out": str(tmp_path / folder)}, device="cpu")
        return json.dumps(counts)

    ended = run_ranks(2, lambda _: counted("out"), tmp_path / "said")
    assert [status for status, _ in ended] == [0, 0], ended
    found = [json.loads(said) for _, said in ended]
    assert any(each.get("ahead", 0) for each in found), "nobody waited in the middle of the model"

    ((_, said),) = run_ranks(1, lambda _: counted("one"), tmp_path / "alone")
    one = json.loads(said)
    assert sum(each["captures"] for each in found) == one["captures"]
    assert not one.get("ahead"), "a single process waits for nobody"
    theirs, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "one"))
    assert theirs.keys() == alone.keys()
    assert all(torch.equal(theirs[name], alone[name]) for name in alone)
