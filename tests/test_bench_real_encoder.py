"""The study of a sentence encoder, on a pico BERT and made-up texts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data_files import save_tokenizer
from torch import nn
from transformers import BertConfig, BertModel

import featcal_fast as ff
from bench.harness.results import Results
from bench.real import encoder, finetune_encoder, models_encoder
from bench.real.finetune_encoder import Batches, Labelled, Training, expert, features, fit, head
from bench.real.finetune_lm import padded
from bench.real.repairs import Repair, decided
from bench.real.tasks import Task
from bench.real.units import ANCHORS, ARITHMETIC, BASE, EXPERTS, ITEMS, SECTION, TIES, Rows, Unit
from bench.workers.common import load_model

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(20))]
TRAINING = Training(max_length=8, head_texts=40, texts=40, steps=12, batch_size=8, learning_rate=3e-3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "base"
    save_tokenizer(folder, words=WORDS)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def made_up(name: str, word: int) -> Task:
    """The class is whether a word is there."""
    draw = random.Random(name)
    rows = []
    for _ in range(90):
        words = [f"w{draw.randrange(10, 20)}" for _ in range(draw.randrange(2, 9))]
        label = draw.randrange(2)
        words[0] = f"w{word + label}"
        rows.append((" ".join(words), label))
    parts = {"training": rows[:50], "validation": rows[50:66], "test": rows[66:]}
    return Task(name, ("no", "yes"), parts, {part: list(range(len(each))) for part, each in parts.items()})


def some(count: int = 40) -> Labelled:
    draw = random.Random(0)
    ids = [[1, *(draw.randrange(4, 24) for _ in range(draw.randrange(1, 7))), 2] for _ in range(count)]
    return Labelled(ids, torch.tensor([i % 2 for i in range(count)]))


def test_features_do_not_depend_on_padding_and_are_of_one_length(base: Path) -> None:
    model, ids = load_model(base, torch.float32), some().ids
    together = features(model, ids)
    alone = torch.cat([features(model, [each]) for each in ids])
    assert torch.allclose(together, alone, atol=0.05)  # products in bfloat16
    assert torch.allclose(together.square().mean(-1), torch.ones(len(ids)), atol=1e-4)


def test_a_head_finds_the_classes_and_is_pulled_to_nothing() -> None:
    random_ = torch.Generator().manual_seed(0)
    given = torch.randn(200, 6, generator=random_)
    labels = (given[:, 0] > 0.3).long()
    found = fit(given, labels, 2, 1e-3)
    assert (F.linear(given, **found).argmax(-1) == labels).double().mean() > 0.95
    assert fit(given, labels, 2, 1.0)["weight"].norm() < found["weight"].norm() / 2


def test_batches_have_every_text_once_before_any_twice() -> None:
    texts = some(64)
    batches = Batches(texts, 8, torch.Generator().manual_seed(0))
    drawn = [batches.draw(step) for step in range(8)]
    rows = [row[mask.bool()].tolist() for each in drawn for row, mask in zip(each["input_ids"], each["attention_mask"], strict=True)]  # fmt: skip  # noqa: E501
    assert sorted(rows) == sorted(texts.ids)
    spans = [int(each["attention_mask"].sum(1).max() - each["attention_mask"].sum(1).min()) for each in drawn]
    assert sum(spans) <= 8  # of like length


def test_an_expert_is_trained_once_for_its_settings_and_has_the_other_files_of_its_base(
    base: Path, tmp_path: Path
) -> None:
    texts = some()
    task_head = head(base, texts, 2, TRAINING, tmp_path)
    first = expert(base, texts, task_head, TRAINING, "a 0", tmp_path)
    weights = (first / "model.safetensors").read_bytes()
    changed = (first / "model.safetensors").stat().st_mtime_ns
    assert weights != (base / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert expert(base, texts, task_head, TRAINING, "a 0", tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == changed
    others = [
        expert(base, texts, task_head, replace(TRAINING, steps=3), "a 0", tmp_path),
        expert(base, texts, task_head, TRAINING, "a 1", tmp_path),
        expert(base, texts, {**task_head, "bias": task_head["bias"] + 1}, TRAINING, "a 0", tmp_path),
    ]
    assert len({first, *others}) == 4
    again = expert(base, texts, task_head, TRAINING, "a 0", tmp_path / "elsewhere")
    assert (again / "model.safetensors").read_bytes() == weights  # of the same key, the same bits
    assert not list(tmp_path.rglob("*.part"))


def in_memory(by: Any, repair: Repair, count: int) -> tuple[nn.Module, ff.Report]:
    """The calibrated model, without starting a process and reading."""
    pool = models_encoder.pool_of(by)
    model = models_encoder.Line(pool.base, encoder.task_arithmetic(pool, 1.0)).at(repair.scaling)
    batches, held_out = {}, {}
    for task, numbers in by.calibration(count).items():
        ids = [by.texts[task]["training"].ids[n] for n in numbers]
        fitted = len(ids) - round(repair.held_out * len(ids))
        batches[task] = [padded(ids[:fitted])]
        held_out |= {task: [padded(ids[fitted:])]} if ids[fitted:] else {}
    given: dict[str, Any] = {"base": pool.base, "experts": pool.experts, "batches": batches, "held_out": held_out}
    return model, ff.calibrate_model(model, **given, settings=repair.settings)


@pytest.fixture
def study(base: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """The study in small, and what calibrations it asked for."""
    asked: list[tuple[int, Any]] = []
    found = {name: made_up(name, word) for name, word in (("a", 0), ("b", 2))}
    monkeypatch.setattr(models_encoder, "base_encoder", lambda archives, folder: base)
    monkeypatch.setattr(models_encoder, "tasks", lambda archives: found)
    monkeypatch.setattr(encoder, "TRAINING", TRAINING)
    monkeypatch.setattr(encoder, "QUICK", replace(TRAINING, steps=4))
    monkeypatch.setattr(encoder.surgery.train, "__defaults__", (encoder.surgery.Training(steps=20),))

    def calibrated(by: Any, repair: Repair, count: int) -> Any:
        asked.append((count, repair))
        model, report = in_memory(by, repair, count)
        return model, {"took": {"seconds": 1.0}, **decided(report)}

    monkeypatch.setattr(encoder, "calibrated", calibrated)
    return asked


def test_a_run_has_every_row_and_measures_none_twice(study: list[tuple[int, Any]], tmp_path: Path) -> None:
    monitor = tmp_path / "rows.json"
    unit = encoder.units(quick=False)[0]
    encoder.run(unit, {}, tmp_path, Rows(Results(monitor, {"time": 0})), quick=False)
    rows = Results(monitor, {"time": 0}).of(SECTION)
    featcal = [f"FeatCal {n}{ending}" for ending in ("", ", chosen") for n in (8, 32, 128, 256)]
    operated = [f"{kind} {n}" for n in (32, 256) for kind in ("Surgery", "ProbSurgery")]
    assert list(rows) == [ITEMS, BASE, EXPERTS, ARITHMETIC, *ANCHORS, TIES, *operated, *featcal]
    assert rows[ITEMS]["sizes"] == {"a": [1] * 24, "b": [1] * 24}
    for key in list(rows)[1:]:
        assert {task: len(items) for task, items in rows[key]["items"].items()} == {"a": 24, "b": 24}
        assert {value for items in rows[key]["items"].values() for value in items} <= {0, 1}
    curve = rows[ARITHMETIC]["validation"]["curve"]
    assert curve[f"{rows[ARITHMETIC]['validation']['scaling']:g}"] == max(curve.values())
    assert sum(map(sum, rows[EXPERTS]["items"].values())) >= sum(map(sum, rows[BASE]["items"].values()))
    calls = len(study)
    encoder.run(unit, {}, tmp_path, Rows(Results(monitor, {"time": 0})), quick=False)
    assert len(study) == calls == 8


def test_calibration_reads_the_same_texts_as_a_user_gives_them(study: list[tuple[int, Any]], tmp_path: Path) -> None:
    """Folders and files of texts, in a process of its own, make the model that token ids in memory make."""
    by = models_encoder.given({}, tmp_path, 0, TRAINING, encoder.MOST)
    model, found = models_encoder.calibrated(by, encoder.PRESET, 8)
    here, _ = in_memory(by, encoder.PRESET, 8)
    for name, value in here.named_parameters():
        assert torch.allclose(model.get_parameter(name), value, atol=1e-4), name
    assert found["took"]["plan"]["host"] > 0
    assert found["took"]["calibrated_weights"] == 12
    assert set(found) == {"took"}  # all are fitted to
    assert not list(by.folder.glob(".calibrate-*"))
    small, large = by.calibration(4), by.calibration(8)
    assert all(large[task][:4] == numbers for task, numbers in small.items())


def test_settings_are_compared_on_the_validation_part(
    study: list[tuple[int, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "GRID", encoder.GRID[:2])
    found = encoder.choose({}, tmp_path, Rows(Results(None, {})), quick=True)
    judged = found["with held-out samples"]
    for part in (found, judged):
        assert part["means"][part["best"]] == max(part["means"].values())
    assert len(found["means"]) == 2
    assert [repair["settings"]["anchor_rho"] for repair in judged["grid"].values()] == [2, 3, 3, 3, 3]
    for name, repair in judged["grid"].items():
        score = judged["scores"][f"{name}, 8"]
        assert score["held_out"] == {"a": 2, "b": 2}
        assert score["outcome"]["merged"] > 0
        assert sum(score["ridges"].values()) == (12 if repair["settings"]["auto"] else 0)
        assert score["outcome"]["kept"] if repair["settings"]["keep_better"] else not score["kept"]
    json.dumps(found)


def test_what_is_made_depends_on_who_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [finetune_encoder._hash("a")]
    monkeypatch.setattr(finetune_encoder, "versions", lambda: {"torch": "another"})
    found.append(finetune_encoder._hash("a"))
    monkeypatch.setattr(finetune_encoder, "code_hash", lambda files: "other")
    found.append(finetune_encoder._hash("a"))
    assert len(set(found)) == 3


def test_rows_depend_on_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for word in (0, 2):
        monkeypatch.setattr(encoder, "tasks", lambda _, word=word: {"a": made_up("a", word)})
        found.append(encoder.fingerprint({}))
    assert found[0] != found[1]


def test_a_unit_a_seed() -> None:
    assert encoder.units(quick=True) == [Unit("encoder", "full", 0)]
    assert [unit.seed for unit in encoder.units(quick=False)] == [0, 1, 2]
    for quick in (False, True):
        found = encoder.describe(quick)
        assert json.loads(json.dumps(found)) == found  # or finished rows would never be taken
