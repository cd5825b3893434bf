"""What models make of held-out samples in the end, and what is said of it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.resources import files as resources
from typing import Any

import pico
import pytest
import torch
from jsonschema import Draft202012Validator
from rich.console import Console
from test_outputs import CPU, MASKED_LM, run
from torch import Tensor, nn
from torch.nn import functional

from featcal_fast.layer.tokens import Tokens
from featcal_fast.reporting.forms import build
from featcal_fast.reporting.outcome import DRIFT, KL, OUTPUTS, Outcome, TaskOutcome
from featcal_fast.streaming import outcome as module
from featcal_fast.streaming.outcome import Followed, measure_outcome
from featcal_fast.streaming.sources import ModuleSource, Source

CHAINS = ("merged", "calibrated", "expert")


class Kept:
    """Hidden states of batches."""

    def __init__(self, states: Sequence[Tensor]) -> None:
        self._states = states

    def load(self, batch: int, rows: slice) -> tuple[Tensor, None]:
        return self._states[batch][rows], None


class Case:
    """Three models on one task's batches: what each gives for them, run whole, and what was followed of them.

    Args:
        models: merged, calibrated, expert; the calibrated one has the merged one's head.
        batches: of the task.
    """

    def __init__(self, models: Sequence[nn.Module], batches: Sequence[pico.Batch]) -> None:
        self.models, self.batches = dict(zip(CHAINS, models, strict=True)), list(batches)
        self.sources = {name: ModuleSource(model, name, CPU) for name, model in self.models.items()}
        structures = {name: source.structure for name, source in self.sources.items()}
        runs = {
            name: [run(model, batch, model, structures[name].blocks[-1]) for batch in self.batches]
            for name, model in self.models.items()
        }
        self.made: dict[str, list[Any]] = {name: [made for made, _ in each] for name, each in runs.items()}
        self.finals = {name: [final for _, final in each] for name, each in runs.items()}
        mask = structures["merged"].family.stages[-1].mask
        finals = self.finals["merged"]
        self.masks = [
            torch.ones(final.shape[:2]) if mask(batch) is None else mask(batch)
            for batch, final in zip(self.batches, finals, strict=True)
        ]
        tokens = [Tokens(each, (each.shape[0], each.shape[1]), CPU) for each in self.masks]
        self.followed = Followed(self.batches, tokens, *(Kept(self.finals[name]) for name in CHAINS))  # type: ignore[arg-type]

    def outcome(self, experts: Mapping[str, Source] | None = None) -> Outcome:
        return measure_outcome(
            self.sources["merged"], experts or {"a": self.sources["expert"]}, {"a": self.followed}, CPU
        )

    def counted(self, name: str, key: str = "logits") -> Tensor:
        """What one model gives for the tokens that count: `[count, width]`, float64."""
        made = [getattr(each, key).double() for each in self.made[name]]
        return torch.cat([each[mask != 0] for each, mask in zip(made, self.masks, strict=True)])


def calibrated_of(merged: nn.Module, expert: nn.Module, share: float = 0.5) -> nn.Module:
    """A model between the two, with the merged one's weights outside of its blocks."""
    model = copy.deepcopy(merged)
    blocks = ModuleSource(model, "calibrated", CPU).structure.blocks
    others = ModuleSource(expert, "expert", CPU).structure.blocks
    with torch.no_grad():
        for block, other in zip(blocks, others, strict=True):
            for own, theirs in zip(block.parameters(), other.parameters(), strict=True):
                own.lerp_(theirs, share)
    return model


