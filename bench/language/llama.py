"""A byte-level Llama on four kinds of text that come with every Python; bits per byte.

Every text belongs to one part, by its key: a source file, a topic of pydoc, a character's name, a pair of summands.
"""

from __future__ import annotations

import math
import re
import sys
import sysconfig
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featcal_fast as ff
from bench.language.study import PARTS, Batch, Study, part_of, stream, values

BITS = "bits per byte"
# Left out of the source files: tests, packages installed later, and files that hold the texts of another domain.
NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "lib2to3", "pydoc_data", "encodings"}
GRID = {
    **values((1e-3, 1.5, 0.5), (1e-2, 1.5, 0.5), (1e-2, 2.0, 0.5), (1e-2, 2.0, 0.3)),
    "default": ff.Settings(),
}


@dataclass(frozen=True)
class Config:
    """The model and its training."""

    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 4
    heads: int = 4
    window: int = 96  # bytes
    batch_size: int = 8
    base_steps: int = 1200
    expert_steps: int = 200
    base_learning_rate: float = 1e-3
    expert_learning_rate: float = 5e-4
    windows: int = 64  # measured of each domain and part


@dataclass
class Llama(Study):
    """The study."""

    config: Config = Config()
    counts: tuple[int, ...] = (8, 32, 128)
    seeds: tuple[int, ...] = Study.seeds
    name = "llama"
    title = "byte-level Llama, bits per byte (lower is better)"
    calibrated_on = "unlabelled windows of bytes from the training part"
    tasks = "code", "topics", "names", "sums"
    metrics = {BITS: 3}  # noqa: RUF012
    settings, grid = ff.Settings(1e-2, 2.0, 0.3), GRID  # the best of it on the validation part (`--choose`)

    @cached_property
    def texts(self) -> dict[str, dict[str, Tensor]]:
        """By domain and part, as bytes."""
        return {
            domain: {
                part: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for part, text in parts.items()
            }
            for domain, parts in read_texts().items()
        }

    def new_model(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = LlamaConfig(
            vocab_size=256,
            hidden_size=self.config.hidden_size,
            intermediate_size=self.config.intermediate_size,
            num_hidden_layers=self.config.layers,
            num_attention_heads=self.config.heads,
            num_key_value_heads=self.config.heads,
            max_position_embeddings=self.config.window,
            bos_token_id=None,
            eos_token_id=None,
        )
        return LlamaForCausalLM(shape)

    def base_batch(self, step: int, random: torch.Generator) -> Batch:
        """The four domains in turn."""
        return self.batch(self.tasks[step % len(self.tasks)], random)

    def batch(self, task: str, random: torch.Generator) -> Batch:
        ids = self._draw(task, self.config.batch_size, random)
        return {"input_ids": ids, "labels": ids}

    def calibration(self, task: str, count: int, random: torch.Generator) -> list[Batch]:
        ids = self._draw(task, count, random)
        return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(32)]

    def measure(self, model: nn.Module, task: str, part: str) -> dict[str, float]:
        text, width = self.texts[task][part], self.config.window
        starts = torch.linspace(0, len(text) - width, self.config.windows).long()
        return {BITS: bits_per_byte(model, _windows(text, starts, width))}

    def _draw(self, task: str, count: int, random: torch.Generator) -> Tensor:
        text, width = self.texts[task]["training"], self.config.window
        return _windows(text, torch.randint(len(text) - width + 1, (count,), generator=random), width)


@torch.no_grad()
def bits_per_byte(model: nn.Module, windows: Tensor) -> float:
    """Mean cross-entropy, in bits, of every byte of the windows `[n, bytes]` but their first."""
    total = 0.0
    for ids in windows.split(32):
        logits = model(input_ids=ids).logits[:, :-1]
        total += float(F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten(), reduction="sum"))
    return total / math.log(2) / windows[:, 1:].numel()


def _windows(text: Tensor, starts: Tensor, width: int) -> Tensor:
    return text[starts[:, None] + torch.arange(width)].long()


# Texts


def documents() -> dict[str, dict[str, str]]:
    """By domain and key."""
    return {"code": _code(), "topics": _topics(), "names": _names(), "sums": _sums()}


def read_texts() -> dict[str, dict[str, str]]:
    """By domain and part: the documents of each part, in random order."""
    texts: dict[str, dict[str, str]] = {}
    for domain, found in documents().items():
        keys = sorted(found)
        order = torch.randperm(len(keys), generator=stream(0, f"order {domain}")).tolist()
        dealt: dict[str, list[str]] = {part: [] for part in PARTS}
        for key in (keys[i] for i in order):
            # 1+2 and 2+1 are one pair: sums go by the smaller summand first.
            dealt[part_of("+".join(sorted(key.split("+"))) if domain == "sums" else key)].append(found[key])
        if domain == "topics":
            dealt = without_repeats(dealt)
        texts[domain] = {part: "".join(pieces) for part, pieces in dealt.items()}
    return texts


def without_repeats(dealt: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Documents less the paragraphs of an earlier part: some of pydoc's topics contain others."""
    seen: set[str] = set()
    left = {}
    for part in PARTS:
        pieces = [document.split("\n\n") for document in dealt[part]]
        left[part] = ["\n\n".join(p for p in paragraphs if p.strip() not in seen) + "\n" for paragraphs in pieces]
        seen |= {paragraph.strip() for paragraphs in pieces for paragraph in paragraphs}
    return left


def _code() -> dict[str, str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root): path for path in root.rglob("*.py")}
    return {
        name.as_posix(): path.read_text(encoding="utf-8", errors="replace")
        for name, path in files.items()
        if not NOT_CODE & set(name.parts)
    }


def _topics() -> dict[str, str]:
    from pydoc_data.topics import topics

    return dict(topics)


def _names() -> dict[str, str]:
    names = (unicodedata.name(chr(code), "") for code in range(sys.maxunicode + 1))
    # Not those that are made from the code point, as CJK UNIFIED IDEOGRAPH-4E00 is, nor of the regular Hangul.
    kept = (name for name in names if name and not re.search(r"-[0-9A-F]{4,6}$|^HANGUL SYLLABLE", name))
    return {name: f"{name}\n" for name in kept}


def _sums() -> dict[str, str]:
    return {f"{a}+{b}": f"{a}+{b}={a + b}\n" for a in range(100) for b in range(100)}
