"""A sample of calibration data, how samples are drawn, and what is said of files that are not as they should be."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

import torch

from featcal_fast.errors import DataError, told
from featcal_fast.untrusted.limits import LimitError, ProgramError, limited

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
IMAGE_SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm"}
TABLE_SUFFIXES = {".parquet", ".arrow"}
SUPPORTED = (
    "a .jsonl file (or .json, .csv, .tsv, .txt; any of them packed as .gz, .bz2, .xz or .zst), a .safetensors file, a "
    "folder of such texts or of images (png, jpg, webp, bmp, gif, tif, ppm), a datasets folder (save_to_disk, parquet "
    "or arrow files) or a hub id org/name[:split]"
)
LONGEST_TEXT = 2**20  # characters; of which a model is given some thousand tokens
PERMUTED = 2**24  # samples of which a permutation is made to draw some


class Sample(NamedTuple):
    """One sample: where it was found, for error messages, and its values by name."""

    where: str
    values: dict[str, Any]


def draw(count: int, samples: int, seed: int, source: object) -> list[int]:
    """`samples` of the numbers below `count`, all of them where there are fewer, by a permutation from `seed`.

    Raises:
        DataError: there are none to draw from.
    """
    if count == 0:
        raise DataError(f"{source}: found zero samples; expected at least one")
    generator = torch.Generator().manual_seed(seed)
    if count <= max(PERMUTED, 2 * samples):
        return torch.randperm(count, generator=generator)[:samples].tolist()
    drawn: dict[int, None] = {}  # in the order that they came
    while len(drawn) < samples:
        drawn |= dict.fromkeys(torch.randint(count, (samples,), generator=generator).tolist())
    return list(drawn)[:samples]


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Integers as int64; floating tensors as they are."""
    return tensor if tensor.is_floating_point() else tensor.long()


def as_tokens(sample: Sample) -> Sample:
    """A row of token ids as tensors; where it has no mask, every token counts."""
    with as_data_error(f"{sample.where}: found no row of token ids; expected lists of integers"):
        values = {name: widen(torch.tensor(value)) for name, value in sample.values.items()}
        ids = values.pop("input_ids")
        mask = values.pop("attention_mask", torch.ones_like(ids))
    return Sample(sample.where, {"input_ids": ids, "attention_mask": mask, **values})


def listed(names: Iterable[object], most: int = 20) -> str:
    """Names for an error message, not more than some."""
    every = [text if len(text := str(name)) <= 200 else f"{text[:80]}...{text[-80:]}" for name in names]
    return ", ".join(every[:most] + ["..."] * (len(every) > most)) or "nothing"


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
        raise DataError(f"{message} ({told(error)})") from error


def confined(program: Callable[[], Any], seconds: int, nbytes: int) -> Any:
    """What a program makes of a stranger's files, in a process of its own; its DataErrors are raised here.

    Raises:
        DataError: the program raised it.
        LimitError: it takes more time or memory than it may.
    """

    try:
        return limited(program, seconds, nbytes)
    except ProgramError as error:
        if str(error).startswith(f"{DataError.__name__}: "):
            raise DataError(error.text) from None
        raise LimitError(f"it fails ({error})") from None