def case_of(build: Callable[[], nn.Module], batches: Sequence[pico.Batch]) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        merged = pico.perturbed(build(), 1.0, seed=99).eval()
    expert = pico.perturbed(merged, 0.3, seed=1)
    return Case((merged, calibrated_of(merged, expert), expert), batches)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def check_drift(case: Case, found: TaskOutcome) -> None:
    def features(name: str) -> Tensor:
        pairs = zip(case.finals[name], case.masks, strict=True)
        return torch.cat([final[mask != 0].double() for final, mask in pairs])

    assert found.samples == sum(len(mask) for mask in case.masks)
    for name, value in (("merged", found.drift_merged), ("calibrated", found.drift_calibrated)):
        assert value == pytest.approx(relative(features(name), features("expert")), rel=1e-12)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_language_models(kind: str, padding: str) -> None:
    case = case_of(pico.KINDS[kind], pico.texts(2, 5, padding))
    outcome = case.outcome()
    found = outcome.tasks["a"]
    check_drift(case, found)
    expert = case.counted("expert").log_softmax(1)
    for name in ("merged", "calibrated"):
        other = case.counted(name).log_softmax(1)
        divergence = functional.kl_div(other, expert, log_target=True, reduction="batchmean")
        assert getattr(found, f"kl_{name}") == pytest.approx(float(divergence), rel=1e-5)
    for name in CHAINS:
        assert getattr(found, f"loss_{name}") == pytest.approx(own_loss(case, name), rel=1e-6)
    assert outcome.measure == KL
    assert (outcome.merged, outcome.calibrated) == pytest.approx((found.kl_merged, found.kl_calibrated))
    assert 0 < outcome.calibrated < outcome.merged
    assert not outcome.worse
    assert found.agreement_merged is found.output_drift_merged is None
    assert not found.reason


@torch.no_grad()
def own_loss(case: Case, name: str) -> float:
    """As the model's own code has it, a batch's mean times its targets."""
    total, count = 0.0, 0
    for batch in case.batches:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        first = (batch["attention_mask"] != 0).int().argmax(1)
        labels[torch.arange(len(first)), first] = -100  # padding does not tell what begins
        targets = int((labels[:, 1:] != -100).sum())
        total += float(case.models[name](**batch, labels=labels).loss) * targets
        count += targets
    return total / count


def test_targets_of_a_decoder_that_are_left_out() -> None:
    batch = pico.texts(1, 5)[0]
    case = case_of(pico.KINDS["llama"], [batch])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :5] = -100  # what was asked
    case.batches[0]["labels"] = labels
    found = case.outcome().tasks["a"]
    with torch.no_grad():
        assert found.loss_expert == pytest.approx(float(case.models["expert"](**batch).loss), rel=1e-6)


@pytest.mark.parametrize("kind", ["t5", "flan-t5"])
def test_encoder_decoders_are_judged_by_their_targets(kind: str) -> None:
    case = case_of(pico.KINDS[kind], pico.pairs(1, 5))
    outcome = case.outcome()
    found = outcome.tasks["a"]
    check_drift(case, found)
    expert = case.counted("expert").log_softmax(1)
    for name in CHAINS:
        assert getattr(found, f"loss_{name}") == pytest.approx(float(case.made[name][0].loss), rel=1e-6)
    for name in ("merged", "calibrated"):
        other = case.counted(name).log_softmax(1)
        divergence = functional.kl_div(other, expert, log_target=True, reduction="batchmean")
        assert getattr(found, f"kl_{name}") == pytest.approx(float(divergence), rel=1e-5)
    assert outcome.measure == KL


def test_without_targets_an_encoder_decoder_has_no_loss() -> None:
    batch = pico.pairs(1, 5)[0]
    batch["decoder_input_ids"] = batch.pop("labels").clamp(min=0)
    found = case_of(pico.KINDS["t5"], [batch]).outcome().tasks["a"]
    assert found.loss_merged is found.loss_calibrated is found.loss_expert is None
    assert found.kl_merged is not None


def test_a_masked_language_model_has_no_next_token() -> None:
    outcome = case_of(MASKED_LM, pico.texts(1, 5)).outcome()
    assert outcome.measure == KL
    assert outcome.tasks["a"].loss_merged is outcome.tasks["a"].loss_expert is None


