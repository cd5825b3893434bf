"""Whose tokenizer is whose, and which of their tokens are the same: compared by token text, where files differ."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from featcal_fast import files
from featcal_fast.data.preprocess import LARGEST, load_any_tokenizer
from featcal_fast.data.samples import confined, os_errors
from featcal_fast.errors import DataError
from featcal_fast.models.tokens import NAMED, OwnTokens, make_table
from featcal_fast.untrusted.documents import DocumentError, parse_json
from featcal_fast.untrusted.limits import LimitError

CONFIG, MODEL, NAMES = "tokenizer_config.json", "config.json", "special_tokens_map.json"
TOKENS = re.compile(r"(?!add_).*_tokens?|added_tokens_decoder")  # keys of the first and the last that name tokens
# What a library reads no token from, of all that its files may end in; a model's folder holds these too.
OTHERS = re.compile(
    r"(generation_|adapter_|(.*_)?(pre)?processor_)config\.json|.*\.index\.json|chat_template.*|trainer_state\.json"
    r"|.*results\.json|report\.json|readme.*|licen[cs]e.*|notice.*|use_policy.*|requirements\.txt|modules\.json",
    re.IGNORECASE,
)
# Keys of a tokenizer's config that change no id of a text.
NO_IDS = {
    *("chat_template", "response_schema", "model_max_length", "max_length", "name_or_path", "_commit_hash", "is_local"),
    *("padding_side", "truncation_side", "padding", "truncation", "stride", "pad_to_multiple_of", "processor_class"),
    *("truncation_strategy", "clean_up_tokenization_spaces", "model_input_names", "transformers_version"),
}
SECONDS, NBYTES = 40, 3 * 2**30  # of a processor's time, and memory, that it may take to load a tokenizer
MOST_TOKENS, MOST_CHARACTERS = 2**22, 2**26  # sixteen times the largest known
SHOWN = 100  # characters of a token


class Vocabularies:
    """Tokenizers of models, beside that of the merged model; none is read that need not be, or twice.

    Args:
        merged: the folder that has the merged model's tokenizer; None where nothing tells.
        size: rows of its embedding.
    """

    def __init__(self, merged: Path | None, size: int) -> None:
        self.merged, self.size = merged, size
        self._read: dict[Path, dict[str, int]] = {}
        self._found: dict[tuple[Path, int], OwnTokens] = {}

    def of(self, folder: Path | None, rows: int, label: str) -> OwnTokens:
        """A model's tokens.

        Args:
            folder: that has its tokenizer; None where nothing tells.
            rows: of its embedding.
            label: what to call it.

        Raises:
            DataError: a tokenizer cannot be read.
        """
        if folder is None or self.merged is None:
            return OwnTokens(label, folder, self.merged)
        if (folder, rows) not in self._found:
            same = _same(folder, self.merged)
            table, lacking = self._compared(folder, rows, label, same)
            self._found[folder, rows] = OwnTokens(label, folder, self.merged, same, table, lacking)
        return replace(self._found[folder, rows], label=label)

    def of_texts(self, tokens: Mapping[str, int] | None, path: Path, rows: int, label: str) -> OwnTokens:
        """The tokens of a model whose file tells which they are, but not how texts are split.

        Args:
            tokens: ids by text; None where it does not tell.
            path: of the file.
            rows: of its embedding.
            label: what to call it.

        Raises:
            DataError: the merged model's tokenizer cannot be read, or there is nothing to compare with it.
        """
        if self.merged is None:
            return OwnTokens(label)
        if tokens is None:
            raise DataError(
                f"{label}: {path} does not tell which tokens its rows are (tokenizer.ggml.tokens), to be compared with "
                "those of the merged model; convert it again, with its tokenizer"
            )
        table, lacking = self._table(self._vocabulary(self.merged, "merged model"), tokens, rows)
        return OwnTokens(label, path, self.merged, True, table, lacking)

    def _compared(self, folder: Path, rows: int, label: str, same: bool) -> tuple[torch.Tensor | None, dict[int, str]]:
        """The table, and texts of tokens that are lacking."""
        if same:
            return self._by_row(rows), {}
        assert self.merged is not None
        try:
            ours, theirs = self._vocabulary(self.merged, "merged model"), self._vocabulary(folder, label)
        except DataError:  # of a library that is not here, say; then texts cannot be split, but ids can be the same
            if not _same_tokens(folder, self.merged):
                raise
            return self._by_row(rows), {}
        return self._table(ours, theirs, rows)

    def _table(
        self, ours: Mapping[str, int], theirs: Mapping[str, int], rows: int
    ) -> tuple[torch.Tensor | None, dict[int, str]]:
        """Likewise, of vocabularies."""
        table = make_table(ours, theirs, self.size, rows)
        lacking = {row: text[:SHOWN] for text, row in sorted(ours.items()) if row < self.size and table[row] < 0}
        named = {row: lacking[row] for row in sorted(lacking)[:NAMED]}
        return None if table == [*range(self.size)] else torch.tensor(table), named

    def _by_row(self, rows: int) -> torch.Tensor | None:
        """The table of the same tokens: what an embedding has not is all that can be lacking."""
        table = [row if row < rows else -1 for row in range(self.size)]
        return None if rows >= self.size else torch.tensor(table)

    def _vocabulary(self, folder: Path, label: str) -> dict[str, int]:
        """Of one of several folders with the same tokenizer."""
        known = next((each for each in self._read if _same(each, folder)), folder)
        if known not in self._read:
            self._read[known] = read_vocabulary(known, label)
        return self._read[known]


def read_vocabulary(folder: Path, label: str) -> dict[str, int]:
    """Ids by token text, of the tokenizer in a folder, added tokens too.

    It is a stranger's: it is loaded in a process of its own, which is ended where that takes too long.

    Args:
        folder: that has it.
        label: whose it is, for errors.

    Raises:
        DataError: it cannot be loaded, takes too much time or memory, or has far too many tokens.
    """
    from transformers import AutoTokenizer  # noqa: F401 (now: this process may be copied several times)

    try:
        with os_errors(folder):
            found: dict[str, int] = confined(partial(_read, folder), SECONDS, NBYTES)
    except LimitError as error:
        raise DataError(
            f"{label}: the tokenizer in {folder} cannot be read, to be compared with the others of the merge: {error}; "
            "repair its files, or copy those of another model of the family"
        ) from None
    return found


def _read(folder: Path) -> dict[str, int]:
    """In a process of its own."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that were there before a copy are not there after it
    tokenizer = load_any_tokenizer(folder)
    tokens: dict[Any, Any] = {**tokenizer.get_vocab(), **tokenizer.get_added_vocab()}
    if len(tokens) > MOST_TOKENS or sum(len(str(text)) for text in tokens) > MOST_CHARACTERS:
        raise DataError(
            f"{folder}: found a tokenizer of {len(tokens)} tokens, expected at most {MOST_TOKENS}, of "
            f"{MOST_CHARACTERS} characters together; copy its files again"
        )
    return {str(text): row for text, row in tokens.items() if type(row) is int and row >= 0}


