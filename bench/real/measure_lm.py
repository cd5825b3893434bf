"""What a language model is measured by: bits a byte of texts, and how far from its base it is on the base's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.results import write_whole
from bench.real.finetune_lm import Ids, padded

TEXTS = 32  # a batch
ROWS = 256  # tokens whose logits are looked at at once, in float32


@dataclass(frozen=True)
class Sample:
    """A text as it is measured.

    Attributes:
        ids: its tokens, cut.
        known: tokens at its start that are given, not predicted.
        size: what is predicted: bytes of a text, tokens of a continuation.
        file: that the text is from.
    """

    ids: tuple[int, ...]
    known: int
    size: int
    file: str


def encode(tokenizer: Any, text: str, file: str, length: int) -> Sample | None:
    """A text cut at `length` tokens; its first one is given. None where nothing is left to predict."""
    found = tokenizer(text, return_offsets_mapping=True, truncation=True, max_length=length)
    ids, spans = found["input_ids"], found["offset_mapping"]
    size = len(text[spans[0][1] : spans[-1][1]].encode()) if len(ids) > 1 else 0
    return Sample(tuple(ids), 1, size, file) if size else None


@torch.no_grad()
def bits(model: Any, samples: Sequence[Sample]) -> list[float]:
    """Of each text, in bits, the cross-entropy of its tokens but the given ones, summed."""
    found = [0.0] * len(samples)
    for numbers, logits in _in_batches(model, samples):
        ids = torch.tensor([i for n in numbers for i in samples[n].ids[samples[n].known :]])
        nats = [F.cross_entropy(part.float(), i, reduction="none") for part, i in _parts(logits, ids)]
        _share(found, samples, numbers, torch.cat(nats) / math.log(2))
    return found


@torch.no_grad()
def divergences(base: Any, model: Any, samples: Sequence[Sample]) -> list[float]:
    """Of each text, in nats, KL(base || model) at its tokens but the given ones, summed."""
    found = [0.0] * len(samples)
    for (numbers, true), (_, said) in zip(_in_batches(base, samples), _in_batches(model, samples), strict=True):
        nats = [
            F.kl_div(b.float().log_softmax(-1), a.float().log_softmax(-1), reduction="none", log_target=True).sum(-1)
            for a, b in _parts(true, said)
        ]
        _share(found, samples, numbers, torch.cat(nats))
    return found


@torch.no_grad()
def continuations(base: Any, starts: Sequence[Ids], length: int, end: int | None, path: Path) -> list[Sample]:
    """What the base itself says after these starts, `[texts][tokens]`, all as long: sampled once, kept in a file.

    Args:
        base: the model.
        length: tokens with the start, at most.
        end: token that ends a text.
        path: of the file.
    """
    if not path.exists():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            ids = torch.tensor([list(start) for start in starts])
            said = base.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_length=length, max_new_tokens=None, eos_token_id=end, pad_token_id=end or 0,
            )  # fmt: skip
        write_whole(path, said.tolist())
    found = []
    for number, row in enumerate(json.loads(path.read_text())):
        known = len(starts[number])
        stop = row.index(end, known) + 1 if end in row[known:] else len(row)
        found.append(Sample(tuple(row[:stop]), known, stop - known, f"{number}"))
    return found


def _in_batches(model: Any, samples: Sequence[Sample]) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of the samples of a batch, and the logits that predict them, `[their predicted tokens, words]`.

    Samples of like length are together, so that there is little padding.
    """
    order = sorted(range(len(samples)), key=lambda n: len(samples[n].ids))
    for start in range(0, len(order), TEXTS):
        numbers = order[start : start + TEXTS]
        logits = model(**padded([samples[n].ids for n in numbers]), use_cache=False).logits
        places = [
            (row, place - 1)
            for row, n in enumerate(numbers)
            for place in range(samples[n].known, len(samples[n].ids))
        ]  # fmt: skip
        rows, columns = torch.tensor(places).T
        yield numbers, logits[rows, columns]


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(tensor.split(ROWS) for tensor in tensors), strict=True)


def _share(found: list[float], samples: Sequence[Sample], numbers: Sequence[int], values: Tensor) -> None:
    """Add up the values of each sample's tokens, in float64."""
    counts = [len(samples[n].ids) - samples[n].known for n in numbers]
    for n, part in zip(numbers, values.double().split(counts), strict=True):
        found[n] = float(part.sum())