@pytest.mark.parametrize("kind", ["vit classifier", "bert classifier"])
def test_classifiers_agree_with_the_expert_s_own_head(kind: str) -> None:
    many = pico.images(32, 5) if "vit" in kind else pico.texts(6, 5)
    case = case_of(pico.KINDS[kind], many)
    head = case.models["merged"].classifier
    with torch.no_grad():
        head.weight.normal_()  # of no use: another model's classes
    outcome = case.outcome()
    found = outcome.tasks["a"]
    check_drift(case, found)
    expert = case.models["expert"]
    classes = torch.cat([each.logits.argmax(1) for each in case.made["expert"]])
    for name in ("merged", "calibrated"):
        model = copy.deepcopy(expert)
        left = iter(case.finals[name])
        block = ModuleSource(model, name, CPU).structure.blocks[-1]
        block.forward = partial(lambda finals, *_, **__: next(finals), left)  # type: ignore[method-assign]
        with torch.no_grad():
            theirs = torch.cat([model(**batch).logits.argmax(1) for batch in case.batches])
        assert getattr(found, f"agreement_{name}") == float((theirs == classes).double().mean())
    assert 0 < found.agreement_merged <= found.agreement_calibrated <= 1  # type: ignore[operator]
    assert outcome.measure == DRIFT
    assert found.kl_merged is found.loss_merged is found.output_drift_merged is None


def test_classes_of_tokens_agree_where_tokens_count() -> None:
    case = case_of(partial(pico._model, "BertForTokenClassification", "BertConfig", pico.TEXT), pico.texts(2, 5))
    found = case.outcome().tasks["a"]
    with torch.no_grad():
        head = case.models["expert"].classifier
        same = [
            (head(final).argmax(2) == made.logits.argmax(2))[mask != 0]
            for final, made, mask in zip(case.finals["merged"], case.made["expert"], case.masks, strict=True)
        ]
    assert found.agreement_merged == pytest.approx(float(torch.cat(same).double().mean()), rel=1e-12)


@pytest.mark.parametrize("kind", ["clip", "vit", "dinov2", "bert"])
def test_other_models_are_compared_by_what_they_give_for_a_sample(kind: str) -> None:
    case = case_of(pico.KINDS[kind], pico.batches_for(kind, 5)[:2])
    outcome = case.outcome()
    found = outcome.tasks["a"]
    check_drift(case, found)

    def given(name: str) -> Tensor:
        if kind != "bert":
            return torch.cat([each.pooler_output.double() for each in case.made[name]])
        means = []  # of tokens: what most encoders of sentences give
        for each, mask in zip(case.made[name], case.masks, strict=True):
            shown = mask[..., None].double()
            means.append((each.last_hidden_state.double() * shown).sum(1) / shown.sum(1))
        return torch.cat(means)

    expert = given("expert")
    assert found.output_drift_merged == pytest.approx(relative(given("merged"), expert), rel=1e-5)
    assert found.output_drift_calibrated == pytest.approx(relative(given("calibrated"), expert), rel=1e-5)
    assert outcome.measure == OUTPUTS
    assert outcome.merged == pytest.approx(found.output_drift_merged, rel=1e-12)


def test_regression_has_no_classes() -> None:
    config = {**pico.TEXT, "num_labels": 1}
    case = case_of(partial(pico._model, "BertForSequenceClassification", "BertConfig", config), pico.texts(2, 5))
    found = case.outcome().tasks["a"]
    assert found.agreement_merged is None
    assert found.output_drift_merged is not None


def test_other_vocabularies_are_compared_by_the_tokens_that_both_have() -> None:
    """The expert's rows are the merged model's in another order, but for a few that it has not."""
    rows, lacking = 100, (7, 50)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    table = order.clone()
    batch = pico.texts(1, 5)[0]
    for token in lacking:
        table[token] = -1
        batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == token, 3)
    same = case_of(pico.KINDS["llama"], [batch])
    own = copy.deepcopy(same.models["expert"])
    with torch.no_grad():
        for weight, old in ((own.model.embed_tokens.weight, same.models["expert"].model.embed_tokens.weight),
                            (own.lm_head.weight, same.models["expert"].lm_head.weight)):  # fmt: skip
            weight[order] = old
    expert = ModuleSource(own, "expert", CPU)
    expert.tokens = table
    found = same.outcome({"a": Translating(expert)}).tasks["a"]
    plain = same.outcome().tasks["a"]
    for name in CHAINS:  # the loss is that of all that each model knows
        assert getattr(found, f"loss_{name}") == pytest.approx(getattr(plain, f"loss_{name}"), rel=1e-6)
    kept = [token for token in range(rows) if token not in lacking]
    target = same.counted("expert")[:, kept].log_softmax(1)
    other = same.counted("merged")[:, kept].log_softmax(1)
    divergence = functional.kl_div(other, target, log_target=True, reduction="batchmean")
    assert found.kl_merged == pytest.approx(float(divergence), rel=1e-5)
    assert found.kl_merged != pytest.approx(plain.kl_merged, rel=1e-4)


