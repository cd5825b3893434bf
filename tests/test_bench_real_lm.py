"""The study of a language model: experts as folders, what they are measured by, and a run on a pico Llama."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pico
import pytest
import torch
import torch.nn.functional as F
from data_files import WORDS, save_tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer

import featcal_fast as ff
from bench.harness import process
from bench.harness.results import Results
from bench.real import finetune_lm, lm, measure_lm, summary
from bench.real.finetune_lm import Training, expert, load, padded
from bench.real.measure_lm import Sample
from bench.real.models_lm import Sizes
from bench.real.repairs import Repair, with_held_out
from bench.real.texts import PARTS, Text
from bench.real.units import ITEMS, SECTION, Rows, Unit
from bench.workers import ours

TRAINING = Training(steps=3, learning_rate=1e-2, rank=2, alpha=4, texts=2)
LETTERS = WORDS[5:]
SIZES = Sizes(length=8, test=6, validation=4, training=20, other=5, said=4, given=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm") / "base"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = pico.llama(2, vocab_size=len(WORDS), tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    return save_tokenizer(folder, wrapped=False)


def made_up(domain: int, count: int, part: str) -> list[Text]:
    """Runs of letters, in steps that differ from domain to domain."""
    rows = [[LETTERS[(start + step * (domain + 1)) % len(LETTERS)] for step in range(10)] for start in range(count)]
    return [Text(" ".join(row), f"{part} {number // 2}") for number, row in enumerate(rows)]


class Uniform(nn.Module):
    """Every word is as likely as any other."""

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 32))


# What is measured


def test_a_uniform_model_needs_the_bits_of_a_word_for_every_word_but_the_given_ones() -> None:
    samples = [Sample(tuple(range(length)), known, 1, "") for length, known in ((9, 1), (2, 1), (5, 3))]
    assert measure_lm.bits(Uniform(), samples) == pytest.approx([8 * 5, 5, 2 * 5])


def test_a_text_counts_the_bytes_that_are_predicted(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = measure_lm.encode(tokenizer, "a b c d", "file", 3)
    assert found == Sample((5, 6, 7), 1, len(" b c"), "file")
    assert measure_lm.encode(tokenizer, "a", "file", 3) is None


def test_batches_and_padding_change_nothing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = load(base, torch.float32), load(base, torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    samples = [Sample(tuple(range(3, 3 + length)), 1, 1, "") for length in (4, 9, 2, 7, 5)]
    found = measure_lm.bits(model, samples), measure_lm.divergences(model, other, samples)
    monkeypatch.setattr(measure_lm, "TEXTS", 2)
    monkeypatch.setattr(measure_lm, "ROWS", 3)
    assert measure_lm.bits(model, samples) == pytest.approx(found[0], rel=1e-4)
    assert measure_lm.divergences(model, other, samples) == pytest.approx(found[1], rel=1e-3)
    for sample, bits, nats in zip(samples, *found, strict=True):
        ids = torch.tensor([sample.ids])
        with torch.no_grad():
            said, meant = (each(input_ids=ids).logits[0, :-1].log_softmax(-1) for each in (other, model))
        assert bits == pytest.approx(-float(meant.gather(1, ids[0, 1:, None]).sum()) / math.log(2), rel=1e-4)
        assert nats == pytest.approx(float((meant.exp() * (meant - said)).sum()), rel=1e-3)
    assert measure_lm.divergences(model, model, samples) == pytest.approx([0] * 5, abs=1e-6)


def test_continuations_are_sampled_once_and_end_at_the_end(base: Path, tmp_path: Path) -> None:
    model, path = load(base), tmp_path / "said.json"
    starts = [[5, 6], [7, 8], [9, 10]]
    first = measure_lm.continuations(model, starts, 6, 2, path)
    assert [sample.ids[:2] for sample in first] == [(5, 6), (7, 8), (9, 10)]
    assert all(sample.size == len(sample.ids) - 2 > 0 for sample in first)
    path.write_text(json.dumps([[5, 6, 7, 2, 0, 0], [7, 8, 9, 10, 11, 12], [9, 10, 2, 0, 0, 0]]))
    kept = measure_lm.continuations(model, starts, 6, 2, path)
    assert [sample.ids for sample in kept] == [(5, 6, 7, 2), (7, 8, 9, 10, 11, 12), (9, 10, 2)]
    assert [sample.size for sample in kept] == [2, 4, 1]


# Experts


@pytest.mark.parametrize("form", ["lora", "full"])
def test_an_expert_is_trained_once_and_read_as_it_is(
    form: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [[5, 6, 7, 8], [6, 7, 8], [7, 8, 9, 10], [8, 9]]
    path = expert(base, texts, form, TRAINING, "domain 0", tmp_path / "experts")
    written = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert expert(base, texts, form, TRAINING, "domain 0", tmp_path / "experts") == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == written
    assert (path / "adapter_config.json").exists() == (form == "lora")
    others = [
        expert(base, texts, form, replace(TRAINING, steps=1), "domain 0", tmp_path / "experts"),
        expert(base, texts[:3], form, TRAINING, "domain 0", tmp_path / "experts"),
        expert(base, texts, form, TRAINING, "domain 1", tmp_path / "experts"),
    ]
    monkeypatch.setattr(finetune_lm, "versions", lambda *_: {"torch": "another"})
    others.append(expert(base, texts, form, replace(TRAINING, steps=1), "domain 0", tmp_path / "experts"))
    assert len({path, *others}) == 5
    assert sorted(each.name for each in (tmp_path / "experts").iterdir()) == sorted(p.name for p in {path, *others})

    batch = padded(texts)
    trained, before = load(path), load(base)
    with torch.no_grad():
        losses = [
            float(F.cross_entropy(m(**batch).logits[0, :-1].float(), batch["input_ids"][0, 1:]))
            for m in (trained, before)
        ]
    assert losses[0] < losses[1] - 0.1
    merge = {"method": "task_arithmetic", "scaling": 1.0}
    one = {"base_model": str(base), "merge": merge, "experts": {"a": {"model": str(path), "data": "a.jsonl"}}}
    ff.merge(one, out=tmp_path / "merged")
    for name, value in load(tmp_path / "merged").named_parameters():
        assert torch.allclose(value, trained.get_parameter(name), rtol=2**-7, atol=1e-5), name


# The study


@pytest.fixture
def study(base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Everything small, and calibration in this process; counts what is merged and calibrated."""
    calls = {"merges": 0, "calibrations": 0}
    found = {
        domain: {part: made_up(number, 30, part) for part in PARTS} for number, domain in enumerate(("one", "two"))
    }

    def in_this_process(command: Sequence[str], **_: object) -> dict[str, Any]:
        calls["calibrations"] += 1
        ours.main(list(command[3:]))
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    def merge(*args: Any, **options: Any) -> Any:
        calls["merges"] += 1
        return merges(*args, **options)

    merges = ff.merge
    monkeypatch.setattr(process, "last_json", in_this_process)
    monkeypatch.setattr(ours, "configure_process", lambda: None)
    monkeypatch.setattr(ff, "merge", merge)
    monkeypatch.setattr(lm, "domains", lambda _: found)
    monkeypatch.setattr(lm, "other", lambda _: made_up(4, 12, "other"))
    monkeypatch.setattr(lm, "base_lm", lambda *_: base)
    monkeypatch.setattr(lm, "SIZES", SIZES)
    monkeypatch.setattr(lm, "TRAININGS", {"lora": TRAINING, "full": TRAINING})
    monkeypatch.setattr(lm, "COUNTS", {"lora": ((8,), (8,)), "full": ((4,), (4,))})
    monkeypatch.setattr(lm, "SCALINGS", (0.3, 1.0))
    monkeypatch.setattr(lm, "TIES_SCALINGS", (1.0,))
    return calls


