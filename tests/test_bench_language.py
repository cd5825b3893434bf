"""The studies of `bench/language`: their data, their measures, and a run with models too small to be good."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bench.language import llama, study, t5

TINY_LLAMA = llama.Config(16, 32, layers=1, heads=2, window=16, batch_size=2, base_steps=2, expert_steps=2, windows=4)
TINY_T5 = t5.Config(16, 8, 32, layers=1, heads=2, batch_size=4, base_steps=2, expert_steps=2, pairs=8)


@pytest.fixture(scope="module")
def texts() -> dict[str, dict[str, str]]:
    return llama.read_texts()


def decode(row: Tensor) -> str:
    """The text up to the end token."""
    text = ""
    for number in row.tolist():
        if number == t5.END:
            break
        text += t5.ALPHABET[number - 2] if number >= 2 else ""
    return text


class Uniform(nn.Module):
    """Every byte is as likely as any other."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 256))


def test_a_uniform_model_needs_eight_bits() -> None:
    windows = torch.randint(256, (5, 32), generator=torch.Generator().manual_seed(0))
    assert llama.bits_per_byte(Uniform(), windows) == pytest.approx(8)


def test_parts_of_the_texts_are_disjoint(texts: dict[str, dict[str, str]]) -> None:
    assert list(texts) == list(llama.Llama().tasks)
    for parts in texts.values():
        assert set(parts) == set(study.PARTS)
        assert min(map(len, parts.values())) > 5000
        assert len(parts["training"]) > 3 * len(parts["held-out"])
    for domain in ("names", "sums"):
        lines = {part: set(text.splitlines()) for part, text in texts[domain].items()}
        for one, other in (("held-out", "training"), ("held-out", "validation"), ("validation", "training")):
            assert not lines[one] & lines[other]
    paragraphs = {part: {p.strip() for p in text.split("\n\n")} - {""} for part, text in texts["topics"].items()}
    assert not paragraphs["held-out"] & paragraphs["training"]
    assert not paragraphs["held-out"] & paragraphs["validation"]


def test_texts_are_what_they_are_called(texts: dict[str, dict[str, str]]) -> None:
    for line in texts["sums"]["held-out"].splitlines():
        summands, _, total = line.partition("=")
        a, b = map(int, summands.split("+"))
        assert a + b == int(total)
        assert f"\n{b}+{a}=" not in texts["sums"]["training"]
    assert "\nLATIN SMALL LETTER" in texts["names"]["training"]
    assert "IDEOGRAPH-" not in texts["names"]["training"]
    assert "def " in texts["code"]["held-out"]
    assert "def " in texts["code"]["training"]


def test_answers() -> None:
    sources = {"reverse": "abz", "shift": "abz", "sort": "3120", "complement": "3190"}
    pairs = {task: t5.pair(task, text) for task, text in sources.items()}
    assert pairs == {
        "reverse": ("<abz", "zba"),
        "shift": (">abz", "bca"),
        "sort": ("^3120", "0123"),
        "complement": ("-3190", "6809"),
    }


@pytest.mark.parametrize("task", t5.T5().tasks)
def test_parts_of_the_words_are_disjoint(task: str) -> None:
    parts = {part: set(words) for part, words in t5.make_texts(task).items()}
    assert all(len(words) > 400 for words in parts.values())
    assert len(set.union(*parts.values())) == sum(map(len, parts.values()))
    assert all(set(word) <= set(t5.ALPHABET) - set(t5.SIGNS.values()) for word in parts["training"])


def test_encode() -> None:
    batch = t5.encode([("<abc", "cba"), ("^10", "01")])
    assert [decode(row) for row in batch["input_ids"]] == ["<abc", "^10"]
    assert [decode(row) for row in batch["labels"]] == ["cba", "01"]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert batch["labels"][1].tolist()[-2:] == [t5.END, -100]


def test_exact_match_is_that_of_greedy_decoding() -> None:
    """A model that has learnt four pairs by heart, and is then asked for these and others."""
    known = [("<ab", "ba"), (">b", "c"), ("-09", "90")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t5.T5(t5.Config(32, 8, 64, layers=1, heads=2)).new_model()
    study.train(model, lambda _: t5.encode(known), 60, 1e-2)
    asked = [*known, ("<cd", "dc"), ("^21", "12")]
    batch = t5.encode(asked)
    said = [decode(row) for row in t5.answered(model, batch)["labels"]]
    right = [answer == target for answer, (_, target) in zip(said, asked, strict=True)]
    assert sum(right) >= 3
    assert not all(right)
    found = t5.accuracy(model, batch)
    assert found[t5.EXACT] == pytest.approx(100 * sum(right) / len(asked))
    assert found[t5.EXACT] < found[t5.TOKENS] < 100


def test_experts_answers_end_once() -> None:
    ids = torch.tensor([[t5.PAD, 5, t5.END, t5.PAD, t5.PAD], [t5.PAD, 5, 6, 7, t5.END]])
    expert = SimpleNamespace(generate=lambda **_: ids)
    answers = t5.answered(expert, t5.encode([("<a", "a"), ("<b", "b")]))["labels"]
    assert answers.tolist() == [[5, t5.END, -100, -100], [5, 6, 7, t5.END]]


def test_gap_closed_goes_by_the_merge_and_the_experts() -> None:
    assert study.gap_closed(2.6, merged=2.8, experts=2.4) == pytest.approx(0.5)  # bits: lower is better
    assert study.gap_closed(60, merged=40, experts=80) == pytest.approx(0.5)  # percent: higher is better
    assert study.gap_closed(30, merged=40, experts=80) == pytest.approx(-0.25)


@pytest.mark.parametrize(
    "small",
    [llama.Llama(TINY_LLAMA, counts=(2, 4), seeds=(0, 1)), t5.T5(TINY_T5, counts=(2, 4), seeds=(0, 1))],
    ids=lambda small: small.name,
)
def test_run(small: study.Study) -> None:
    results = study.run(small)
    again = study.run(small)
    assert results["runs"] == again["runs"]
    json.dumps(results)
    rows = ["own expert", "base", "task arithmetic 0.3", study.arithmetic(0.3 * small.settings.anchor_rho)]
    for metric in small.metrics:
        found = results["scores"][metric]
        assert list(found)[:6] == [*rows, "FeatCal 2", "FeatCal 4"]
        assert list(found["base"]) == [*small.tasks, "mean"]
        assert found["base"]["mean"]["std"] == 0
        tasks = [found["FeatCal 4"][task]["mean"] for task in small.tasks]
        assert found["FeatCal 4"]["mean"]["mean"] == pytest.approx(sum(tasks) / 4)
        shown = study.show(results, small)
        assert "FeatCal 4" in shown
        assert f"{found['FeatCal 4']['mean']['mean']:.1f}" in shown
