"""Samples of a data set, by the `datasets` library: a folder of tables, or one of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcal_fast import files
from featcal_fast.checkpoints.documents import is_file_name
from featcal_fast.data.kinds import CONTEXTS, PLAIN, TEXT_KEYS, TEXT_KINDS, as_texts, has_kind
from featcal_fast.data.samples import (
    IMAGE_SUFFIXES,
    SUPPORTED,
    Sample,
    as_data_error,
    as_tokens,
    confined,
    draw,
    import_optional,
    listed,
)
from featcal_fast.errors import DataError, shown
from featcal_fast.streaming.machine import available_host_bytes
from featcal_fast.untrusted.documents import DocumentError, parse_json, parse_yaml
from featcal_fast.untrusted.limits import LimitError
from featcal_fast.untrusted.quiet import quiet

STATE, SPLITS = "state.json", "dataset_dict.json"  # of a data set that was saved by the library, and of several
SMALL = 2**26  # bytes of a table's file up to which it is unpacked once before: what unpacks to far more is small
ROOM, MOST_TIMES = 2**26, 100  # bytes that any table may unpack to, and times its file's size besides
SECONDS, ROOM_TO_UNPACK = 20, 3 * 2**27
TEXT_COLUMNS = {key for kind in TEXT_KINDS for key in kind} | {*CONTEXTS}
CARDS = ("README.md", ".huggingface.yaml")
CARD_HEADER = re.compile(r"^\s*---[\r\n]+([\S\s]*?)[\r\n]+---([\r\n]|$)")  # as the library reads it


def read_dataset(
    source: Path | str,
    split: str,
    samples: int,
    seed: int,
    tables: Sequence[Path],
    notes: list[str],
    targets: bool = False,
) -> list[Sample]:
    """The drawn rows of a table, of a folder, whose tables are given, or of a data set of the hub.

    `notes` is told which columns are ignored; for `targets` see `kinds.as_texts`.
    """
    datasets = import_optional("datasets", "datasets", source)
    saved = any((Path(source) / name).is_file() for name in (STATE, SPLITS))
    _check_tables(tables)
    if saved:
        _check_saved(Path(source))
    elif isinstance(source, Path):
        for name in CARDS:
            _check_card(source / name)
    absent = "" if isinstance(source, Path) else "no such file or folder, and as a hub id "
    error = f"{source}: {absent}cannot be read with the split {split!r}; expected {SUPPORTED}"
    with as_data_error(error), quiet("datasets"):
        if saved:
            dataset = datasets.load_from_disk(source)
        elif isinstance(source, Path) and source.is_file():
            form = source.suffix.lower().removeprefix(".")
            dataset = datasets.load_dataset(form, data_files=[str(source)], split=split)
        else:
            dataset = datasets.load_dataset(str(source), split=split)
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"{source}: found the splits {listed(dataset)}; name the folder of one of them")
        dataset = dataset[split]
    columns = dataset.column_names
    dataset = _needed(dataset, datasets, source)
    drawn = draw(len(dataset), samples, seed, source)
    with as_data_error(f"{source}: its rows cannot be read; save it again"):
        found = [Sample(f"{source}, row {i}", dataset[i]) for i in drawn]
    if "image" in found[0].values:
        places = _places(source, datasets)
        return [Sample(each.where, {"image": _image(each, places)}) for each in found]
    if "input_ids" in found[0].values:
        return [as_tokens(each) for each in found]
    return as_texts(found, source, notes, targets, [name for name in columns if name not in found[0].values])


def _needed(dataset: Any, datasets: Any, source: object) -> Any:
    """A data set of no other columns than a sample has."""
    columns = dataset.column_names
    pictures = [name for name in columns if isinstance(dataset.features[name], datasets.Image)]
    images = pictures[:1]
    tokens = [name for name in ("input_ids", "attention_mask") if name in columns]
    texts = [name for name in columns if name in TEXT_COLUMNS and name not in pictures]
    if any({*kind} <= {*texts} for kind in PLAIN) or (has_kind(texts) and not images and "input_ids" not in tokens):
        dataset = dataset.select_columns(texts)
    elif images:  # not decoded yet, so that a broken image is reported like one in a folder
        dataset = dataset.select_columns(images)
        if images != ["image"]:  # `datasets` refuses to rename a column to itself
            dataset = dataset.rename_column(images[0], "image")
        dataset = dataset.cast_column("image", datasets.Image(decode=False))
    elif "input_ids" in tokens:
        dataset = dataset.select_columns(tokens)
    else:
        raise DataError(
            f"{source}: found the columns {listed(columns)}; expected {TEXT_KEYS}, an image column or input_ids"
        )
    return dataset.with_format(None)


def _image(sample: Sample, places: Sequence[Path]) -> bytes | Path:
    """An image cell's file: its bytes, or a name, which a stranger wrote, and which may lead anywhere."""
    cell = sample.values["image"]
    if not isinstance(cell, dict) or not isinstance(cell["bytes"] or cell["path"], (bytes, str)):
        raise DataError(f"{sample.where}: found no image; remove this row")
    if isinstance(data := cell["bytes"], bytes):
        return data
    path: Path = places[0] / cell["path"]
    with as_data_error(f"{sample.where}: {shown(cell['path'])} cannot be read"):
        inside = any(place in files.resolve(path).parents for place in places)
    if not inside or path.suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(
            f"{sample.where}: found the file {shown(cell['path'])}, expected an image's bytes, or an image in the data "
            "set's own folder"
        )
    return path


