"""What a job will need, said beforehand: against hand calculation, and against what runs really read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pico
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import featcal_fast as ff
from featcal_fast.inputs.task_data import TaskData
from featcal_fast.planning.plan import format_bytes, parse_bytes
from featcal_fast.streaming.held_out import HeldOut

WIDTH, INNER, KEYS, LAYERS, VOCABULARY = 64, 160, 32, 3, 100  # of the pico Llama
ROWS, TOKENS, BATCH = 20, 20, 4
GIB = 2**30


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    return pico.save(pico.job("llama", 2), tmp_path)


def test_a_pico_llama_by_hand(recipe: dict) -> None:
    plan = ff.plan(recipe, device="cpu", host_memory=GIB * 64)
    assert plan.problems == []
    assert plan.tokens == {"task0": ROWS * TOKENS, "task1": ROWS * TOKENS}
    assert plan.calibrated == 7 * LAYERS
    for layer in plan.layers:
        groups = {group.modules: (group.in_features, sum(group.out_features)) for group in layer.layout.groups}
        attention = tuple(f"self_attn.{name}_proj" for name in "qkv")
        assert groups == {
            attention: (WIDTH, WIDTH + 2 * KEYS),
            ("self_attn.o_proj",): (WIDTH, WIDTH),
            ("mlp.gate_proj", "mlp.up_proj"): (WIDTH, 2 * INNER),
            ("mlp.down_proj",): (INNER, WIDTH),
        }
        a = sum(width * width for width, _ in groups.values())
        r = sum(width * out for width, out in groups.values())
        # q, k, v and gate, up in input space; o and down in output space; means of the inputs in float64, twice.
        t = 2 * WIDTH * WIDTH + WIDTH * WIDTH + INNER * WIDTH
        means = 2 * 8 * sum(width for width, _ in groups.values())
        assert layer.system == 4 * (a + r)
        assert layer.scratch == 4 * (a + t) + means

    parameters = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER
    block = 4 * (parameters + 2 * WIDTH)
    assert plan.host["blocks: student, base, expert"] == 3 * block
    # A task: all samples twice (student and expert), and the four that drift is told by in three models.
    waiting = 2 * (2 * ROWS + 3 * 4) * TOKENS * WIDTH * 4
    assert plan.host["hidden states"] == waiting
    assert plan.host["calibration data"] == 2 * 2 * ROWS * TOKENS * 8

    embedding = 4 * VOCABULARY * WIDTH
    model = LAYERS * block + 2 * embedding + 4 * WIDTH
    kept = embedding * 2 + 4 * WIDTH + LAYERS * 2 * 4 * WIDTH
    assert plan.bytes_read == {
        "merged model": embedding + LAYERS * block + kept,
        "base model": LAYERS * block,
        "expert task0": embedding + LAYERS * block,
        "expert task1": embedding + LAYERS * block,
    }
    assert plan.bytes_written == {"calibrated model": model}
    # Two generations.
    assert plan.disk == {"calibrated model": model, "hidden states, to resume from": 2 * waiting}
    assert ff.plan(recipe, device="cpu", checkpoint_every=0).disk == {"calibrated model": model}


def test_arithmetic_by_hand(recipe: dict) -> None:
    for expert in recipe["experts"].values():
        data = load_file(expert["data"])
        save_file({**data, "attention_mask": torch.ones_like(data["attention_mask"])}, expert["data"])
    flops = ff.plan(recipe, device="cpu").flops
    positions = 2 * ROWS * TOKENS
    attention = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS
    scores = 2 * TOKENS * WIDTH
    expert = 2 * (attention + 3 * WIDTH * INNER + scores)
    student = expert - 2 * WIDTH * INNER  # stops before down_proj
    assert flops["forward"] == positions * (LAYERS * (expert + student) + (LAYERS - 1) * expert)

    triangle = INNER * INNER  # one block of rows
    moments = 2 * (3 * WIDTH * WIDTH + triangle) + 2 * (3 * WIDTH * WIDTH + INNER * WIDTH)
    assert flops["moments"] == positions * LAYERS * moments

    q_and_gate = WIDTH + 2 * KEYS + 2 * INNER  # two products each, in input space; o and down one, in output space
    fold = 2 * (2 * WIDTH * WIDTH * q_and_gate + WIDTH * WIDTH * WIDTH + INNER * INNER * WIDTH)
    assert flops["fold"] == 2 * LAYERS * fold

    sizes = ((WIDTH, WIDTH + 2 * KEYS), (WIDTH, WIDTH), (WIDTH, 2 * INNER), (INNER, WIDTH))
    assert flops["solve"] == pytest.approx(LAYERS * sum(n**3 / 3 + 2 * n * n * out for n, out in sizes))


def test_held_out_samples_by_hand(recipe: dict) -> None:
    held, fitted = ROWS // 5, ROWS - ROWS // 5
    whole, plan, ungated = (
        ff.plan({**recipe, "held_out": share, "settings": {"keep_better": keep}}, device="cpu", host_memory=GIB * 64)
        for share, keep in ((0, True), (0.2, True), (0.2, False))
    )
    assert plan.tokens == {"task0": fitted * TOKENS, "task1": fitted * TOKENS}
    assert plan.host["hidden states"] == 2 * (2 * fitted + 3 * held) * TOKENS * WIDTH * 4
    assert plan.host["calibration data"] == whole.host["calibration data"]
    assert plan.flops["moments"] == pytest.approx(whole.flops["moments"] * fitted / ROWS)
    assert (plan.flops["fold"], plan.flops["solve"]) == (whole.flops["fold"], whole.flops["solve"])
    # A block's products alone: what attention takes depends on padding.
    block = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER)
    passes = (plan.flops["forward"] - ungated.flops["forward"]) / (2 * held * TOKENS * LAYERS)
    assert 2 * block < passes < 2.2 * block, "the gate's: calibrated hidden states pass the block with both weights"
    fewer = whole.flops["forward"] * fitted / ROWS
    assert ungated.flops["forward"] - fewer == pytest.approx(1.5 * (plan.flops["forward"] - ungated.flops["forward"]))


@pytest.mark.parametrize("storage", ["disk", "host", "host-nf4"])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("kind", ["llama", "clip", "t5"])
def test_a_run_reads_and_changes_what_was_planned(kind: str, merge: bool, storage: str, tmp_path: Path) -> None:
    recipe = {**pico.save(pico.job(kind, 2), tmp_path), "expert_storage": storage}
    if merge:
        del recipe["merged_model"]
        recipe["merge"] = {"method": "task_arithmetic"}
    plan = ff.plan(recipe)
    report = ff.calibrate(recipe)
    assert plan.bytes_read == report.bytes_read
    report.bytes_written.pop("hidden states, to resume from", None)  # as often as time allows
    assert plan.bytes_written == report.bytes_written
    assert plan.calibrated == report.calibrated
    assert all(plan.tokens[task] >= count for task, count in report.tokens.items())


@pytest.mark.parametrize("kind", ["llama tied", "t5", "bert classifier", "vit classifier"])
def test_what_heads_of_models_read_is_planned_too(kind: str, tmp_path: Path) -> None:
    """Where samples are held out, of which models give outputs in the end; a classifier's own head reads all three."""
    recipe = {**pico.save(pico.job(kind, 2), tmp_path), "held_out": 0.2, "settings": {"keep_better": False}}
    plan, report = ff.plan(recipe), ff.calibrate(recipe)
    assert plan.bytes_read == report.bytes_read
    without = ff.plan({**recipe, "held_out": 0}).bytes_read
    more = {label for label, size in plan.bytes_read.items() if size > without[label]}
    experts = {"expert task0", "expert task1"}
    assert more == (experts if "classifier" in kind else experts | {"merged model"})