def test_a_run_measures_every_row_and_goes_on(study: dict[str, Any], tmp_path: Path) -> None:
    kept = Results(tmp_path / "rows.json", {})
    lm.run(Unit("lm", "lora", 0), {}, tmp_path, Rows(kept), quick=False)
    rows = kept.of(SECTION)
    forget = {lm.OTHER, lm.KL}
    assert set(rows[ITEMS]["sizes"]) == {"one", "two"} | forget == set(rows[ITEMS]["files"])
    assert set(rows[ITEMS]["apart"]) == forget
    assert [len(rows[ITEMS]["sizes"][name]) for name in ("one", "two", lm.OTHER, lm.KL)] == [6, 6, 5, 4]
    assert rows[ITEMS]["files"]["one"] == [0, 0, 2, 2, 4, 4]
    for key in ("base", "task arithmetic", "TIES", "anchor alone, preset", "FeatCal 8", "FeatCal 8, chosen"):
        assert {name: len(values) for name, values in rows[key]["items"].items()} == {
            name: len(sizes) for name, sizes in rows[ITEMS]["sizes"].items()
        }
    assert set(rows["own expert"]["items"]) == {"one", "two"}
    assert sum(rows["own expert"]["items"]["one"]) < sum(rows["base"]["items"]["one"])
    assert rows["base"]["items"][lm.KL] == [0.0] * 4
    assert min(rows["task arithmetic"]["items"][lm.KL]) > 0
    curve = rows["task arithmetic"]["validation"]["curve"]
    assert rows["task arithmetic"]["validation"]["scaling"] == min(curve, key=lambda scaling: curve[scaling])
    assert {"seconds", "peak_gib", "plan"} <= set(rows["FeatCal 8"]["took"])
    assert len(rows["FeatCal 8"]["drift"]) == 2
    assert not [path for path in (tmp_path / "lm").iterdir() if path.name.startswith(".")]

    calls = dict(study)
    again = Results(tmp_path / "rows.json", {"time": ""} | kept.environment)
    again.rows = {SECTION: {key: row for key, row in rows.items() if key != "FeatCal 8"}}
    lm.run(Unit("lm", "lora", 0), {}, tmp_path, Rows(again), quick=False)
    assert study == {"merges": calls["merges"], "calibrations": calls["calibrations"] + 1}
    assert again.of(SECTION)["FeatCal 8"]["items"] == rows["FeatCal 8"]["items"]


