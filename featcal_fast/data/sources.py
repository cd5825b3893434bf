"""Where calibration data comes from: a file, a folder or the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from featcal_fast import files
from featcal_fast.data.lines import read_jsonl
from featcal_fast.data.ready import read_tensors
from featcal_fast.data.samples import IMAGE_SUFFIXES, SUPPORTED, TABLE_SUFFIXES, Sample, draw
from featcal_fast.data.tables import read_dataset
from featcal_fast.errors import DataError

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
ENTRIES = 2_000_000  # of a folder and those in it: more than ImageNet has


def is_hub_id(source: str | Path) -> bool:
    """Whether `source`, of which nothing is on disk, may name a data set of the hub."""
    suffixes = {".jsonl", ".safetensors", ".json", ".csv", ".txt", *TABLE_SUFFIXES}
    return HUB_ID.fullmatch(str(source)) is not None and Path(source).suffix.lower() not in suffixes


def check_exists(source: str | Path) -> None:
    """Raises:
    DataError: `source` is neither on disk nor may it be on the hub."""
    if not Path(source).exists() and not is_hub_id(source):
        raise DataError(
            f"{source}: no such file or folder (looked for {Path(source).absolute()}); expected {SUPPORTED}"
        )


def read_samples(source: str | Path, samples: int, seed: int, longest: int | None = None) -> Iterator[Sample]:
    """The drawn samples of any source; what exists on disk wins over a hub id.

    Args:
        source: one of
            - a `.jsonl` file; every line an object with `text`, with `prompt` and `completion` (joined as
              they are), or with `messages` (rendered by the chat template);
            - a `.safetensors` file of ready model inputs, samples in the first dimension of every tensor;
            - a folder of images, searched recursively;
            - a folder saved by `datasets` or one of parquet or arrow files, or a hub id `org/name[:split]`;
              the split is `train` unless given. Columns: the keys of a line above, an image column, or
              `input_ids` with an optional `attention_mask`; the first of these it has, others are ignored.
        samples: how many to draw without replacement; all of them if there are fewer.
        seed: of the draw.
        longest: tokens of ready inputs, if the model has a limit.
    """
    check_exists(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        found = data_files(path)
        # Tables first: the clone of a hub dataset may hold a picture for its card.
        if is_tables(found):
            yield from read_dataset(path, "train", samples, seed, found)
            return
        for i in draw(len(found), samples, seed, path):
            yield Sample(str(found[i]), {"image": found[i]})
    elif not path.exists():
        hub = HUB_ID.fullmatch(str(source))
        assert hub is not None
        yield from read_dataset(hub[1], hub[2] or "train", samples, seed)
    elif suffix == ".jsonl":
        yield from read_jsonl(path, samples, seed)
    elif suffix == ".safetensors":
        yield from read_tensors(path, samples, seed, longest)
    else:
        raise DataError(f"{path}: found the unknown file type {suffix!r}; expected {SUPPORTED}")


def is_tables(found: list[Path]) -> bool:
    """Whether a folder's data files are tables, not images."""
    return found[0].suffix.lower() in TABLE_SUFFIXES


def data_files(folder: Path) -> list[Path]:
    """All tables below a folder, or, where there are none, all images, in order.

    Hidden ones are caches, version control and resource forks, never data.

    Raises:
        DataError: there are none of either, or far too many files to look through.
    """
    tables: list[Path] = []
    images: list[Path] = []
    for path in files_below(folder):
        suffix = path.suffix.lower()
        if suffix in TABLE_SUFFIXES | IMAGE_SUFFIXES and path.exists():
            if not path.is_file():  # but a pipe or a device, which may keep its reader waiting forever
                raise DataError(f"{path}: it is not a regular file; expected a table or an image, or remove it")
            (tables if suffix in TABLE_SUFFIXES else images).append(path)
    if not tables and not images:
        raise DataError(f"{folder}: found no images, parquet or arrow files; expected {SUPPORTED}")
    return tables or images


def files_below(folder: Path) -> Iterator[Path]:
    """What is in a folder and the folders in it, in order. What is hidden does not count; no link to a folder leads on.

    Raises:
        DataError: there are far too many files to look through.
    """
    seen, waiting = 0, [folder]  # not a call for each, whose depth a stranger's folder would say
    while waiting:
        path = waiting.pop()
        if path.is_dir() and (path == folder or not path.is_symlink()):
            inside = [each for each in files.list_folder(path) if not each.name.startswith(".")]
            seen += len(inside)
            if seen > ENTRIES:
                raise DataError(
                    f"{folder}: found more than {ENTRIES} files in it; expected a folder of a model or of data alone"
                )
            waiting += reversed(inside)
        else:
            yield path