def _same(one: Path, other: Path) -> bool:
    """Whether all files that token ids depend on are equal."""
    with os_errors(one):
        if files.resolve(one) == files.resolve(other):
            return True
        first, second = _token_files(one), _token_files(other)
        if MODEL in first ^ second:  # beside an adapter's tokenizer there is none
            first, second = first - {MODEL}, second - {MODEL}
        return first == second and all(_equal(one / name, other / name) for name in sorted(first))


def _same_tokens(one: Path, other: Path) -> bool:
    """Whether all files that say which token an id is are equal, though they may not say alike how texts are split."""
    with os_errors(one):
        first, second = (_token_files(each) - {MODEL, CONFIG, NAMES} for each in (one, other))
        named = [{**_named(each / CONFIG), **_named(each / NAMES)} for each in (one, other)]
        alike = named[0] == named[1] and first == second
        return alike and all(_equal(one / name, other / name) for name in sorted(first))


def _named(path: Path) -> dict[str, Any]:
    """What a config says of single tokens: a token's text is as good as an object that has it."""
    values = _of_ids(path) if path.is_file() else {}
    tokens = {key: value for key, value in values.items() if TOKENS.fullmatch(key) and value is not None}
    return {key: value.get("content", value) if isinstance(value, dict) else value for key, value in tokens.items()}


def _token_files(folder: Path) -> set[str]:
    """Names of files that may say which ids a text has."""
    found = (path for path in files.list_folder(folder) if path.suffix in LARGEST and path.suffix != ".jinja")
    return {path.name for path in found if path.is_file() and not OTHERS.fullmatch(path.name)}


def _equal(one: Path, other: Path) -> bool:
    if one.name in (CONFIG, MODEL):
        return _of_ids(one) == _of_ids(other)
    if files.stat(one).st_size != files.stat(other).st_size:
        return False
    largest = LARGEST[one.suffix]
    return files.read_bytes(one, largest) == files.read_bytes(other, largest)


def _of_ids(path: Path) -> Mapping[str, Any]:
    """What a config says that ids depend on."""
    try:
        values = parse_json(files.read_bytes(path))
    except DocumentError as error:
        raise DataError(f"{path}: it is not valid JSON: {error}; copy it again") from error
    if not isinstance(values, dict):
        raise DataError(f"{path}: found a JSON {type(values).__name__}, expected an object; copy it again")
    if path.name == MODEL:  # by which a class of tokenizers is chosen
        return {key: values.get(key) for key in ("model_type", "tokenizer_class")}
    return {key: value for key, value in values.items() if key not in NO_IDS}
