"""Texts to token ids, by a checkpoint's own tokenizer and chat template.

Both are a stranger's: a template is a program, and so are the patterns of a tokenizer. They run in processes of their
own, which are ended where they take too long.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.data.asked import as_pair, as_prompt, as_turns
from featcal_fast.data.left_out import LeftOut
from featcal_fast.data.preprocess import find_tokenizer, load_any_tokenizer, load_tokenizer
from featcal_fast.data.samples import LONGEST_TEXT, Sample, as_data_error, as_tokens, confined, listed
from featcal_fast.errors import DataError, shown
from featcal_fast.untrusted.limits import LimitError

# Seconds of a processor's time: at the least, and samples or characters that must be done in each second more.
TEMPLATE_SECONDS, SAMPLES_A_SECOND = 1, 50
TOKENIZER_SECONDS, CHARACTERS_A_SECOND = 20, 100_000  # to load it, too
TEMPLATE_BYTES, TOKENIZER_BYTES = 2**28, 3 * 2**30
# What is tried before: characters of a text, what they may take, and the tokens that one may become.
TRIAL, TRIAL_SECONDS, TRIAL_BYTES, MOST_TOKENS = 64, 1, 2**28, 64
BYTES_A_CHARACTER = 16  # that a template may take for what it is given, besides
IDS = 2**24  # that come from one process

Row = tuple[str, dict[str, list[int]], str]  # where it is from, its ids, and how another tokenizer splits it


@dataclass(frozen=True)
class Reader:
    """How texts become token ids.

    Attributes:
        folders: model folders that may have a chat template.
        max_length: tokens that each text is cut at.
        targets: make labels of completions.
        tokenizer: the folder of the tokenizer; by default the first of `folders` that has one.
        left_out: says by which other tokenizer texts must be split alike, if by any.
    """

    folders: Sequence[Path]
    max_length: int
    targets: bool = False
    tokenizer: Path | None = None
    left_out: LeftOut | None = None

    @property
    def other(self) -> Path | None:
        """The folder of the tokenizer that must split texts alike."""
        return None if self.left_out is None or self.left_out.own.same else self.left_out.own.folder


def tokenize(source: object, samples: Sequence[Sample], reader: Reader) -> tuple[list[Sample], int | None]:
    """Token ids and masks of texts, and the token that pads them, if there is one.

    Args:
        source: where they are from.
        samples: all of one kind.
        reader: by what; what its `left_out` says is not among the result.

    Raises:
        DataError: one cannot be tokenized; there is no tokenizer, or it takes too much time or memory.
    """
    from transformers import AutoTokenizer  # noqa: F401 (now: this process may be copied several times)

    folder = reader.tokenizer or find_tokenizer(reader.folders)
    if folder is None:
        raise DataError(f"{source}: found no tokenizer in {listed(reader.folders)}; copy its files into one of them")
    used = [folder, *([] if reader.other is None else [reader.other])]
    times = 1 if reader.other is None else 3  # both, without special tokens, besides
    found: list[Sample] = []
    padding: int | None = None
    several = max(1, IDS // reader.max_length)
    for start in range(0, len(samples), several):
        part = samples[start : start + several]
        characters = sum(map(_characters, part))
        try:
            padding, rows = confined(
                partial(_tokenize, source, part, folder, reader),
                len(used) * TOKENIZER_SECONDS + times * characters // CHARACTERS_A_SECOND,
                len(used) * TOKENIZER_BYTES,
            )
        except LimitError as error:
            raise DataError(
                f"{source}: the tokenizer in {' or '.join(map(str, used))} cannot tokenize the texts: {error}; repair "
                "its files, or take those of another model of the family"
            ) from None
        found += [as_tokens(Sample(where, values)) for where, values, split in rows if not split]
        if reader.left_out is not None:
            reader.left_out.add_split([f"{where}: {split}" for where, _, split in rows if split])
    return found, padding


def _tokenize(source: object, samples: Sequence[Sample], folder: Path, reader: Reader) -> tuple[int | None, list[Row]]:
    """In a process of its own: the padding token, and the ids of every sample."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that were there before a copy are not there after it
    tokenizer = load_tokenizer(folder)
    other = None if reader.other is None else load_any_tokenizer(reader.other)
    needed = not reader.targets and {"messages", "instruction"} & samples[0].values.keys()
    chosen = _with_template(tokenizer, folder, reader) if needed else None
    if "instruction" in samples[0].values:
        form = as_pair if reader.targets else as_prompt if chosen is None else as_turns
        samples = [Sample(where, form(**values)) for where, values in samples]
    if chat := "messages" in samples[0].values and not reader.targets:
        if chosen is None:
            raise DataError(
                f"{source}: found no tokenizer with a chat template in "
                f"{listed(dict.fromkeys([*reader.folders, folder]))}; copy its files into one of them"
            )
        samples = _render_all(samples, chosen)
    for each in (tokenizer, other):
        if each is not None:
            _try(each, "".join(map(str, samples[0].values.values()))[:TRIAL])
    splitter = Splitter(tokenizer, other, reader, added=not chat)
    return tokenizer.pad_token_id, [splitter.row(sample) for sample in samples]


def _with_template(tokenizer: Any, folder: Path, reader: Reader) -> Any:
    """The first tokenizer that has a chat template, the texts' own before others; None where there is none."""
    if tokenizer.chat_template:
        return tokenizer
    for each in map(model_folder, reader.folders):
        if each != folder and find_tokenizer([each]) and (found := load_tokenizer(each)).chat_template:
            return found
    return None