def _places(source: Path | str, datasets: Any) -> list[Path]:
    """Where the files of a data set may be."""
    if isinstance(source, Path):
        return [files.resolve(source if source.is_dir() else source.parent)]
    from huggingface_hub.constants import HF_HUB_CACHE

    own = Path(HF_HUB_CACHE) / f"datasets--{source.replace('/', '--')}"
    return [files.resolve(own), files.resolve(Path(datasets.config.EXTRACTED_DATASETS_PATH))]


def _check_tables(tables: Sequence[Path]) -> None:
    """Raises:
    DataError: a table holds far more than its size, or parts of it, which are read at once, are larger than memory."""
    for path in tables:
        if not (size := files.stat(path).st_size):
            continue
        if path.suffix.lower() == ".parquet":
            parquet = import_optional("pyarrow.parquet", "datasets", path)
            with as_data_error(f"{path}: cannot be read as a parquet file; download or save it again"):
                found = parquet.read_metadata(path)
                largest = max((found.row_group(i).total_byte_size for i in range(found.num_row_groups)), default=0)
            if largest > (free := available_host_bytes() // 2):
                raise DataError(
                    f"{path}: found a row group of {largest / 2**30:.1f} GiB, but only {free / 2**30:.1f} GiB fit in "
                    "memory; save it in smaller ones"
                )
        if size <= SMALL:
            _check_unpacked(path, ROOM + MOST_TIMES * size)


def _check_unpacked(path: Path, most: int) -> None:
    """Unpack a table in a process of its own, where that may take too much: what it says of itself may be wrong."""

    def unpack() -> None:
        total = 0
        for batch in _parts_of(path):
            total += sum(_unpacked(column).nbytes for column in batch.columns)
            if total > most:
                raise DataError(
                    f"{path}: what it unpacks to is too large for its size, more than {most / 2**20:.0f} MiB; save it "
                    "without compression"
                )

    try:
        confined(unpack, SECONDS, ROOM_TO_UNPACK)
    except LimitError as error:
        raise DataError(f"{path}: it cannot be unpacked: {error}; save it again, in smaller parts") from None


def _unpacked(column: Any) -> Any:
    """A column's own values; its dictionary, if it has one, comes with each part of a table anew."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _parts_of(path: Path) -> Iterator[Any]:
    """A table's rows, some at a time; none of one that cannot be read, which whoever loads it will say."""
    with suppress(OSError, ValueError):  # pyarrow's own errors are among the latter
        if path.suffix.lower() == ".parquet":
            parquet = import_optional("pyarrow.parquet", "datasets", path)
            yield from parquet.ParquetFile(path).iter_batches(batch_size=16, use_threads=False)
        else:
            yield from import_optional("pyarrow.ipc", "datasets", path).open_stream(str(path))


def _check_card(path: Path) -> None:
    """Raises:
    DataError: a data set's card, which may say what its files are, names some outside of its folder."""
    if not path.is_file():
        return
    with as_data_error(f"{path}: cannot be read; repair or remove it"):
        text = files.read_text(path)
    if path.suffix == ".md":
        text = header[1] if (header := CARD_HEADER.match(text)) else ""
    if "configs" not in text:
        return
    with as_data_error(f"{path}: what it says of the data's files (configs) cannot be read; repair or remove it"):
        values = [parse_yaml(text.encode()).get("configs")]
    for value in values:
        if isinstance(value, (list, dict)):
            values += [value[key] for key in value if key != "description"] if isinstance(value, dict) else value
        elif isinstance(value, str) and (
            value.startswith(("/", "~")) or ".." in value or "://" in value or "::" in value
        ):
            raise DataError(f"{path}: found the file {shown(value)} (configs), expected files in its folder; remove it")


def _check_saved(folder: Path) -> None:
    """Raises:
    DataError: a saved data set names parts outside of its folder."""
    parts = _parts(folder, SPLITS, "splits")
    for each in (folder, *(folder / name for name in parts)):
        _parts(each, STATE, "_data_files")


def _parts(folder: Path, file: str, key: str) -> list[str]:
    """What a saved data set is made of, by one of its own files."""
    path = folder / file
    if not path.is_file():
        return []
    try:
        listed = parse_json(files.read_bytes(path))[key]
        names = [each["filename"] if isinstance(each, dict) else each for each in listed]
    except (DocumentError, KeyError, TypeError) as error:
        raise DataError(f"{path}: it does not describe a saved data set: {error!r:.200}; save it again") from error
    for name in names:
        if not is_file_name(name):
            raise DataError(f"{path}: found the part {shown(name)}, expected a name in its folder; save it again")
    return names
