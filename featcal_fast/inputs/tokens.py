"""Which tokenizer each model of a recipe has, and what the merged model's token ids are to the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from featcal_fast.checkpoints import GgufExpert, LoraExpert, TensorSource, unwrapped
from featcal_fast.data.preprocess import find_tokenizer
from featcal_fast.data.vocabulary import Vocabularies
from featcal_fast.models.tokens import OwnTokens, vocabulary_size


def own_folders(expert: TensorSource) -> list[Path]:
    """Where an expert's own files may be: in its folder, and in that of the model that it adapts; a GGUF's are none."""
    source = unwrapped(expert)
    if isinstance(source, GgufExpert):
        return []
    return [source.path, source.base.path] if isinstance(source, LoraExpert) else [source.path]


def merged_tokenizer(merged: TensorSource, base: TensorSource, expert: TensorSource) -> Path | None:
    """The folder of the tokenizer that the merged model reads texts with: its own, or the base's; else the expert's."""
    return find_tokenizer((merged.path, base.path, *own_folders(expert)))


def own_tokens(merged: TensorSource, base: TensorSource, others: Mapping[str, TensorSource]) -> dict[str, OwnTokens]:
    """What the merged model's token ids are to other models, whose tokenizers are their own, or the base's.

    Args:
        merged: the merged model, or what it takes its vocabulary from.
        base: the base model.
        others: by name.

    Raises:
        DataError: a tokenizer that has to be compared cannot be read.
    """
    folder, size = find_tokenizer((merged.path, base.path)), vocabulary_size(merged.config)
    known = Vocabularies(folder if size else None, size)
    found = {}
    for name, each in others.items():
        own, rows = unwrapped(each), vocabulary_size(each.config)
        if isinstance(own, GgufExpert):
            found[name] = known.of_texts(own.vocabulary, own.path, rows, each.label)
        else:
            found[name] = known.of(find_tokenizer((*own_folders(each), base.path)), rows, each.label)
    return found