class Translating:
    """A model in memory that reads its own tokens, as one in a folder does."""

    def __init__(self, source: ModuleSource) -> None:
        self._source, self.structure, self.tokens, self.label = source, source.structure, source.tokens, source.label
        self.release_stage_inputs = source.release_stage_inputs

    def outputs(self, batch: pico.Batch, final: Tensor) -> Any:
        assert self.tokens is not None
        return self._source.outputs({**batch, "input_ids": self.tokens[batch["input_ids"]].clamp(min=0)}, final)


def test_slices_of_samples_and_pieces_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(pico.KINDS["llama"], pico.texts(2, 5))
    whole = case.outcome()
    seen: list[int] = []
    outputs = ModuleSource.outputs
    monkeypatch.setattr(
        ModuleSource, "outputs", lambda *args: seen.append(args[1]["input_ids"].shape[0]) or outputs(*args)
    )
    monkeypatch.setattr(module, "LOGITS", 100 * 20)  # of one sample
    monkeypatch.setattr(module, "PIECE", 700)
    parts = case.outcome()
    assert set(seen) == {1}
    found = asdict(parts.tasks["a"])
    for name, value in asdict(whole.tasks["a"]).items():
        assert found[name] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    assert parts.spread == pytest.approx(whole.spread, rel=1e-5)


def test_memory_that_runs_out_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(pico.KINDS["llama"], pico.texts(2, 5))
    whole, outputs = case.outcome(), ModuleSource.outputs

    def full(source: ModuleSource, batch: pico.Batch, final: Tensor, most: int) -> Any:
        if len(final) > most:
            raise torch.OutOfMemoryError("no more")
        return outputs(source, batch, final)

    monkeypatch.setattr(ModuleSource, "outputs", lambda *args: full(*args, most=2))
    assert case.outcome().tasks["a"].kl_merged == pytest.approx(whole.tasks["a"].kl_merged, rel=1e-6)
    monkeypatch.setattr(ModuleSource, "outputs", lambda *args: full(*args, most=0))
    found = case.outcome()
    assert found.measure == DRIFT
    assert found.tasks["a"].drift_merged == whole.tasks["a"].drift_merged
    assert found.tasks["a"].reason == (
        "the outputs of one sample need more memory than there is: OutOfMemoryError: no more"
    )


def test_heads_of_two_kinds_are_not_compared() -> None:
    case = case_of(pico.KINDS["bert"], pico.texts(1, 5))
    expert = pico._model("BertForMaskedLM", "BertConfig", pico.TEXT)
    found = case.outcome({"a": ModuleSource(expert, "expert", CPU)})
    assert found.tasks["a"].reason == "the merged model gives last_hidden_state, the expert logits"
    assert found.measure == DRIFT
    assert found.tasks["a"].kl_merged is None


def judged(*tasks: tuple[Sequence[float], Sequence[float]], measure: str) -> Outcome:
    return module._judged({}, [[list(a), list(b)] for a, b in tasks], measure)


