"""What a plan says of a job that several ranks share, against what ranks then sent, read and held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from rank_processes import run_ranks
from runs import EXHAUSTIVE
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.errors import RecipeError
from featcal_fast.job.throughput import expected
from featcal_fast.planning import memory, planner
from featcal_fast.planning.scaling import Speeds, scale
from featcal_fast.planning.shared import Crew, Sharing, local_ranks
from featcal_fast.ranks import panels
from featcal_fast.ranks.shares import Shares
from featcal_fast.streaming.machine import resident_bytes

GATED = {"held_out": 0.25}
HELD_OUT = {**GATED, "settings": {"keep_better": False}}
MERGED = {**HELD_OUT, "merged_model": None, "merge": {"method": "task_arithmetic"}}
CHOSEN = {"held_out": 0.25, "settings": {"auto": True, "keep_better": False}}
# What is run: a kind of model, tasks, ranks, and what else the recipe says.
JOBS = {
    "clip on 4, one without samples": ("clip", 3, 4, HELD_OUT),
    "clip, chosen": ("clip", 3, 3, CHOSEN),
    "clip, shards, chosen": ("clip", 2, 3, {**CHOSEN, "settings": {**CHOSEN["settings"], "sample_shards": 2}}),
    "llama on 3": ("llama", 3, 3, HELD_OUT),
    "llama, one task": ("llama", 1, 3, {"settings": {"sample_shards": 4}}),
    "llama, changes limited": ("llama", 2, 3, {"settings": {"max_change": 0.5}}),
    "clip, no biases": ("clip", 2, 2, {"settings": {"calibrate_bias": False, "calibrate_layernorm": False}}),
    "llama, merged on the fly": ("llama", 2, 3, MERGED),
    "clip, merged on the fly of kept experts": ("clip", 3, 2, {**MERGED, "expert_storage": "host-nf4"}),
    "classifiers": ("bert classifier", 3, 2, HELD_OUT),
    "t5, gated": ("t5", 3, 3, GATED),
    "t5, shards, chosen": ("t5", 2, 4, {**CHOSEN, "settings": {**CHOSEN["settings"], "sample_shards": 2}}),
}
OFTEN = ("clip on 4, one without samples", "clip, shards, chosen", "llama on 3", "llama, merged on the fly")


@pytest.fixture(autouse=True)
def small_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that pico models have several."""
    monkeypatch.setattr(panels, "PANEL_BYTES", 4096)
    monkeypatch.setattr(panels, "STEP", 4)


def shared(recipe: dict, size: int, folder: Path) -> dict:
    """The report of a run on so many ranks."""
    out = folder / "shared"
    found = run_ranks(
        size, lambda rank: ff.calibrate({**recipe, "out": str(out)}, device="cpu").seconds, folder / "said"
    )
    assert not [said for status, said in found if status]
    return json.loads((out / "report.json").read_text())


def compare(plan: ff.Plan, report: dict) -> None:
    """Whose samples are whose, and all bytes, are those of a run in which nothing got worse: that is read once more."""
    assert [each.samples for each in plan.ranks] == [each["samples"] for each in report["ranks"]]
    planned = [(each.sent, each.received) for each in plan.ranks]
    assert planned == [(each["sent"], each["received"]) for each in report["ranks"]]
    assert min(max(pair) for pair in planned) > 0
    read = {name: size for name, size in report["bytes_read"].items() if not name.startswith("hidden states")}
    assert report["outcome"] is None or report["outcome"]["kept"] != "merged"
    assert all(gate["calibrated"] <= gate["merged"] for layer in report["layers"] if (gate := layer["gate"]))
    assert plan.bytes_read == read


@pytest.mark.parametrize("name", JOBS if EXHAUSTIVE else OFTEN)
def test_ranks_send_and_read_what_was_planned(name: str, tmp_path: Path) -> None:
    kind, tasks, size, more = JOBS[name]
    recipe = {**pico.save(pico.job(kind, tasks), tmp_path), **more}
    recipe = {name: value for name, value in recipe.items() if value is not None}
    compare(ff.plan(recipe, device="cpu", gpus=size), shared(recipe, size, tmp_path))


