"""A sentence encoder on tasks: what a text's features are, each task's frozen head, and the experts trained against it.

Features are those that the model was published with, the mean over tokens and then one length for all, but of mean
square 1. A head is a linear classifier of the base's features of training texts; the base, experts and merges are all
measured by it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.harness.results import code_hash, versions
from bench.language.study import stream, train
from bench.real.finetune_lm import CODE, padded
from bench.workers.common import load_model

BATCH = 64  # texts that are measured at once


@dataclass(frozen=True)
class Training:
    """Of heads and experts.

    Attributes:
        max_length: tokens that a text is cut at, here and in calibration.
        head_texts: that a head is fitted to.
        head_decay: pull of a head's weights to 0.
        texts: that an expert may draw from.
        steps, batch_size, learning_rate: of an expert, AdamW, all weights.
    """

    max_length: int = 40
    head_texts: int = 6000
    head_decay: float = 1e-2
    texts: int = 20000
    steps: int = 160
    batch_size: int = 32
    learning_rate: float = 1e-4


@dataclass(frozen=True)
class Labelled:
    """Texts of a task: their tokens, and their classes."""

    ids: list[list[int]]
    labels: Tensor

    def first(self, count: int) -> Labelled:
        return Labelled(self.ids[:count], self.labels[:count])

    @property
    def digest(self) -> str:
        return sha256(json.dumps([self.ids, self.labels.tolist()]).encode()).hexdigest()


def labelled(tokenizer: Any, rows: Sequence[tuple[str, int]], length: int) -> Labelled:
    """The rows' texts, each cut at `length` tokens."""
    ids = tokenizer([text for text, _ in rows], truncation=True, max_length=length)["input_ids"]
    return Labelled(ids, torch.tensor([label for _, label in rows]))


def pooled(encoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over tokens, of mean square 1, `[texts, width]`; products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
    features = (tokens * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
    return F.normalize(features, dim=-1) * features.shape[-1] ** 0.5


@torch.no_grad()
def features(encoder: nn.Module, ids: Sequence[list[int]]) -> Tensor:
    """`[texts, width]`; texts of like length are together, so that there is little padding."""
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    found = torch.cat([pooled(encoder, **padded([ids[n] for n in part])) for part in parts])
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)


# Heads


def head(base: Path, texts: Labelled, classes: int, training: Training, folder: Path) -> dict[str, Tensor]:
    """`weight [classes, width]` and `bias [classes]`, fitted unless they are there."""
    texts = texts.first(training.head_texts)
    path = folder / f"head-{_hash(training.head_decay, base.name, classes, texts.digest)}.safetensors"
    if not path.exists():
        found = fit(features(load_model(base, torch.float32), texts.ids), texts.labels, classes, training.head_decay)
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        save_file(found, part)
        part.replace(path)
    return load_file(path)


def fit(given: Tensor, labels: Tensor, classes: int, decay: float) -> dict[str, Tensor]:
    """Logistic regression of features `[texts, width]`, by L-BFGS."""
    found = {"weight": torch.zeros(classes, given.shape[1]), "bias": torch.zeros(classes)}
    optimizer = torch.optim.LBFGS(
        [value.requires_grad_() for value in found.values()], max_iter=100, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(given, **found), labels) + decay / 2 * found["weight"].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return {name: value.detach() for name, value in found.items()}


# Experts


class Classifier(nn.Module):
    """An encoder under a frozen head; says its loss."""

    def __init__(self, encoder: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.encoder, self._weight, self._bias = encoder, weight, bias

    def forward(self, labels: Tensor, **batch: Tensor) -> SimpleNamespace:
        found = pooled(self.encoder, **batch)
        return SimpleNamespace(loss=F.cross_entropy(F.linear(found, self._weight, self._bias), labels))


def expert(
    base: Path, texts: Labelled, task_head: dict[str, Tensor], training: Training, key: str, folder: Path
) -> Path:
    """A trained expert's folder, with all files of the base's but its weights; trained unless it is there.

    Args:
        base: the folder that it starts from.
        texts: to draw from.
        task_head: frozen.
        key: what this expert is, beside its training: task and seed.
        folder: where experts are kept, each under the hash of all of these, of the code and of versions.
    """
    texts = texts.first(training.texts)
    digest = sha256(b"".join(value.numpy().tobytes() for value in task_head.values())).hexdigest()
    path = folder / f"encoder-{_hash(asdict(training), key, base.name, digest, texts.digest)}"
    if path.exists():
        return path
    model = load_model(base, torch.float32)
    batches = Batches(texts, training.batch_size, stream(0, key))
    with torch.random.fork_rng(devices=[]):  # of dropout
        torch.default_generator.manual_seed(stream(0, f"dropout {key}").initial_seed())
        train(Classifier(model, **task_head), batches.draw, training.steps, training.learning_rate)
    part = path.with_suffix(f".{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(base, part, ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(part)
    try:
        part.rename(path)
    except OSError:  # another process was as fast
        shutil.rmtree(part)
    return path


class Batches:
    """Batches of texts of like length, in random order, without end."""

    POOL = 8  # batches whose texts are sorted by length

    def __init__(self, texts: Labelled, size: int, random: torch.Generator) -> None:
        self._texts, self._size, self._random = texts, size, random
        self._order: list[int] = []
        self._pool: list[list[int]] = []

    def draw(self, step: int) -> dict[str, Tensor]:
        if not self._pool:
            self._fill()
        drawn = self._pool.pop()
        return {**padded([self._texts.ids[n] for n in drawn]), "labels": self._texts.labels[drawn]}

    def _fill(self) -> None:
        while len(self._order) < self.POOL * self._size:
            self._order += torch.randperm(len(self._texts.ids), generator=self._random).tolist()
        taken, self._order = self._order[: self.POOL * self._size], self._order[self.POOL * self._size :]
        taken.sort(key=lambda n: len(self._texts.ids[n]))
        batches = [taken[start : start + self._size] for start in range(0, len(taken), self._size)]
        self._pool = [batches[n] for n in torch.randperm(self.POOL, generator=self._random).tolist()]


def _hash(*facts: Any) -> str:
    """Of what something is made from, and of the code and the versions that make it."""
    made_by = [code_hash((*CODE, "bench/real/finetune_encoder.py", "bench/workers/common.py")), versions()]
    return sha256(json.dumps([facts, made_by]).encode()).hexdigest()[:16]
