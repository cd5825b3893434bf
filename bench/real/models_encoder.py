"""What a seed's encoders are made from, and how they are made: on a line through the base, calibrated, operated on."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import featcal_fast as ff
from bench import surgery
from bench.harness import process
from bench.language.study import stream
from bench.mergers import Pool, State, state, with_state
from bench.real.finetune_encoder import Labelled, Training, expert, features, head, labelled
from bench.real.repairs import Repair, decided
from bench.real.sources import base_encoder
from bench.real.tasks import Task, tasks
from bench.workers.common import load_model

Right = dict[str, list[int]]  # by task, of every text: 1 where the head says its class


@dataclass(frozen=True)
class Given:
    """What a seed's rows are made of.

    Attributes:
        folder: where models are kept.
        base: the base's folder.
        tasks: as they are read.
        texts: by task and part, cut and tokenised.
        heads: by task, frozen.
        seed: of experts and calibration texts.
        training: of heads and experts.
    """

    folder: Path
    base: Path
    tasks: Mapping[str, Task]
    texts: Mapping[str, Mapping[str, Labelled]]
    heads: Mapping[str, Mapping[str, Tensor]]
    seed: int
    training: Training

    def right(self, found: Mapping[str, Tensor], part: str) -> Right:
        """Of each task's features `[texts, width]`."""
        said = {task: F.linear(rows, **self.heads[task]).argmax(-1) for task, rows in found.items()}
        return {task: (each == self.texts[task][part].labels).int().tolist() for task, each in said.items()}

    def seen(self, model: nn.Module, part: str) -> dict[str, Tensor]:
        """By task, a model's features of the part's texts."""
        return {task: features(model, parts[part].ids) for task, parts in self.texts.items()}

    def measured(self, model: nn.Module, part: str) -> Right:
        return self.right(self.seen(model, part), part)

    def calibration(self, count: int) -> dict[str, list[int]]:
        """By task, which texts of the training part: those of a smaller count are among those of a larger."""
        sizes = {task: len(parts["training"].ids) for task, parts in self.texts.items()}
        return {
            task: torch.randperm(size, generator=stream(self.seed, f"calibration {task}"))[:count].tolist()
            for task, size in sizes.items()
        }

    def experts(self) -> dict[str, Path]:
        """Their folders, by task; trained unless they are there."""
        return {
            task: expert(
                self.base, parts["training"], self.heads[task], self.training, f"{task} {self.seed}", self.folder
            )
            for task, parts in self.texts.items()
        }


def given(archives: Mapping[str, Path], folder: Path, seed: int, training: Training, most: Mapping[str, int]) -> Given:
    """Texts, at most so many a task and part, and heads, which are fitted unless they are there."""
    transformers.utils.logging.disable_progress_bar()
    base, found, models = base_encoder(archives, folder), tasks(archives), folder / "models"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    texts = {
        name: {
            part: labelled(tokenizer, rows[: most.get(part, training.texts)], training.max_length)
            for part, rows in task.parts.items()
        }
        for name, task in found.items()
    }
    heads = {
        name: head(base, parts["training"], len(found[name].classes), training, models) for name, parts in texts.items()
    }
    return Given(models, base, found, texts, heads, seed, training)


def mean(found: Right) -> float:
    """Of the tasks' accuracies."""
    return statistics.fmean(statistics.fmean(items) for items in found.values())


def pool_of(by: Given) -> Pool:
    """Base and experts in memory, float32."""
    models = {task: load_model(folder, torch.float32) for task, folder in by.experts().items()}
    return Pool(load_model(by.base, torch.float32), models)


class Line:
    """Models on the line through the base and a merge: `base + scaling * (merge - base)`."""

    def __init__(self, base: nn.Module, merge: State) -> None:
        self._base = base
        self._change = {name: merge[name] - value for name, value in state(base).items()}

    def at(self, scaling: float) -> nn.Module:
        values = {name: value + scaling * self._change[name] for name, value in state(self._base).items()}
        return with_state(self._base, values)


# Repairs


def calibrated(by: Given, repair: Repair, count: int) -> tuple[nn.Module, dict[str, Any]]:
    """The calibrated model, what it took, and what held-out samples decided.

    As its user runs it: texts and folders in, a folder out, in a process of its own. Nothing stays of them.
    """
    with tempfile.TemporaryDirectory(dir=by.folder, prefix=".calibrate-") as folder:
        work = Path(folder).resolve()
        (work / "recipe.json").write_text(json.dumps(_recipe(by, repair, count, work)))
        command = [sys.executable, "-m", "bench.workers.ours", str(work), str(work / "out"), "--plan"]
        took = process.last_json(command, OMP_NUM_THREADS="1")
        report = ff.Report.from_json((work / "out" / "report.json").read_text())
        return load_model(work / "out", torch.float32), {"took": took, **decided(report)}


def _recipe(by: Given, repair: Repair, count: int, work: Path) -> dict[str, Any]:
    """Beside which `work` holds `base`, and a file of texts a task."""
    (work / "base").symlink_to(by.base.resolve(), target_is_directory=True)
    for task, numbers in by.calibration(count).items():
        lines = [json.dumps({"text": by.tasks[task].parts["training"][n][0]}) + "\n" for n in numbers]
        (work / f"{task}.jsonl").write_text("".join(lines))
    experts = {
        task: {"model": str(path.resolve()), "data": f"{work}/{task}.jsonl"} for task, path in by.experts().items()
    }
    return {
        "base_model": f"{work}/base",
        "merge": {"method": "task_arithmetic", "scaling": repair.scaling},
        "experts": experts,
        "samples": count,
        "held_out": repair.held_out,
        "max_length": by.training.max_length,
        "settings": asdict(repair.settings),
    }


class Operations:
    """Modules behind one merge, Surgery's and ProbSurgery's: one a task, given the calibration texts."""

    def __init__(self, by: Given, pool: Pool, merge: nn.Module) -> None:
        self._by, self._pool, self._merge = by, pool, merge
        self._asked: dict[str, Tensor] = {}

    def row(self, kind: str, count: int) -> dict[str, Any]:
        """Right or wrong of every test text, and the seconds of training."""
        by, began = self._by, time.perf_counter()
        drawn = by.calibration(count)
        ids = {task: [by.texts[task]["training"].ids[n] for n in numbers] for task, numbers in drawn.items()}
        inputs = torch.stack([features(self._merge, each) for each in ids.values()])
        targets = torch.stack([features(self._pool.experts[task], each) for task, each in ids.items()])
        module = surgery.train(kind, inputs, targets, by.seed)
        seconds = time.perf_counter() - began
        self._asked = self._asked or by.seen(self._merge, "test")
        with torch.no_grad():
            found = {
                task: module(rows.expand(len(self._asked), -1, -1))[number]  # of all tasks' modules, its own
                for number, (task, rows) in enumerate(self._asked.items())
            }
        return {"items": by.right(found, "test"), "seconds": seconds}