@pytest.mark.parametrize(("kind", "size"), [("llama", 3), *[("clip", 2), ("t5", 4)] * EXHAUSTIVE])
def test_rows_of_few_tokens_too(kind: str, size: int, tmp_path: Path) -> None:
    """Where no token is padding, of which plans know nothing: systems are solved from the token side."""
    recipe = few_tokens(kind, 2, tmp_path) | {"settings": {"sample_shards": 2}}
    plan, report = ff.plan(recipe, device="cpu", gpus=size), shared(recipe, size, tmp_path)
    assert plan.exact
    assert "tokens" in {group["space"] for layer in report["layers"] for group in layer["groups"]}
    compare(plan, report)


@pytest.mark.skipif(not EXHAUSTIVE, reason="tried with all that takes long")
def test_rows_of_few_tokens_where_settings_choose_themselves(tmp_path: Path) -> None:
    recipe = {**few_tokens("llama", 2, tmp_path, samples=3), **CHOSEN, "held_out": 0.4}
    plan, report = ff.plan(recipe, device="cpu", gpus=3), shared(recipe, 3, tmp_path)
    assert "tokens" in {group["space"] for layer in report["layers"] for group in layer["groups"]}
    compare(plan, report)


def few_tokens(kind: str, tasks: int, folder: Path, samples: int = 2) -> dict:
    """A job of a few samples a task, in batches of one, without padding."""
    recipe = pico.save(pico.job(kind, tasks), folder)
    for expert in recipe["experts"].values():
        data = {name: value[:samples].clone() for name, value in load_file(expert["data"]).items()}
        masks = {name: torch.ones_like(value) for name, value in data.items() if name.endswith("attention_mask")}
        if "labels" in data:
            data["labels"] = data["labels"].clamp(min=1)
        save_file({**data, **masks}, expert["data"])
    return {**recipe, "batch_size": 1}


def crew(tasks: int, shards: int, size: int) -> Crew:
    shares = Shares(tuple("abcdefgh"[:tasks]), shards, size)
    return Crew(shares, dict.fromkeys(shares.all_parts, 1 / shards))


def test_what_ranks_hold_by_hand() -> None:
    """The first rank folds tasks as they pass; others keep the moments of all their parts, and what arrives."""

    def moments(tasks: int, shards: int, size: int, auto: bool = False) -> list[int]:
        return [role.moments for role in crew(tasks, shards, size).roles({"a", "b", "c"}, auto)]

    assert moments(3, 1, 1) == [1]
    assert moments(3, 2, 1) == [2]
    assert moments(5, 1, 2) == [1, 2]
    assert moments(3, 1, 4) == [1, 1, 1, 1]
    assert moments(3, 1, 3, auto=True) == [1, 2, 2]
    # Parts a1 a2, a3 b1, b2, b3: the second rank receives what the first has of a, and so on.
    assert moments(2, 3, 4) == [2, 3, 2, 2]
    roles = crew(2, 3, 4).roles({}, False)
    assert [dict(role.tasks) for role in roles] == [{"a": 2 / 3}, {"a": 1 / 3, "b": 1 / 3}, {"b": 1 / 3}, {"b": 1 / 3}]
    assert [list(role.owned) for role in roles] == [[], ["a"], [], ["b"]]


def test_shards_have_whole_batches_of_a_task() -> None:
    assert crew(1, 2, 1).rows({"a": 7}) == {"a": [4, 3]}


