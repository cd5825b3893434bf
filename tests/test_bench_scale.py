"""`python -m bench.scale`: through its motions at a toy size, and what large models' plans are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from bench import scale
from bench.workloads import LLAMA_TOY
from featcal_fast.planning.scaling import Speeds


def test_ranks_and_plans_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With runs as they may be, whose bytes are those that plans say."""
    folder = tmp_path / "toy-scale"
    scale.prepare(scale.JOB.small, folder)
    runs = {}
    for size in scale.SIZES:
        said = scale.planned(folder, size)
        run = {"seconds_of_layers": [2.0 / size] * 2, "phases": {"solving": 1.0}}
        runs[size] = {**run, "ranks": said["ranks"], "peak_host_bytes": 1}
    monkeypatch.setattr(scale.process, "last_json", lambda command, **_: scale.planned(folder, int(command[4])))
    found = scale.compared(folder, runs, link=1e9)
    assert [found[f"{size} ranks"]["speed_up"] for size in scale.SIZES] == [1, 2, 4]
    assert found["1 ranks"]["model_seconds"] == pytest.approx(4, rel=0.01), "what it is given"
    assert 1 < found["2 ranks"]["model_speed_up"] < 2
    for size in scale.SIZES[1:]:
        ranks, planned = (found[f"{size} ranks"][name] for name in ("ranks", "planned"))
        assert [each["sent"] for each in ranks] == [each["sent"] for each in planned["ranks"]]
        assert len(ranks) == size


def test_a_large_models_plan_needs_no_weights(tmp_path: Path) -> None:
    config = LlamaConfig(**LLAMA_TOY | {"vocab_size": 500})
    plan = scale.plan_holes(config, 2, tmp_path / "holes", 4, 16)
    assert plan.settings.sample_shards == 16
    assert plan.tokens == {"task0": 256 * 512, "task1": 256 * 512}
    assert len(plan.ranks) == 4
    row = scale.row_of(plan, 4, Speeds.at(1e12, 50e9))
    assert 1 < row["speed_up"] <= 4
    assert not (tmp_path / "holes").exists()


def test_a_cards_rates_are_its_layers() -> None:
    rates = scale.card_rates(json.loads(scale.CARD.read_text()))
    assert set(rates) == set(scale.KINDS)
    assert all(1e12 < rate < 2e15 for rate in rates.values())