def test_settings_are_compared_on_the_validation_part(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = [Repair(0.3, ff.Settings(ridge_lambda=ridge)) for ridge in (1e-3, 1e3)]
    judged = with_held_out(lm.CHOSEN)
    monkeypatch.setattr(lm, "GRID", grid)
    monkeypatch.setattr(lm, "with_held_out", lambda _: {name: judged[name] for name in ("auto", "chosen, no gate")})
    monkeypatch.setattr(lm, "CHOSEN_WITH", (4,))
    measured = []
    bits = lm.bits
    monkeypatch.setattr(lm, "bits", lambda model, samples: measured.append(samples) or bits(model, samples))
    found = lm.choose({}, tmp_path, Rows(Results(None, {})), quick=False)
    json.dumps(found)
    assert study["calibrations"] == 4
    assert {sample.file.split()[0] for samples in measured for sample in samples} == {"validation"}
    assert found["seed"] == 100
    assert set(found["means"]) == set(found["grid"])
    assert found["means"][found["best"]] == min(found["means"].values())
    for name in found["grid"]:
        score = found["scores"][f"{name}, 4"]
        assert found["means"][name] == score["mean"] == pytest.approx((score["one"] + score["two"]) / 2)
    assert found["scores"]["own expert"]["mean"] < found["scores"]["base"]["mean"]
    scores = found["with held-out samples"]["scores"]
    assert all(each["held_out"] == {"one": 1, "two": 1} for each in scores.values())
    assert [each["outcome"]["measure"] for each in scores.values()] == ["KL of the outputs"] * 2
    assert sum(scores["auto, 4"]["ridges"].values()) == 14  # of seven modules in each of two layers
    assert sum(scores["auto, 4"]["alphas"].values()) == 2
    assert [scores["chosen, no gate, 4"][what] for what in ("kept", "ridges", "alphas")] == [{}, {}, {}]


def test_without_other_texts_only_the_domains_are_measured(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "other", lambda _: [])
    by = lm.given({}, tmp_path, "lora", 0, quick=False)
    rows = {ITEMS: lm._items(by), "base": lm.base_row(by), "own expert": lm.base_row(by)}
    assert set(rows[ITEMS]["sizes"]) == {"one", "two"}
    monkeypatch.setitem(rows, "own expert", {"items": {d: [0.0] * 6 for d in ("one", "two")}})
    assert summary.summary({Unit("lm", "lora", 0): rows}, True)["lora"]["rows"]["base"]["apart"] == {}


def test_the_base_is_measured_again_by_other_code_or_on_other_texts(
    study: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm, "row", lambda *_: {"items": {}})

    def measured() -> int:
        lm.base_row(lm.given({}, tmp_path, "lora", 0, quick=False))
        return len(list(tmp_path.glob("lm/base-*.json")))

    assert [measured(), measured()] == [1, 1]
    monkeypatch.setattr(lm, "code_hash", lambda files: "other")
    assert measured() == 2
    other = [Text(each.text.replace("a", "b"), each.file) for each in made_up(4, 12, "other")]  # of the same sizes
    monkeypatch.setattr(lm, "other", lambda _: other)
    assert measured() == 3


def test_units_and_what_was_chosen_can_be_written() -> None:
    assert [unit.name for unit in lm.units(quick=False)] == [f"lm-{f}-{s}" for f in ("lora", "full") for s in range(3)]
    assert {unit.seed for unit in lm.units(quick=True)} == {0}
    for quick in (False, True):
        found = lm.describe(quick)
        assert json.loads(json.dumps(found)) == found  # or finished rows would never be taken