def test_every_rank_holds_what_its_tasks_take(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("llama", 4), tmp_path)
    alone, plan = (ff.plan(recipe, device="cpu", gpus=size, host_memory="64GiB") for size in (None, 2))
    assert alone.ranks == []
    assert alone.machine_bytes == alone.host_bytes
    assert [each.samples for each in plan.ranks] == [["task0", "task1"], ["task2", "task3"]]
    assert plan.host_bytes == max(each.host_bytes for each in plan.ranks)
    assert plan.machine_bytes == sum(each.host_bytes for each in plan.ranks)
    # The second rank keeps moments and blocks of both its tasks.
    layer = plan.layers[0]
    assert plan.host["moments of tasks"] == 2 * layer.scratch
    assert plan.host["blocks: student, base, experts"] == 2 * layer.blocks["task0"] + layer.blocks[None]
    flops = [sum(each.flops[kind] for each in plan.ranks) for kind in ("forward", "moments", "fold")]
    assert flops == pytest.approx([alone.flops[kind] for kind in ("forward", "moments", "fold")])
    assert plan.flops == alone.flops
    assert max(each.flops["solve"] for each in plan.ranks) < alone.flops["solve"]


def test_ranks_of_a_machine_share_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pico.save(pico.job("clip", 2), tmp_path)
    two = ff.plan(recipe, device="cpu", gpus=2, host_memory="64GiB")
    assert two.problems == []
    assert "for 2 ranks on a machine" in two.summary()
    scarce = ff.plan(recipe, device="cpu", gpus=2, host_memory=two.host_bytes + 1)
    assert not scarce.fits
    assert "the 2 ranks of a machine need" in scarce.problems[0]
    assert "no number of ranks makes less" in scarce.problems[0]
    assert ff.plan(recipe, device="cpu", gpus=12).local_ranks == planner.ON_ONE == 8
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_ranks(16) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert (local_ranks(16), local_ranks(2)) == (4, 2)