def test_the_judgement() -> None:
    same = judged(([1.0, 2.0], [1.0, 2.0]), measure=KL)
    assert (same.merged, same.calibrated, same.spread, same.worse) == (1.5, 1.5, 0.0, False)
    assert judged(([1.0, 2.0], [1.2, 2.1]), measure=KL).worse
    assert not judged(([1.0, 2.0], [1.2, 1.9]), measure=KL).worse  # within the spread
    assert judged(([1.0], [1.01]), measure=KL).worse  # one sample has none
    assert not judged(([1.0], [0.99]), measure=KL).worse
    squares = ([1.0, 4.0], [2.0, 9.0])
    root, square = judged(squares, measure=DRIFT), judged(squares, measure=KL)
    assert (root.merged, root.calibrated) == (math.sqrt(2.5), math.sqrt(5.5))
    assert root.worse == square.worse == (root.calibrated - root.merged > root.spread)
    assert root.spread * (root.merged + root.calibrated) == pytest.approx(square.spread)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_worse(bad: float) -> None:
    assert judged(([1.0, 1.0], [1.0, bad]), measure=KL).worse
    assert not judged(([1.0, bad], [1.0, bad]), measure=KL).worse  # no worse than it was
    assert not judged(([1.0, bad], [1.0, 1.0]), measure=KL).worse


@pytest.mark.parametrize("kind", ["llama", "vit classifier", "clip"])
def test_an_outcome_is_as_the_schema_says_and_comes_back_from_json(kind: str) -> None:
    outcome = case_of(pico.KINDS[kind], pico.batches_for(kind, 5)[:2]).outcome()
    written = json.loads(json.dumps(asdict(outcome)))
    assert build(Outcome, written) == outcome
    parts = json.loads(resources("featcal_fast.reporting").joinpath("report.schema.json").read_text())["$defs"]
    Draft202012Validator({"$ref": "#/$defs/outcome", "$defs": parts}).validate(written)


def test_a_model_that_is_its_expert_has_no_distance() -> None:
    case = case_of(pico.KINDS["llama"], pico.texts(2, 5))
    expert = case.models["expert"]
    same = Case((case.models["merged"], expert, expert), case.batches)
    same.sources["merged"] = same.sources["calibrated"]  # whose head it is
    found = same.outcome().tasks["a"]
    assert found.drift_calibrated == 0
    assert found.kl_calibrated == pytest.approx(0, abs=1e-7)
    assert found.kl_calibrated >= 0  # type: ignore[operator]
    assert found.loss_calibrated == pytest.approx(found.loss_expert)


def text(outcome: Outcome) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(outcome.table())
    return console.export_text()


def test_what_a_person_reads() -> None:
    language = TaskOutcome(20, 0.4123, 0.3, 0.214, 0.0931, 2.653, 2.493, 2.468)
    outcome = Outcome({"[b]maths": language, "code": language}, KL, 0.214, 0.0931, 0.012)
    assert outcome.summary() == "held-out: KL to experts 0.214 -> 0.0931, perplexity 14.2 -> 12.1 (experts 11.8)"
    assert "better than the merged one by KL of the outputs" in " ".join(outcome.verdict().split())
    assert max(map(len, outcome.verdict().splitlines())) <= 80
    shown = text(outcome)
    for part in ("[b]maths", "0.412 -> 0.3", "0.214 -> 0.0931", "14.2 -> 12.1", "11.8", "20"):
        assert part in shown
    assert max(map(len, shown.splitlines())) <= 80
    assert len([line for line in shown.splitlines() if line.strip()]) == 5  # a line a task

    images = TaskOutcome(20, 0.41, 0.45, agreement_merged=0.841, agreement_calibrated=0.8)
    worse = Outcome({"cars": images}, DRIFT, 0.41, 0.45, 0.01, worse=True)
    assert worse.summary() == (
        "held-out: drift of the features 0.41 -> 0.45, the experts' own class in 84.1% ->\n  80.0%\n"
        "held-out: the calibrated model is worse than the merged one by drift of the\n"
        "  features: 0.41 -> 0.45, spread 0.01"
    )
    alike = Outcome({"cars": TaskOutcome(20, 0.41, 0.4)}, DRIFT, 0.41, 0.4, 0.02)
    assert "no different from the merged one" in alike.verdict()
    huge = Outcome({"a": TaskOutcome(1, 1.0, 1.0, 1.0, 1.0, 5000.0, 800.0, 3.0)}, KL, 1.0, 1.0, 0.0)
    assert "perplexity inf -> inf" in huge.summary()