def test_outputs_are_a_phase_of_their_own(tmp_path: Path) -> None:
    """By hand: all that is not in layers, of two models; hidden states and logits of three; four parts of those."""
    vocabulary = 3000
    recipe = pico.save(pico.job("llama", 1, vocab_size=vocabulary), tmp_path)
    plan = ff.plan({**recipe, "held_out": 0.2}, device="cpu")
    outside = 4 * (2 * vocabulary * WIDTH + WIDTH)
    logits = 4 * BATCH * TOKENS * vocabulary
    assert plan.host["outputs of held-out samples"] == 2 * outside + 3 * 4 * BATCH * TOKENS * WIDTH + (3 + 4) * logits
    assert "ridge systems" not in plan.host
    assert "outputs of held-out samples" not in ff.plan(recipe, device="cpu").host


def test_weights_that_stay_are_listed_with_reasons(recipe: dict) -> None:
    kept = ff.plan({**recipe, "settings": {"exclude": ["down_proj"]}}).kept
    assert kept["model.embed_tokens.weight"] == "outside of the layers"
    assert kept["model.layers.*.input_layernorm.weight"] == "RMSNorm has no closed-form update"
    assert "exclude" in kept["model.layers.*.mlp.down_proj.weight"]
    assert "model.layers.*.mlp.up_proj.weight" not in kept


