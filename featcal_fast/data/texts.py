"""Texts to token ids, by a checkpoint's own tokenizer and chat template.

Both are a stranger's: a template is a program, and so are the patterns of a tokenizer. They run in processes of their
own, which are ended where they take too long.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from featcal_fast.data.preprocess import load_tokenizer
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

Row = tuple[str, dict[str, list[int]]]  # where it is from, and its ids


def tokenize(
    source: object, samples: Sequence[Sample], folders: Sequence[Path], max_length: int, targets: bool
) -> tuple[list[Sample], int | None]:
    """Token ids and masks of texts, and the token that pads them, if there is one.

    Args:
        source: where they are from.
        samples: all of one kind.
        folders: model folders; the first that has a tokenizer counts.
        max_length: tokens that each text is cut at.
        targets: make labels of completions.

    Raises:
        DataError: one cannot be tokenized; there is no tokenizer, or it takes too much time or memory.
    """
    from transformers import AutoTokenizer  # noqa: F401 (now: this process may be copied several times)

    found: list[Sample] = []
    padding: int | None = None
    several = max(1, IDS // max_length)
    for start in range(0, len(samples), several):
        part = samples[start : start + several]
        characters = sum(map(_characters, part))
        try:
            padding, rows = confined(
                partial(_tokenize, source, part, folders, max_length, targets),
                TOKENIZER_SECONDS + characters // CHARACTERS_A_SECOND,
                TOKENIZER_BYTES,
            )
        except LimitError as error:
            raise DataError(
                f"{source}: the tokenizer in one of {listed(folders)} cannot tokenize the texts: {error}; repair its "
                "files, or take those of another model of the family"
            ) from None
        found += [as_tokens(Sample(where, values)) for where, values in rows]
    return found, padding


def _tokenize(
    source: object, samples: Sequence[Sample], folders: Sequence[Path], max_length: int, targets: bool
) -> tuple[int | None, list[Row]]:
    """In a process of its own: the padding token, and the ids of every sample."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that were there before a copy are not there after it
    chat = "messages" in samples[0].values
    tokenizer = load_tokenizer(source, folders, chat=chat)
    if chat:
        samples = _render_all(samples, tokenizer)
    _try(tokenizer, "".join(map(str, samples[0].values.values()))[:TRIAL])
    return tokenizer.pad_token_id, [_row(sample, tokenizer, max_length, targets, added=not chat) for sample in samples]


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


def _row(sample: Sample, tokenizer: Any, max_length: int, targets: bool, added: bool) -> Row:
    if not targets:
        return _ids(sample, tokenizer, max_length, added)
    where, values = sample
    if "completion" not in values:
        raise DataError(f"{where}: found {listed(values)}; expected prompt and completion, for the model's decoder")
    prompt, completion = (Sample(where, {"text": values[key]}) for key in ("prompt", "completion"))
    given, ids = _ids(prompt, tokenizer, max_length, added)
    return given, {**ids, "labels": _ids(completion, tokenizer, max_length, added)[1]["input_ids"]}


def _ids(sample: Sample, tokenizer: Any, max_length: int, added: bool) -> Row:
    text = _text(sample)
    # A chat template writes the special tokens itself.
    special = tokenizer.num_special_tokens_to_add() if added else 0
    if max_length <= special:
        raise DataError(
            f"{sample.where}: found max_length {max_length}, expected more than the {special} special tokens that the "
            f"tokenizer of {tokenizer.name_or_path} adds"
        )
    where = f"{sample.where} (tokenizer of {tokenizer.name_or_path})"
    with as_data_error(f"{where}: cannot be tokenized"):
        ids = tokenizer(text, add_special_tokens=added, truncation=True, max_length=max_length)["input_ids"]
    if len(ids) <= special:
        raise DataError(f"{where}: the text tokenizes to zero tokens; remove this sample")
    return where, {"input_ids": ids}


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
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(message, dict) and {"role", "content"} <= {*message} for message in messages)
    ):
        raise DataError(f"{where}, messages: found {shown(messages)}; expected a list of role and content objects")
    # A template may refuse a role, or fail in any other way.
    with as_data_error(f"{where}: the chat template of {tokenizer.name_or_path} rejects the messages"):
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    if len(text) > LONGEST_TEXT:
        raise DataError(
            f"{where}: found a text of {len(text)} characters, which the chat template makes of the messages, expected "
            f"at most {LONGEST_TEXT}; shorten them: no more than max_length tokens are used"
        )
    return text
