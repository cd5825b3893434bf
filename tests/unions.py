"""A merge over a union of vocabularies: models whose tokenizers know other tokens, each model's own embedding rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pico
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

LETTERS = ["<unk>", "<s>", "</s>", "<pad>", *"abcdefgh"]
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]
BASE = [*LETTERS, *("".join(pair) for pair in MERGES)]
ADDED = {"math": ["<tool>", "<think>"], "code": ["<|im_start|>", "<tool>"]}
UNION = ["<|im_start|>", "<think>", "<tool>"]  # in neither's order
SIZES = {
    "layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
TEXTS = {
    "math": ["ab <tool> cd", "a <think> b abcd", "c d e f", "<think> ab <tool> <tool> h", "abcd g", "h g f e d c b a"],
    "code": ["<|im_start|> ab <tool>", "cd cd <|im_start|>", "e f g", "<tool> abcd abcd", "ab a", "h <tool>"],
}


def save_tokenizer(
    folder: Path,
    tokens: Sequence[str] = BASE,
    added: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = MERGES,
    kind: str = "bpe",
    wrapped: bool = True,
    template: str | None = None,
) -> Path:
    """A tokenizer; ids in the order of `tokens`, then `added`. `wrapped` puts `<s>` before a text."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: row for row, token in enumerate(tokens)}
    made = {
        "bpe": lambda: models.BPE(ids, list(merges), unk_token="<unk>"),
        "wordpiece": lambda: models.WordPiece(ids, unk_token="<unk>"),
        "unigram": lambda: models.Unigram([(token, -float(len(ids) - len(token))) for token in tokens], ids["<unk>"]),
    }
    tokenizer = Tokenizer(made[kind]())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "unigram" else pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(token) for token in added])
    if wrapped:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", ids["<s>"])])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    wrapper = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapper.chat_template = template
    wrapper.save_pretrained(folder)
    return folder


def with_rows(model: PreTrainedModel, rows: Sequence[int | None], seed: int = 0) -> PreTrainedModel:
    """A copy whose embeddings have other rows: those of these numbers; new ones where there is none."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    size, made = model.config.vocab_size, {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.shape[0] == size and "layer" not in name:
            if parameter not in made:  # what is tied stays so
                made[parameter] = torch.randn(len(rows), *parameter.shape[1:], generator=generator)
                for to, row in enumerate(rows):
                    made[parameter][to] = made[parameter][to] if row is None else parameter.data[row]
                made[parameter] = nn.Parameter(made[parameter])
            owner, _, own = name.rpartition(".")
            setattr(model.get_submodule(owner), own, made[parameter])
    model.config.vocab_size = len(rows)
    return model


def union_job(folder: Path, texts: Mapping[str, Sequence[str]] = TEXTS) -> dict:
    """Models whose tokenizers are as mergekit's `tokenizer: source: union` leaves them; a recipe for them."""
    job = pico.job("llama", 2, **SIZES, vocab_size=len(BASE))
    experts = dict(zip(ADDED, job.experts.values(), strict=True))
    own = [*range(len(BASE))]
    models = {"base": (job.base, [], own), "merged": (job.merged, UNION, [*own, None, None, None])}
    models |= {task: (experts[task], ADDED[task], [*own, None, None]) for task in ADDED}
    for seed, (name, (model, added, rows)) in enumerate(models.items()):
        with_rows(model, rows, seed).save_pretrained(folder / name)
        save_tokenizer(folder / name, added=added)
    for task in ADDED:
        write_texts(folder / f"{task}.jsonl", texts[task])
    return {
        "base_model": str(folder / "base"),
        "merged_model": str(folder / "merged"),
        "experts": {task: {"model": str(folder / task), "data": str(folder / f"{task}.jsonl")} for task in ADDED},
        "samples": 6,
        "max_length": 32,
        "batch_size": 2,
        "out": str(folder / "out"),
    }


def write_texts(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def read_by(folder: Path, texts: list[str]) -> list[list[int]]:
    """Ids that the tokenizer in a folder makes of texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text)["input_ids"] for text in texts]
