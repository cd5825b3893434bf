"""Several ranks make of a job what one process does: the same bits, the same report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pico
import pytest
import torch
from file_operations import operations
from forms import expert_at, factors, write_adapter
from rank_processes import check_case, made_case, run_case, small_panels
from runs import EXHAUSTIVE
from safetensors.torch import load_file
from test_engine import calibrated, update_errors
from unions import union_job

import featcal_fast as ff
from featcal_fast import reference
from featcal_fast.reporting.report import Report

Make = Callable[[Path], dict[str, Any]]  # saves a job below a folder; a recipe for it


class Job(NamedTuple):
    """A job, and what is to be seen of it besides its bits.

    Attributes:
        make: saves it.
        sizes: how many ranks do it, too.
        shows: whether its report shows what it is for.
        on_disk: whether hidden states wait in files.
    """

    make: Make
    sizes: tuple[int, ...] = (2,)
    shows: Callable[[Report], object] = lambda _: True
    on_disk: bool = False


def saved(
    kind: str, tasks: int, batches: int = 2, dtype: torch.dtype = torch.float32, layers: int = 1, **changes: Any
) -> Make:
    """A pico job of a few samples, of CLIP and Llama with so many layers; `changes` go into its recipe."""

    def make(folder: Path) -> dict[str, Any]:
        job = pico.job(kind, tasks, **({"layers": layers} if kind in ("clip", "llama") else {}))
        job.batches = {task: own[:batches] for task, own in job.batches.items()}
        for model in (job.base, job.merged, *job.experts.values()):
            model.to(dtype)
        return {**pico.save(job, folder), **changes}

    return make


def with_few_tokens(**changes: Any) -> Make:
    """Four samples a task, in batches of one, and an MLP that is wide: it is solved from the token side."""

    def make(folder: Path) -> dict[str, Any]:
        job = pico.job("llama", 3, layers=1, intermediate_size=480)
        job.batches = {task: [_rows(own[0], i) for i in range(4)] for task, own in job.batches.items()}
        return {**pico.save(job, folder), **changes}

    return make


def with_little_held_out(folder: Path) -> dict[str, Any]:
    """A task has too few samples to spare one."""
    job = pico.job("clip", 3, layers=1)
    job.batches = {task: own[:2] for task, own in job.batches.items()} | {"task1": [_rows(job.batches["task1"][0], 0)]}
    settings = {"auto": True, "keep_better": False}
    return {**pico.save(job, folder), "batch_size": 8, "held_out": 0.25, "settings": settings}


def made_worse(folder: Path) -> dict[str, Any]:
    """Layers that get better, one by one, of a model that gets worse."""
    settings = {"ridge_lambda": 1e-8, "teacher_alpha": 1.0}
    return {**pico.save(pico.job("llama", 3), folder), "held_out": 0.2, "settings": settings}


def merged_on_the_fly(folder: Path) -> dict[str, Any]:
    recipe = saved("llama", 3, dtype=torch.bfloat16)(folder)
    del recipe["merged_model"]
    return {**recipe, "merge": {"method": "ties"}}


def with_adapters(folder: Path) -> dict[str, Any]:
    settings = {"exclude": ["q_proj", "up_proj"], "ridge_scale": "trace"}
    recipe = saved("llama", 3, settings=settings)(folder)
    base = load_file(folder / "base" / "model.safetensors")
    for task in ("task0", "task2"):
        recipe |= expert_at(recipe, task, write_adapter(folder / f"adapter of {task}", factors(base, layers=1)))
    return recipe


def _rows(batch: pico.Batch, row: int) -> pico.Batch:
    return {name: value[row : row + 1] for name, value in batch.items()}


def shards(number: int, **changes: Any) -> dict[str, Any]:
    return {"settings": {"sample_shards": number, **changes}}


def has_token_side(report: Report) -> bool:
    return "tokens" in {group.space for layer in report.layers for group in layer.groups}


EVERY = (2, 3, 4)  # numbers of ranks
JOBS = {
    "clip": Job(saved("clip", 3), EVERY),
    "llama": Job(saved("llama", 3, layers=2), EVERY),
    "t5": Job(saved("t5", 3), EVERY),
    "gpt2, max_change": Job(saved("gpt2", 2, settings={"max_change": 0.2})),
    "mixtral": Job(saved("mixtral", 2)),
    "one task, solved in float64": Job(saved("clip", 1, settings={"ridge_lambda": 1e-5}), (3,)),
    "gate": Job(saved("llama", 3, held_out=0.25), shows=lambda report: any(each.gate.kept for each in report.layers)),
    "put back": Job(made_worse, shows=lambda report: report.outcome.kept == "merged"),
    "auto, nothing held out of a task": Job(
        with_little_held_out, (3,), lambda report: report.layers[0].chosen and not report.held_out["task1"]
    ),
    "auto, t5, max_change": Job(saved("t5", 2, held_out=0.25, settings={"auto": True, "max_change": 0.5})),
    "layers with nothing to calibrate": Job(
        saved("llama", 2, 3, layers=2, **shards(2, include=["1.mlp.down_proj"])), (3,)
    ),
    "include, a rank without a task": Job(saved("llama", 2, layers=2, settings={"include": ["1.mlp.down_proj"]}), (3,)),
    "few tokens, auto, 3 shards": Job(
        with_few_tokens(held_out=0.25, **shards(3, auto=True, keep_better=False)), (4,), has_token_side
    ),
    "few tokens, 2 shards": Job(with_few_tokens(**shards(2)), (3,), has_token_side),
    "2 shards": Job(saved("llama", 2, 3, layers=2, held_out=0.25, **shards(2)), (3,)),
    "3 shards, on disk": Job(saved("t5", 2, 3, **shards(3)), (4,), on_disk=True),
    "5 shards": Job(saved("clip", 2, 3, layers=2, **shards(5)), (4,)),
    "2 shards, bfloat16, auto": Job(
        saved("clip", 2, 3, torch.bfloat16, held_out=0.25, **shards(2, auto=True, keep_better=False)), (3,)
    ),
    "merged on the fly, bfloat16": Job(merged_on_the_fly),
    "adapters, exclude": Job(with_adapters, EVERY),
    "own tokens": Job(union_job),
}
# What takes longest, and differs from others in what it combines, is tried with all else that is not tried each time.
RARELY = ("3 shards, on disk", "auto, t5, max_change", "few tokens, 2 shards", "2 shards, bfloat16, auto", "own tokens")


@pytest.fixture(autouse=True, scope="module")
def _small_panels() -> Iterator[None]:
    with small_panels():
        yield


@pytest.mark.parametrize("name", [name for name in JOBS if EXHAUSTIVE or name not in RARELY])
def test_the_bits_are_the_same_at_every_number_of_ranks(name: str, tmp_path: Path) -> None:
    job = JOBS[name]
    case = made_case(job.make(tmp_path), tmp_path, job.on_disk, checkpoint_every=0)
    report = Report.from_json((tmp_path / "whole" / "out" / "report.json").read_text())
    assert job.shows(report), "this job does not show what it is for"
    with operations():
        for size in EVERY if EXHAUSTIVE else job.sizes:
            check_case(case, size, tmp_path / str(size), checkpoint_every=0)


@pytest.mark.parametrize("shards", [3, 7])
@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_sums_in_shards_are_as_near_to_the_exact_solution(kind: str, shards: int) -> None:
    """Seven are more than there are batches."""
    job, settings = pico.job(kind, 2), ff.Settings(sample_shards=shards)
    judge = calibrated(reference.calibrate_model, job.double(), settings)
    found = update_errors(calibrated(ff.calibrate_model, job, settings), judge, job.merged)
    assert len(found) >= 3 * 7
    for name, (error, rounding) in found.items():
        assert error <= 2e-5 + 2 * rounding, f"{name}: {error:.1e}"


def test_experts_are_read_once_in_all_and_ranks_tell_what_they_had(tmp_path: Path) -> None:
    case = made_case(saved("llama", 3)(tmp_path), tmp_path, checkpoint_every=0)
    assert all(status == 0 for status, _ in run_case(case, 2, tmp_path / "two", checkpoint_every=0))
    one, two = (json.loads((tmp_path / name / "out" / "report.json").read_text()) for name in ("whole", "two"))
    for task in one["tokens"]:
        assert two["bytes_read"][f"expert {task}"] == one["bytes_read"][f"expert {task}"] > 0
    assert two["bytes_written"] == one["bytes_written"]
    assert [rank["samples"] for rank in two["ranks"]] == [["task0", "task1"], ["task2"]]
    assert two["ranks"][0]["sent"] == two["ranks"][1]["received"] > 0
    assert two["ranks"][1]["sent"] == two["ranks"][0]["received"] > 0