def test_texts_count_as_long_as_they_are(recipe: dict, tmp_path: Path, bare: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a b"}\n\n{"text": "b c d e"}\n{"text": "c"}\n')
    for expert in recipe["experts"].values():
        expert["data"] = str(tmp_path / "texts.jsonl")
    shutil.copytree(bare, tmp_path / "merged", dirs_exist_ok=True, ignore=lambda *_: ["config.json"])
    plan = ff.plan({**recipe, "max_length": 3})
    assert plan.tokens == {"task0": 3 * 3, "task1": 3 * 3}
    assert plan.exact


def test_data_sets_count_as_long_as_they_may_be(recipe: dict, tmp_path: Path) -> None:
    for expert in recipe["experts"].values():
        expert["data"] = "org/of-the-hub"
    plan = ff.plan({**recipe, "max_length": 50, "samples": 2})
    assert plan.tokens == {"task0": 100, "task1": 100}
    assert not plan.exact
    assert "at most" in plan.summary()


def test_a_key_that_changes_nothing_is_not_named(recipe: dict, tmp_path: Path) -> None:
    """Ready inputs are not cut; a task's own number of samples is not the recipe's."""
    recipe["experts"]["task0"]["samples"] = 16
    plan = ff.plan({**recipe, "batch_size": None}, device="cpu", host_memory=1 << 20)
    assert plan.problems[0].endswith("it takes a larger machine")
    for key in ("samples", "batch_size", "max_length"):
        assert key not in plan.problems[0]


def test_experts_that_need_not_be_in_memory_are_named(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcal_fast.planning.planner.resident_bytes", lambda: 0)
    monkeypatch.setattr("featcal_fast.planning.memory.resident_bytes", lambda: 0)
    on_disk = ff.plan(recipe, device="cpu", scratch=".")
    plan = ff.plan({**recipe, "expert_storage": "host"}, device="cpu", scratch=".", host_memory=on_disk.host_bytes)
    assert plan.problems[0].endswith("expert_storage: disk would fit")


def test_a_full_scratch_disk_is_noticed_beforehand(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcal_fast.files.free_bytes", lambda _: 700_000)
    problem = r"scratch: the disk of \S+ needs 1.05 MiB, but 684 KiB are free; choose a folder on another$"
    with pytest.raises(ff.FeatCalError, match=problem):  # the model and the hidden states
        ff.plan(recipe, device="cpu", scratch=Path(recipe["out"]).parent, checkpoint_every=0).check()


def test_a_disk_without_room_to_resume_from_is_noticed_beforehand(
    recipe: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcal_fast.files.free_bytes", lambda _: 700_000)
    with pytest.raises(ff.FeatCalError, match=r"out: the disk of .* are free; .*, or --no-checkpoint, with which an"):
        ff.plan(recipe, device="cpu").check()
    ff.plan(recipe, device="cpu", checkpoint_every=0).check()


def test_where_memory_is_scarce_fewer_tokens_pass_at_a_time(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcal_fast.planning.planner.resident_bytes", lambda: 0)
    monkeypatch.setattr("featcal_fast.planning.memory.resident_bytes", lambda: 0)
    job = {**recipe, "batch_size": None}
    whole = ff.plan(job, device="cpu")
    assert whole.chunk == ROWS * TOKENS
    less = ff.plan(job, device="cpu", host_memory=whole.host_bytes - 1)
    assert less.problems == []
    assert less.chunk == ROWS * TOKENS // 2


def test_what_no_key_can_make_fit_says_so(recipe: dict) -> None:
    plan = ff.plan({**recipe, "samples": 32}, device="cpu", host_memory=1 << 20)
    assert len(plan.problems) == 1
    assert plan.problems[0].startswith("host memory: the job needs")
    assert "but 1 MiB may be used (--host-memory)" in plan.problems[0]
    assert "no smaller batch_size or samples alone would fit (the least is" in plan.problems[0]


def test_the_first_key_that_fits_is_named(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a fixed baseline, so that this process's own size plays no part."""
    monkeypatch.setattr("featcal_fast.planning.planner.resident_bytes", lambda: 0)
    monkeypatch.setattr("featcal_fast.planning.memory.resident_bytes", lambda: 0)
    job = {**recipe, "batch_size": 16}
    whole = ff.plan(job, device="cpu", host_memory=64 * GIB)
    halved = ff.plan({**job, "batch_size": 8}, device="cpu", host_memory=64 * GIB)
    assert halved.host_bytes < whole.host_bytes
    plan = ff.plan(job, device="cpu", host_memory=halved.host_bytes)
    assert plan.problems[0].endswith("batch_size: 8 would fit")
    with pytest.raises(ff.FeatCalError, match="batch_size: 8 would fit"):
        plan.check()


def test_calibrate_checks_first_and_writes_nothing(recipe: dict, tmp_path: Path) -> None:
    with pytest.raises(ff.FeatCalError, match=r"host memory: the job needs .* but 1 MiB may be used"):
        ff.calibrate(recipe, device="cpu", host_memory=1 << 20)
    assert not (tmp_path / "out").exists()


def test_a_plan_reads_no_weights(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featcal_fast.checkpoints.shards.Shards.read", lambda *_, **__: pytest.fail("read"))
    ff.plan(recipe)


def test_sizes_of_loaded_data() -> None:
    batches = [{"input_ids": torch.zeros(4, width, dtype=torch.long)} for width in (5, 10, 10)]
    data = TaskData.of(batches)
    assert (data.batches, data.rows, data.nbytes) == (2.5, 12, 8 * 100)
    assert data.resized(batch_size=2).batches == 5
    assert data.resized(batch_size=2).nbytes == data.nbytes
    assert data.resized(samples=6).nbytes == data.nbytes / 2
    assert data.resized(max_length=5).nbytes == data.nbytes / 2


def test_sizes_of_held_out_data() -> None:
    widths = (5, 10, 10, 5, 10)
    batches = [{"input_ids": torch.zeros(4, width, dtype=torch.long)} for width in widths]
    data = TaskData.of([*batches[:3], *map(HeldOut, batches[3:])])
    assert (data.batches, data.rows, data.held_batches, data.held_out, data.fitted_batches) == (4, 20, 1.5, 8, 2.5)
    halved = data.resized(samples=10)
    assert (halved.rows, halved.held_out, halved.held_batches, halved.fitted_batches) == (10, 4, 0.75, 1.25)
    single = data.resized(batch_size=1)
    assert (single.held_out, single.held_batches, single.fitted_batches) == (8, 6, 10)
    least = data.resized(samples=2)
    assert (least.batches, least.rows, least.held_out) == (1, 2, 1)
    assert least.held_batches == pytest.approx(1.5 / 4)


def test_bytes_are_read_and_said_with_units() -> None:
    assert parse_bytes("24GB") == 24 * 10**9
    assert parse_bytes("22.5 GiB") == 22.5 * GIB
    assert parse_bytes("512mib") == 512 * 2**20
    for text in ("24", "24 apples", "", "-1GB"):
        with pytest.raises(ff.FeatCalError, match="expected a number and a unit"):
            parse_bytes(text)
    assert [format_bytes(size) for size in (12, 2048, 3 * 2**20, 1.5 * GIB)] == ["12 B", "2 KiB", "3 MiB", "1.5 GiB"]


def test_the_command_says_it_all_and_its_exit_code_whether_it_fits(
    recipe: dict, tmp_path: Path, command: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")  # no run before
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = ("plan", str(tmp_path / "recipe.yaml"), "--device", "cpu")
    code, shown, errors = command(*job, "--rate", "2")
    assert code == 0, errors
    for text in ("q_proj, k_proj, v_proj", "RMSNorm has no closed-form update", "peaks: host", "at 2 TFLOP/s"):
        assert text in shown
    assert "by products measured just now" in command(*job)[1]
    for rate in ("0", "-1", "nan"):
        assert "--rate" in command(*job, "--rate", rate)[2]
    code, _, errors = command(*job, "--host-memory", "10MiB")
    assert code == 1
    assert "host memory: the job needs" in errors
    (tmp_path / "task1" / "model.safetensors").unlink()
    code, _, errors = command(*job)
    assert code == 1
    assert "expert task1" in errors


@pytest.mark.parametrize("name", ["data.doc", "data.xlsx"])
def test_a_plan_refuses_what_a_run_would(name: str, recipe: dict, tmp_path: Path) -> None:
    (tmp_path / name).write_text("a,b\n1,2\n")
    recipe["experts"]["task0"]["data"] = str(tmp_path / name)
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match="found the unknown file type"):
            run(recipe)


def test_tensors_that_are_no_model_inputs_are_refused(recipe: dict, tmp_path: Path) -> None:
    save_file({"input_ids": torch.arange(8)}, tmp_path / "flat.safetensors")
    recipe["experts"]["task0"]["data"] = str(tmp_path / "flat.safetensors")
    for run in (ff.plan, ff.calibrate):
        with pytest.raises(ff.FeatCalError, match=r"flat.safetensors, sample \d, input_ids: found"):
            run({**recipe, "batch_size": None})


def test_a_picture_beside_tables_is_not_the_data(recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "banner.png").write_bytes(b"")
    datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 40}).to_parquet(folder / "train.parquet")
    recipe["experts"]["task0"]["data"] = str(folder)
    plan = ff.plan({**recipe, "samples": 32})
    assert plan.exact
    assert plan.tokens["task0"] == 32 * 3
