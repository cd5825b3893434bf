"""Where calibration data comes from: a file, a folder or the hub, and the samples drawn of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from featcal_fast import files
from featcal_fast.errors import DataError

# The keys of a text sample; of a dataset with more columns than that, the first kind it has.
TEXT_KINDS = (("text",), ("prompt", "completion"), ("messages",))
TEXT_KEYS = "text, prompt and completion, or messages"
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
SUPPORTED = (
    "a .jsonl file, a .safetensors file, a folder of images (png, jpg, jpeg, webp, bmp), a datasets folder "
    "(save_to_disk, parquet or arrow files) or a hub id org/name[:split]"
)


class Sample(NamedTuple):
    """One sample: where it was found, for error messages, and its values by name."""

    where: str
    values: dict[str, Any]


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


def read_samples(source: str | Path, samples: int, seed: int) -> list[Sample]:
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
    """
    check_exists(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        found = data_files(path)
        # Tables first: the clone of a hub dataset may hold a picture for its card.
        if any(file.suffix.lower() in TABLE_SUFFIXES for file in found):
            return _read_dataset(path, "train", samples, seed)
        images = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise DataError(f"{path}: found no images, parquet or arrow files; expected {SUPPORTED}")
        return [Sample(str(images[i]), {"image": images[i]}) for i in _draw(len(images), samples, seed, path)]
    if path.exists():
        if suffix == ".jsonl":
            return _read_jsonl(path, samples, seed)
        if suffix == ".safetensors":
            return _read_tensors(path, samples, seed)
        raise DataError(f"{path}: found the unknown file type {suffix!r}; expected {SUPPORTED}")
    hub = HUB_ID.fullmatch(str(source))
    assert hub is not None
    return _read_dataset(hub[1], hub[2] or "train", samples, seed)


def data_files(folder: Path) -> list[Path]:
    """All files below a folder, in order. Hidden ones are caches, version control and resource forks, never data."""
    below = (file for file in files.list_below(folder) if file.is_file())
    return [file for file in below if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _draw(count: int, samples: int, seed: int, source: object) -> list[int]:
    if count == 0:
        raise DataError(f"{source}: found zero samples; expected at least one")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples].tolist()


def _read_jsonl(path: Path, samples: int, seed: int) -> list[Sample]:
    drawn: list[Sample] = []
    with closing(files.open_to_read(path)) as file:
        lines, offset = [], 0  # number, length and first byte of every line that is not blank
        for number, line in enumerate(files.read_lines(file), 1):
            if line.strip():
                lines.append((number, len(line), offset))
            offset += len(line)
        for i in _draw(len(lines), samples, seed, path):
            number, length, offset = lines[i]
            drawn.append(_parse_line(files.read_at(file, length, offset), f"{path}, line {number}"))
    for sample in drawn:
        if tuple(sample.values) != tuple(drawn[0].values):
            raise DataError(
                f"{sample.where}: found {listed(sample.values)}, expected {listed(drawn[0].values)} as in "
                f"{drawn[0].where}; give each kind its own file"
            )
    return drawn


def _parse_line(line: bytes, where: str) -> Sample:
    with as_data_error(f"{where}: found invalid JSON; expected one object a line"):
        values = json.loads(line)
    if not isinstance(values, dict):
        raise DataError(f"{where}: found a JSON {type(values).__name__}; expected an object with {TEXT_KEYS}")
    for kind in TEXT_KINDS:
        if set(kind) == set(values):
            return Sample(where, {key: values[key] for key in kind})
    raise DataError(f"{where}: found the keys {listed(values)}; expected {TEXT_KEYS}, and no other keys")


def _read_tensors(path: Path, samples: int, seed: int) -> list[Sample]:
    with as_data_error(f"{path}: cannot be read as safetensors"), safe_open(path, framework="pt") as file:
        names = sorted(file.keys(), key=lambda name: (name != "input_ids", name))
        tensors = {name: file.get_slice(name) for name in names}
        counts = {name: (tensor.get_shape() or [0])[0] for name, tensor in tensors.items()}
        first, expected = next(iter(counts.items()), ("", 0))
        for name, count in counts.items():
            if count != expected:
                raise DataError(
                    f"{path}, {name}: found {count} in the first dimension, expected {expected} samples as in {first}"
                )
        return [
            Sample(f"{path}, sample {i}", {name: widen(rows[i : i + 1][0]) for name, rows in tensors.items()})
            for i in _draw(expected, samples, seed, path)
        ]


def _read_dataset(source: Path | str, split: str, samples: int, seed: int) -> list[Sample]:
    datasets = import_optional("datasets", "datasets", source)
    saved = any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    absent = "" if isinstance(source, Path) else "no such file or folder, and as a hub id "
    with as_data_error(f"{source}: {absent}cannot be read with the split {split!r}; expected {SUPPORTED}"):
        dataset = datasets.load_from_disk(source) if saved else datasets.load_dataset(str(source), split=split)
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"{source}: found the splits {listed(dataset)}; name the folder of one of them")
        dataset = dataset[split]

    columns = dataset.column_names
    images = [name for name in columns if isinstance(dataset.features[name], datasets.Image)][:1]
    tokens = [name for name in ("input_ids", "attention_mask") if name in columns]
    if kind := next((kind for kind in TEXT_KINDS if set(kind) <= set(columns)), None):
        dataset = dataset.select_columns(list(kind))
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
    dataset = dataset.with_format(None)
    drawn = [Sample(f"{source}, row {i}", dataset[i]) for i in _draw(len(dataset), samples, seed, source)]
    return [as_tokens(sample) for sample in drawn] if "input_ids" in drawn[0].values else drawn


def as_tokens(sample: Sample) -> Sample:
    """A row of token ids as tensors; where it has no mask, every token counts."""
    with as_data_error(f"{sample.where}: found no row of token ids; expected lists of integers"):
        values = {name: widen(torch.tensor(value)) for name, value in sample.values.items()}
    values.setdefault("attention_mask", torch.ones_like(values["input_ids"]))
    return Sample(sample.where, values)


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Integers as int64; floating tensors as they are."""
    return tensor if tensor.is_floating_point() else tensor.long()


def listed(names: Iterable[object]) -> str:
    """Names for an error message."""
    return ", ".join(map(str, names)) or "nothing"


def import_optional(module: str, package: str, source: object) -> Any:
    """A module that not every data source needs.

    Raises:
        DataError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(f"{source}: cannot be read without {package}; pip install {package}") from error


@contextmanager
def os_errors(source: object) -> Iterator[None]:
    """Turn what the operating system says of a user's file into a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or source}: cannot be read: {error.strerror or error}; check the file and its rights"
        ) from error


@contextmanager
def as_data_error(message: str) -> Iterator[None]:
    """Turn whatever a library raises on a user's file into a DataError that begins with `message`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{message} ({type(error).__name__}: {error})") from error