def _try(tokenizer: Any, text: str) -> None:
    """Raises:
    DataError: a short text takes too much already, or becomes far longer than it is."""

    def trial() -> int:
        try:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])
        except MemoryError:
            raise
        except Exception:  # which is told where the whole text cannot be tokenized
            return 0

    where = f"{tokenizer.name_or_path}: its tokenizer cannot be used"
    try:
        count = confined(trial, TRIAL_SECONDS, TRIAL_BYTES)
    except LimitError as error:
        raise DataError(f"{where}: {TRIAL} characters of text: {error}; repair its files") from None
    if count > MOST_TOKENS * TRIAL:
        raise DataError(f"{where}: it makes {count} tokens of {len(text)} characters; repair its files")


def _characters(sample: Sample) -> int:
    return len(json.dumps(sample.values, ensure_ascii=False, default=str))


class Splitter:
    """Texts to ids.

    Args:
        tokenizer: by what.
        other: by what texts must be split alike; None where there is no such.
        reader: how.
        added: whether special tokens are added; a chat template writes them itself.
    """

    def __init__(self, tokenizer: Any, other: Any, reader: Reader, added: bool) -> None:
        self.tokenizer, self.other, self.reader, self.added = tokenizer, other, reader, added
        self.special = tokenizer.num_special_tokens_to_add() if added else 0
        own = None if reader.left_out is None else reader.left_out.own
        self._table: list[int] | None = None if own is None or own.table is None else own.table.tolist()

    def row(self, sample: Sample) -> Row:
        """A sample's ids."""
        if not self.reader.targets:
            return self._ids(sample)
        where, values = sample
        if "completion" not in values:
            raise DataError(f"{where}: found {listed(values)}; expected prompt and completion, for the model's decoder")
        prompt, completion = (Sample(where, {"text": values[key]}) for key in ("prompt", "completion"))
        given, ids, split = self._ids(prompt)
        _, labels, split_labels = self._ids(completion)
        return given, {**ids, "labels": labels["input_ids"]}, split or split_labels

    def _ids(self, sample: Sample) -> Row:
        text, most, name = _text(sample), self.reader.max_length, self.tokenizer.name_or_path
        if most <= self.special:
            raise DataError(
                f"{sample.where}: found max_length {most}, expected more than the {self.special} special tokens that "
                f"the tokenizer of {name} adds"
            )
        where = f"{sample.where} (tokenizer of {name})"
        ids = _encoded(text, self.tokenizer, most, self.added, where)
        if len(ids) <= self.special:
            raise DataError(f"{where}: the text tokenizes to zero tokens; remove this sample")
        return where, {"input_ids": ids}, "" if self.other is None else self._split(text, ids, sample.where)

    def _split(self, text: str, ids: list[int], where: str) -> str:
        """How the other tokenizer splits a text differently; empty where it does not, or one of its ids is lacking."""
        if -1 in self._translated(ids):
            return ""
        most = self.reader.max_length - self.special
        ours, theirs = (
            _encoded(text, each, most, False, f"{where} (tokenizer of {each.name_or_path})")
            for each in (self.tokenizer, self.other)
        )
        pairs = zip_longest(self._translated(ours), theirs)
        place = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
        if place is None:
            return ""
        one, other = (
            shown(each.convert_ids_to_tokens(found[place])) if place < len(found) else "its end"
            for each, found in ((self.tokenizer, ours), (self.other, theirs))
        )
        return f"token {place} is {one}, by its own {other}"

    def _translated(self, ids: list[int]) -> list[int]:
        if self._table is None:
            return ids
        return [self._table[each] if each < len(self._table) else -1 for each in ids]


def _encoded(text: str, tokenizer: Any, most: int, added: bool, where: str) -> list[int]:
    with as_data_error(f"{where}: cannot be tokenized"):
        ids: list[int] = tokenizer(text, add_special_tokens=added, truncation=True, max_length=most)["input_ids"]
    return ids


def _text(sample: Sample) -> str:
    for key, value in sample.values.items():
        if not isinstance(value, str):
            raise DataError(f"{sample.where}, {key}: found {type(value).__name__}; expected a string")
    return "".join(sample.values.values())[:LONGEST_TEXT]  # a book; no more than max_length tokens of it are used


def _render_all(samples: Sequence[Sample], tokenizer: Any) -> list[Sample]:
    """Messages as texts, by the chat template."""
    try:
        rendered = confined(
            lambda: [_render(sample, tokenizer) for sample in samples],
            TEMPLATE_SECONDS + len(samples) // SAMPLES_A_SECOND,
            TEMPLATE_BYTES + BYTES_A_CHARACTER * sum(map(_characters, samples)),
        )
    except LimitError as error:
        raise DataError(
            f"{samples[0].where}, and {len(samples) - 1} more: the chat template of {tokenizer.name_or_path} cannot "
            f"render the messages: {error}; take another template, or give `text`"
        ) from None
    return [Sample(sample.where, {"text": text}) for sample, text in zip(samples, rendered, strict=True)]


def _render(sample: Sample, tokenizer: Any) -> str:
    where, messages = sample.where, sample.values["messages"]
    # A template may refuse a role, or fail in any other way.
    with as_data_error(f"{where}: the chat template of {tokenizer.name_or_path} rejects the messages"):
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if len(text) > LONGEST_TEXT:
        raise DataError(
            f"{where}: found a text of {len(text)} characters, which the chat template makes of the messages, expected "
            f"at most {LONGEST_TEXT}; shorten them: no more than max_length tokens are used"
        )
    return text
