"""A small character-level T5 on four text-to-text tasks; exact match and token accuracy.

A source is a sign that names the task, then a text. The base has learnt to copy the text, whatever the sign says.
Every text belongs to one part. Sources and targets are generated, so no two runs can differ in them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import featcal_fast as ff
from bench.language.study import PARTS, Batch, Study, part_of, stream, values

EXACT, TOKENS = "exact match, %", "token accuracy, %"
PAD, END = 0, 1
SIGNS = {"reverse": "<", "shift": ">", "sort": "^", "complement": "-"}
LETTERS = string.ascii_lowercase
WORDS = {"reverse": (LETTERS, 5), "shift": (LETTERS, 5), "sort": (string.digits, 6), "complement": (string.digits, 6)}
ALPHABET = LETTERS + string.digits + "".join(SIGNS.values())
IDS = {character: number for number, character in enumerate(ALPHABET, start=2)}


ANSWERS: dict[str, Callable[[str], str]] = {
    "reverse": lambda text: text[::-1],
    "shift": lambda text: text.translate(str.maketrans(LETTERS, LETTERS[1:] + LETTERS[0])),
    "sort": lambda text: "".join(sorted(text)),
    "complement": lambda text: "".join(str(9 - int(digit)) for digit in text),
}


GRID = {
    "preset flan-t5": ff.PRESETS["flan-t5"],
    "default": ff.Settings(),
    **values((1e-3, 2.0, 0.6), (1e-3, 2.5, 0.6), (1e-3, 2.0, 0.3), (1e-2, 2.0, 0.6)),
}


@dataclass(frozen=True)
class Config:
    """The model and its training."""

    d_model: int = 128
    d_kv: int = 32
    d_ff: int = 256
    layers: int = 2  # of the encoder, and of the decoder
    heads: int = 4
    batch_size: int = 64
    base_steps: int = 700
    expert_steps: int = 200
    base_learning_rate: float = 2e-3
    expert_learning_rate: float = 1e-3
    pairs: int = 400  # measured of each task and part


@dataclass
class T5(Study):
    """The study."""

    config: Config = Config()
    counts: tuple[int, ...] = (8, 32, 128, 512)
    seeds: tuple[int, ...] = Study.seeds
    name = "t5"
    title = "small T5, exact match and token accuracy (higher is better)"
    calibrated_on = "sources with the right targets; or where a row says so what the task's expert answers"
    tasks = tuple(SIGNS)
    metrics = {EXACT: 1, TOKENS: 1}  # noqa: RUF012
    # The best mean exact match, over 8 and 128 samples, of GRID on the validation part (`--choose`).
    settings, grid = ff.Settings(1e-3, 2.0, 0.6), GRID

    @cached_property
    def texts(self) -> dict[str, dict[str, list[str]]]:
        """By task and part, in random order."""
        return {task: make_texts(task) for task in self.tasks}

    def new_model(self) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        shape = T5Config(
            vocab_size=len(ALPHABET) + 2,
            d_model=self.config.d_model,
            d_kv=self.config.d_kv,
            d_ff=self.config.d_ff,
            num_layers=self.config.layers,
            num_decoder_layers=self.config.layers,
            num_heads=self.config.heads,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=16,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=PAD,
            eos_token_id=END,
            decoder_start_token_id=PAD,  # type: ignore[call-arg]
        )
        return T5ForConditionalGeneration(shape)

    def base_batch(self, step: int, random: torch.Generator) -> Batch:
        """Texts of all tasks, to copy."""
        pairs = [pair for task in self.tasks for pair in self._draw(task, self.config.batch_size // 4, random)]
        return encode([(source, source[1:]) for source, _ in pairs])

    def batch(self, task: str, random: torch.Generator) -> Batch:
        return encode(self._draw(task, self.config.batch_size, random))

    def calibration(self, task: str, count: int, random: torch.Generator) -> list[Batch]:
        pairs = self._draw(task, count, random)
        return [encode(pairs[i : i + 64]) for i in range(0, count, 64)]

    def variants(self, experts: Mapping[str, nn.Module], batches: Mapping[str, list[Batch]]) -> dict[str, Any]:
        """With the experts' own answers as targets."""
        answers = {task: [answered(experts[task], batch) for batch in batches[task]] for task in self.tasks}
        return {f"FeatCal {self.counts[-1]}, experts' answers": answers}

    def measure(self, model: nn.Module, task: str, part: str) -> dict[str, float]:
        pairs = [pair(task, text) for text in self.texts[task][part][: self.config.pairs]]
        return accuracy(model, encode(pairs))

    def _draw(self, task: str, count: int, random: torch.Generator) -> list[tuple[str, str]]:
        texts = self.texts[task]["training"]
        return [pair(task, texts[i]) for i in torch.randint(len(texts), (count,), generator=random).tolist()]


def pair(task: str, text: str) -> tuple[str, str]:
    """Source and target."""
    return SIGNS[task] + text, ANSWERS[task](text)


def make_texts(task: str, count: int = 20000) -> dict[str, list[str]]:
    """A task's texts by part: random words of 3 to 5 letters, or of 3 to 6 digits, no two alike."""
    random, (signs, longest) = stream(0, f"texts {task}"), WORDS[task]
    lengths = torch.randint(3, longest + 1, (count,), generator=random).tolist()
    drawn = torch.randint(len(signs), (count, longest), generator=random).tolist()
    words = ("".join(signs[i] for i in row[:length]) for row, length in zip(drawn, lengths, strict=True))
    dealt: dict[str, list[str]] = {part: [] for part in PARTS}
    for text in dict.fromkeys(words):
        dealt[part_of(text)].append(text)
    return dealt


def encode(pairs: Sequence[tuple[str, str]]) -> Batch:
    """Padded batch of sources and targets; each text ends with the end token, and labels are -100 beyond it."""
    ids, labels = _padded([source for source, _ in pairs], PAD), _padded([target for _, target in pairs], -100)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def _padded(texts: Sequence[str], padding: int) -> Tensor:
    rows = [torch.tensor([*(IDS[character] for character in text), END]) for text in texts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)


@torch.no_grad()
def answered(expert: Any, batch: Batch) -> Batch:
    """The batch with what the expert answers, greedily, as targets."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ids = expert.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=1)[:, 1:]
    ended = (ids == END).cumsum(1) - (ids == END).long() > 0  # after the first end token
    return {**inputs, "labels": ids.masked_fill(ended, -100)}


@torch.no_grad()
def accuracy(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Token accuracy: of target tokens, the end token too, each predicted from the right ones before it.

    Greedy decoding gives the target exactly if, and only if, all of these are right: that is the exact match.
    """
    labels = batch["labels"]
    right, given = model(**batch).logits.argmax(-1) == labels, labels != -100
    exact = (right | ~given).all(1)
    return {EXACT: 100 * float(exact.double().mean()), TOKENS: 100 * float(right[given].double().mean())}
