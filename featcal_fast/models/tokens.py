"""What the merged model's token ids are to another model: ids of its own, by token text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMED = 1000  # tokens that a model lacks, of which the texts are kept, for errors


@dataclass(frozen=True)
class OwnTokens:
    """A model's tokens beside the merged model's.

    Attributes:
        label: whose they are, `expert math`.
        folder: of the tokenizer that the model reads its texts with; None where nothing tells.
        merged: of the merged model's; None where nothing tells.
        same: whether they are one tokenizer: its files are equal, or nothing tells of another.
        table: for each row of the merged model's embedding the model's own, or -1, `[rows]`, int64; None where all
            that the merged model has are the model's too.
        lacking: texts of some tokens that it has not, by the merged model's id.
    """

    label: str
    folder: Path | None = None
    merged: Path | None = None
    same: bool = True
    table: Tensor | None = None
    lacking: Mapping[int, str] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether it is known which token an id of either model is."""
        return self.folder is not None and self.merged is not None


def vocabulary_size(config: Any) -> int:
    """Rows of a model's embedding of tokens; 0 where its config tells of none."""
    for part in (config, getattr(config, "text_config", None)):
        if isinstance(size := getattr(part, "vocab_size", None), int) and size > 0:
            return size
    return 0


def make_table(ours: Mapping[str, int], theirs: Mapping[str, int], size: int, rows: int) -> list[int]:
    """For each row of a model's embedding the row of the same token in another model's, or -1.

    A row of no token, as embeddings have them to be of a round size, is the same row there, if that is of none either.

    Args:
        ours: ids by token text; several texts may have one.
        theirs: likewise, of the other model.
        size: rows of the first model's embedding.
        rows: of the other one's.
    """
    used = set(theirs.values())
    table = [row if row < rows and row not in used else -1 for row in range(size)]
    for row in ours.values():
        if row < size:
            table[row] = -1
    for text, row in sorted(ours.items()):  # a vocabulary comes in another order each time
        if row < size and table[row] < 0 and theirs.get(text, rows) < rows:
            table[row] = theirs[text]
    return table


def token_inputs(config: Any, names: Iterable[str]) -> list[str]:
    """Which of a forward's inputs are token ids.

    Args:
        config: the model's.
        names: of its inputs.
    """
    found = []
    for name in names:
        targets = name == "labels" and bool(getattr(config, "is_encoder_decoder", False))  # of which it makes inputs
        kinds = name == "token_type_ids" and not getattr(
            config, "type_vocab_size", None
        )  # GPT-2 has one table for both
        if name.endswith("input_ids") or targets or kinds:
            found.append(name)
    return found


def counted(name: str, values: Mapping[str, Tensor]) -> Tensor:
    """Where tokens of an input are read, as a boolean tensor of its shape: no padding, and no target of -100.

    Args:
        name: of the input.
        values: all inputs.
    """
    if name == "labels":
        return values[name] != -100
    other = "input_ids" if name == "token_type_ids" else name
    mask = values.get(other.replace("input_ids", "attention_mask"))
    return torch.ones_like(values[name], dtype=torch.bool) if mask is None else mask != 0


def own_inputs(batch: Mapping[str, Tensor], table: Tensor | None, config: Any) -> dict[str, Tensor]:
    """A batch of the merged model's as another one reads it: token ids are its own, at the same positions.

    Args:
        batch: inputs of the forward; every token that counts has a counterpart.
        table: see `OwnTokens`.
        config: the other model's.
    """
    own = dict(batch)
    if table is None:
        return own
    for name in token_inputs(config, batch):
        ids = batch[name]
        found = table.to(ids.device)[ids.clamp(min=0)]
        found = found.masked_fill(found < 0, _padding(config))  # it does not count, but is embedded all the same
        own[name] = torch.where(ids < 0, ids, found)
    return own


def _padding(config: Any) -> int:
    """A token that a model surely has."""
    padding, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", 0)
    return padding if isinstance(padding, int) and 0 <= padding < rows else 0
