"""The gate: what got worse on samples that nothing was fitted to keeps its merged weights."""

from __future__ import annotations

import copy
import math
import statistics

import pico
import pytest
import torch
from torch import nn

import featcal_fast as ff
from featcal_fast.errors import DataError
from featcal_fast.reporting.outcome import LAYER_WORSE, MODEL_WORSE
from featcal_fast.streaming.paired import paired

GOOD = ff.Settings(ridge_lambda=1.0, anchor_rho=1.0)
BAD = ff.Settings(ridge_lambda=1e-8, teacher_alpha=1.0)  # fitted to every sample's noise


def halves(job: pico.Job) -> tuple[dict[str, list[pico.Batch]], dict[str, list[pico.Batch]]]:
    """Batches to fit to, and others."""
    return {task: each[:-1] for task, each in job.batches.items()}, {
        task: each[-1:] for task, each in job.batches.items()
    }


def calibrated(job: pico.Job, settings: ff.Settings, judged: bool = True) -> tuple[nn.Module, ff.Report]:
    fitted, held_out = halves(job)
    merged = copy.deepcopy(job.merged)
    given = {"base": job.base, "experts": job.experts, "batches": fitted, "settings": settings}
    return merged, ff.calibrate_model(merged, **given, held_out=held_out if judged else None)


def changed(model: nn.Module, merged: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if not torch.equal(value, merged.get_parameter(name))}


def test_a_difference_is_judged_by_its_standard_error_over_samples() -> None:
    first, second = [[1.0, 2.0, 3.0], [4.0, 6.0]], [[1.5, 2.0, 4.0], [5.0, 6.0]]
    found = paired(first, second)
    assert (found.first, found.second) == ((2 + 5) / 2, (2.5 + 5.5) / 2)
    errors = [statistics.stdev([0.5, 0.0, 1.0]) / math.sqrt(3), statistics.stdev([1.0, 0.0]) / math.sqrt(2)]
    assert found.spread == pytest.approx(math.hypot(*errors) / 2)
    assert found.worse == (found.second - found.first > found.spread)
    assert paired([[1.0]], [[1.1]]).worse  # of one sample there is no spread
    assert not paired([[1.0]], [[1.0]]).worse


@pytest.mark.parametrize("kind", ["clip", "llama", "t5", "gpt2"])
def test_a_layer_that_got_worse_keeps_merged_weights_and_says_so(kind: str) -> None:
    job = pico.job(kind, 2)
    merged = copy.deepcopy(job.merged)
    spoilt, report = calibrated(job, ff.Settings(**{**vars(BAD), "keep_better": False}))
    assert all(layer.gate is None for layer in report.layers)
    assert report.layers[-1].drift_after > report.layers[-1].drift_before  # or there is nothing to keep out
    saved, told = calibrated(job, BAD)
    assert told.layers[-1].drift_after < report.layers[-1].drift_after
    assert any(layer.gate.kept for layer in told.layers)
    new = changed(saved, merged)
    put_back = {name for name, reason in told.kept.items() if reason == MODEL_WORSE}
    for layer, before in zip(told.layers, report.layers, strict=True):
        kept = set(layer.gate.kept)
        modules = {name for group in layer.groups for name in group.modules}
        assert not kept & (modules | set(layer.norms))
        missing = {n for g in before.groups for n in g.modules} - modules - kept
        assert all(any(name.endswith(f".{each}") for name in put_back) for each in missing)
        assert bool(kept) == (layer.gate.calibrated > layer.gate.merged)
    reasons = {name for name, reason in told.kept.items() if reason == LAYER_WORSE}
    assert reasons
    assert not any(name.rpartition(".")[0] in reasons for name in new)
    assert len(new) < len(changed(spoilt, merged))


@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_what_is_held_out_is_not_fitted_to(kind: str) -> None:
    """Where nothing got worse, the weights are those of a run without."""
    job = pico.job(kind, 2)
    judged, report = calibrated(job, GOOD)
    plain, _ = calibrated(job, GOOD, judged=False)
    assert not any(layer.gate.kept for layer in report.layers)
    assert not changed(judged, plain)
    assert report.held_out == {task: len(next(iter(batches[0].values()))) for task, batches in halves(job)[1].items()}
    assert {task: each.after for task, each in report.layers[-1].tasks.items()}.keys() == job.experts.keys()
    mean = statistics.fmean(each.after for each in report.layers[-1].tasks.values())
    assert report.layers[-1].drift_after == pytest.approx(mean)


def test_one_task_may_have_samples_held_out_and_another_none() -> None:
    job = pico.job("llama", 2)
    fitted, held_out = halves(job)
    given = {"base": job.base, "experts": job.experts, "batches": fitted, "settings": GOOD}
    report = ff.calibrate_model(job.merged, **given, held_out={"task1": held_out["task1"]})
    assert report.held_out == {"task0": 0, "task1": 4}
    assert report.layers[0].gate is not None


def test_samples_are_held_out_of_tasks_that_have_others() -> None:
    job = pico.job("llama", 1)
    for fitted, held_out, message in [
        (
            {"task0": job.batches["task0"]},
            {"other": job.batches["task0"]},
            "task other: found held-out batches, but none",
        ),
        ({"task0": job.batches["task0"]}, {"task0": None}, "task task0: found a NoneType of held-out batches"),
        ({"task0": []}, {"task0": job.batches["task0"]}, "task task0: found held-out batches alone"),
        ({"task0": job.batches["task0"]}, {"task0": ["text"]}, "task task0, batch 5: found a str"),
    ]:
        with pytest.raises(DataError, match=message):
            ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=fitted, held_out=held_out)


def test_held_out_samples_without_a_token_that_counts_judge_nothing() -> None:
    job = pico.job("llama", 1)
    fitted, held_out = halves(job)
    for batch in held_out["task0"]:
        batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    with pytest.raises(DataError, match=r"task task0: no token of its held-out samples counts in model.layers"):
        ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=fitted, held_out=held_out)
