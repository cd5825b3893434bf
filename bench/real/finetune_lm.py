"""Experts of a language model: trained from one base on a domain's texts, kept as folders that merging tools read."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.results import code_hash, versions
from bench.language.study import stream

FORMS = ("lora", "full")
CODE = ("bench/real/finetune_lm.py", "bench/language/study.py")  # that experts are made by
Ids = Sequence[int]


@dataclass(frozen=True)
class Training:
    """AdamW on `texts` texts a step.

    Attributes:
        steps: of each expert.
        texts: a step; of 48 tokens each, 528 tokens.
        learning_rate: at its highest.
        rank, alpha: of LoRA, on all linear modules of the layers; 0 for all weights.
    """

    steps: int
    learning_rate: float
    rank: int = 0
    alpha: int = 0
    texts: int = 11


def expert(base: Path, texts: Sequence[Ids], form: str, training: Training, key: str, folder: Path) -> Path:
    """A trained expert's folder, `form` being `lora` (PEFT's adapter) or `full` (bfloat16); trained unless it is there.

    Args:
        base: the folder that it starts from.
        texts: tokens of each, to draw from.
        key: what this expert is, beside its training: domain, seed, base.
        folder: where experts are kept, each under the hash of all of these, of the code and of versions.
    """
    digest = sha256(json.dumps([list(ids) for ids in texts]).encode()).hexdigest()
    made_by = [code_hash(CODE), versions("peft"), str(base.resolve())]  # an adapter names its base's folder
    facts = [form, asdict(training), key, digest, made_by]
    path = folder / f"{form}-{sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
    if path.exists():
        return path
    model = _start(base.resolve(), form, training)
    _train(model, texts, training, stream(0, key))
    part = path.with_suffix(f".{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    if form == "full":
        model.to(torch.bfloat16)
    model.save_pretrained(part)
    try:
        part.rename(path)
    except OSError:  # another process was as fast
        shutil.rmtree(part)
    return path


def padded(texts: Sequence[Ids]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, `[texts, tokens]`, filled up on the right."""
    rows = [torch.tensor(ids) for ids in texts]
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
    }


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model, in eval mode; an adapter's is the base with the adapter merged into it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / "adapter_config.json"
    if adapter.exists():
        base = load(Path(json.loads(adapter.read_text())["base_model_name_or_path"]), dtype)
        return PeftModel.from_pretrained(base, folder).merge_and_unload().eval()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def _start(base: Path, form: str, training: Training) -> Any:
    """Master weights are float32, the adapter's too; the frozen base's are bfloat16."""
    if form == "full":
        return load(base, torch.float32)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=training.rank, lora_alpha=training.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):  # its first factors are random
        torch.default_generator.manual_seed(0)
        return get_peft_model(load(base), config)


def _train(model: Any, texts: Sequence[Ids], training: Training, random: torch.Generator) -> None:
    """20 steps of warm-up at most, and half a cosine; products in bfloat16. In random order, again from the start."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=training.learning_rate, weight_decay=0.01, fused=True)
    warm = min(20, 1 + training.steps // 4)
    order: list[int] = []
    model.train()
    for step in range(training.steps):
        if len(order) < training.texts:
            order += torch.randperm(len(texts), generator=random).tolist()
        drawn, order = order[: training.texts], order[training.texts :]
        for group in optimizer.param_groups:
            decay = (1 + math.cos(math.pi * step / training.steps)) / 2
            group["lr"] = training.learning_rate * min(1, (step + 1) / warm) * decay
        batch = padded([texts[i] for i in drawn])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
    model.eval()