def test_memory_of_ranks_that_are_not_there_yet_is_not_counted_as_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free here has to do for all of them, but for what this process holds."""
    monkeypatch.setattr(planner, "available_host_bytes", lambda: 10**12)
    recipe = pico.save(pico.job("clip", 2), tmp_path)
    for gpus in (1, 8):
        assert 10**12 < ff.plan(recipe, device="cpu", gpus=gpus).host_budget < 10**12 + 2 * resident_bytes()


def test_what_a_machine_lacks_may_be_all_its_ranks_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: 2**28)
    recipe = pico.save(pico.job("clip", 2), tmp_path)
    plan = ff.plan(recipe, device="cpu", gpus=2, host_memory="64GiB")
    assert plan.machine["hidden states"] > 1.9 * plan.host["hidden states"]
    budget = plan.machine_bytes - int(1.5 * plan.host["hidden states"])
    (problem,) = ff.plan(recipe, device="cpu", gpus=2, host_memory=budget).problems
    assert "--scratch DIR, a folder on a fast disk for hidden states, would fit" in problem


def test_each_machine_may_have_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = pico.save(pico.job("clip", 4), tmp_path)
    monkeypatch.setattr(planner, "ON_ONE", 1)
    (tmp_path / "scratch").mkdir()

    def disk(gpus: int, **options: Any) -> dict[str, int]:
        return ff.plan(recipe, device="cpu", gpus=gpus, host_memory="64GiB", **options).disk

    for kept in (None, 0):
        alone, shared = (disk(gpus, scratch=tmp_path / "scratch", checkpoint_every=kept) for gpus in (1, 2))
        assert shared["hidden states"] == alone["hidden states"] / 2 > 0
        assert shared["calibrated model"] == alone["calibrated model"]
    assert disk(2) == disk(1), "beside the output, which all of them share"


def test_no_time_is_foretold_of_several_ranks(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("clip", 2), tmp_path)
    assert expected(ff.plan(recipe, device="cpu", gpus=2)) is None


def test_a_gpu_that_will_not_do_is_named(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("clip", 2), tmp_path)
    plan = ff.plan(recipe, device="cuda", gpus=2, device_memory="1MiB", host_memory="64GiB")
    assert "device memory: rank " in plan.problems[0]
    assert f"{max(each.device_bytes for each in plan.ranks)}" == f"{plan.device_bytes}"
    assert "no number of ranks makes less" in plan.problems[0]
    (problem,) = ff.plan(recipe, device="cuda", gpus=2, device_memory="64GiB", host_memory="1MiB").problems
    assert "systems whole" not in problem, "they are on the device"


@pytest.mark.parametrize("gpus", [0, 1025, "2", True, 2.0])
def test_what_is_no_number_of_ranks_is_refused(gpus: object) -> None:
    with pytest.raises(RecipeError, match=r"gpus: found .*, expected a whole number from 1 to 1,024"):
        ff.plan({}, gpus=gpus)


def test_the_model_of_a_job_on_several_ranks(tmp_path: Path) -> None:
    plan = ff.plan(pico.save(pico.job("llama", 4), tmp_path), device="cpu")
    fast, slow = (scale(plan, (1, 2, 4, 8), Speeds.at(1e9, link, 1e-6)).rows for link in (1e15, 1e8))
    assert fast[0].seconds == slow[0].seconds == pytest.approx(plan.seconds(1e9))
    assert (fast[0].received, fast[0].speed_up) == (0, 1)
    for rows in (fast, slow):
        assert all(0 < row.efficiency <= 1 for row in rows)
        assert all(row.seconds == pytest.approx(sum(row.phases.values())) for row in rows)
    assert all(row.seconds < other.seconds for row, other in zip(fast[1:], slow[1:], strict=True))
    assert [row.received for row in fast] == [row.received for row in slow]
    assert 1.8 < fast[1].speed_up < 2, "two tasks each, and hardly any transfer"
    assert fast[3].phases["sums"] >= fast[2].phases["sums"], "four tasks are not more on eight ranks"
    read = scale(plan, (1,), Speeds.at(1e9, reading=1e3)).rows[0]
    blocks = sum(sum(layer.blocks.values()) for layer in plan.layers)
    assert read.seconds == pytest.approx(blocks / 1e3), "reading, behind which computing hides"
    assert scale(plan, (1, 2), Speeds.at(1e9)).table().row_count == 2


def test_what_another_rank_solves_has_to_get_there(tmp_path: Path) -> None:
    """Systems that one rank solves by itself, where it is not the one that has the sums."""
    recipe = few_tokens("clip", 2, tmp_path)
    plan = ff.plan({**recipe, "settings": {"max_change": 0.5}}, device="cpu")
    quick, slow = (scale(plan, (2,), Speeds.at(1e9, link)).rows[0].phases for link in (1e15, 1e6))
    layer = plan.layers[0]
    shares = Shares(tuple(plan.tokens), 1, 2)
    (other,) = (rank for rank in range(2) if rank != shares.owners[-1])
    solved = {index for index, _ in Sharing(plan.settings, shares).dealt(layer)[other]}
    tokens = sum(map(sum, layer.rows.fitted.values()))
    sent = sum(layer.wire.fitted.systems[index].whole(tokens) for index in solved) + layer.wire.fitted.small
    assert solved
    assert slow["hand-out"] - quick["hand-out"] == pytest.approx(sent * len(plan.layers) / 1e6, rel=0.01)


def test_a_task_is_folded_by_whoever_owns_it(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("clip", 1), tmp_path)
    plan = ff.plan({**recipe, "settings": {"sample_shards": 2}}, device="cpu")
    folds = sum(layer.flops["fold"] for layer in plan.layers)
    rates = {"forward": 1e15, "moments": 1e15, "fold": 1e9, "solve": 1e15}
    one, two = scale(plan, (1, 2), Speeds(rates)).rows
    assert one.seconds == pytest.approx(folds / 1e9, rel=0.01)
    assert two.seconds == pytest.approx(folds / 1e9, rel=0.01)


def test_what_a_rank_receives_is_the_plans(tmp_path: Path) -> None:
    recipe = pico.save(pico.job("clip", 3), tmp_path)
    row = scale(ff.plan(recipe, device="cpu"), (3,), Speeds.at(1e9)).rows[0]
    assert row.received == max(each.received for each in ff.plan(recipe, device="cpu", gpus=3).ranks) > 0
