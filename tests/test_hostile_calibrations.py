"""Whatever a calibration is given, it is not worse than the merge on held-out samples, and says what was kept."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pico
import pytest
import torch
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast.reporting.outcome import LAYER_WORSE, MODEL_WORSE
from featcal_fast.streaming.paired import paired

Batches = dict[str, list[pico.Batch]]


def noise(job: pico.Job) -> ff.Settings:
    """Experts that are noise."""
    job.experts = {task: pico.perturbed(job.base, 2.0, seed=50 + k) for k, task in enumerate(job.experts)}
    return ff.Settings()


def wrong_base(job: pico.Job) -> ff.Settings:
    job.base = pico.perturbed(job.base, 3.0, seed=7)
    return ff.Settings()


def wrong_task(job: pico.Job) -> ff.Settings:
    """Fitted to another task's samples, judged by its own."""
    batches = list(job.batches.values())
    for task, others in zip(job.batches, [*batches[1:], batches[0]], strict=True):
        scaled = [{k: 5 * v if v.is_floating_point() else v.flip(1) for k, v in batch.items()} for batch in others[:-1]]
        job.batches[task] = [*scaled, job.batches[task][-1]]
    return ff.Settings()


def few_samples(job: pico.Job) -> ff.Settings:
    """Three to fit to, and one."""
    job.batches = {
        task: [{k: v[:3] for k, v in batches[0].items()}, {k: v[:1] for k, v in batches[-1].items()}]
        for task, batches in job.batches.items()
    }
    return ff.Settings(ridge_lambda=1e-3)


def tiny_lambda(job: pico.Job) -> ff.Settings:
    return ff.Settings(ridge_lambda=1e-8, teacher_alpha=1.0)


def chosen(job: pico.Job) -> ff.Settings:
    noise(job)
    return ff.Settings(auto=True)


@torch.no_grad()
def distances(model: nn.Module, expert: nn.Module, batches: list[pico.Batch]) -> list[float]:
    """Of each sample: KL of the next token's distributions, or the distance of what is pooled."""
    found: list[Tensor] = []
    for batch in batches:
        theirs, ours = expert(**batch), model(**batch)
        if hasattr(theirs, "logits"):
            p, q = theirs.logits.double().log_softmax(-1), ours.logits.double().log_softmax(-1)
            mask = batch["attention_mask"]
            found.append(((p.exp() * (p - q)).sum(-1) * mask).sum(1))
        else:
            found.append((theirs.pooler_output - ours.pooler_output).double().square().sum(1))
    return torch.cat(found).tolist()


@pytest.mark.parametrize("case", [noise, wrong_base, wrong_task, few_samples, tiny_lambda, chosen])
@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_it_is_never_worse_than_the_merge(kind: str, case: Callable[[pico.Job], ff.Settings]) -> None:
    job = pico.job(kind, 3)
    settings, merged = case(job), copy.deepcopy(job.merged)
    held_out: Batches = {task: each[-1:] for task, each in job.batches.items()}
    report = ff.calibrate_model(
        job.merged,
        base=job.base,
        experts=job.experts,
        batches={task: each[:-1] for task, each in job.batches.items()},
        held_out=held_out,
        settings=settings,
    )
    before, after = (
        [distances(model, job.experts[task], each) for task, each in held_out.items()] for model in (merged, job.merged)
    )
    assert not paired(before, after).worse
    assert report.outcome is not None
    same = all(torch.equal(value, merged.get_parameter(name)) for name, value in job.merged.named_parameters())
    assert same == (report.calibrated == 0 and not any(layer.norms for layer in report.layers))
    assert report.outcome.kept == ("merged" if report.outcome.worse else "calibrated")
    linears = 6 if kind == "clip" else 7
    kept = [name for name, reason in report.kept.items() if reason in (LAYER_WORSE, MODEL_WORSE)]
    assert len(kept) + report.calibrated == linears * len(report.layers)
    assert kept or case is chosen  # which finds what helps
