"""Where calibration data comes from: a file, a folder or the hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from featcal_fast import files
from featcal_fast.data.packed import PACKINGS
from featcal_fast.data.ready import read_tensors
from featcal_fast.data.samples import IMAGE_SUFFIXES, SUPPORTED, TABLE_SUFFIXES, Sample, draw, listed
from featcal_fast.data.tables import read_dataset
from featcal_fast.data.text_files import OTHER_SPLITS, TEXT_FORMS, TRAIN, read_texts, text_form
from featcal_fast.errors import DataError

HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?::([\w.-]+))?")
# Names of files that tell about data.
NOTES = re.compile(
    r"(readme|licen[cs]e|requirements)\b.*|(dataset_infos?|dataset_dict|state|config)\.json|thumbs\.db|desktop\.ini",
    re.IGNORECASE,
)
CAPTIONS = (".json", ".txt")  # forms of what may tell about a single image
SUFFIX = re.compile(r"\.[a-z0-9]{1,10}")
ENTRIES = 2_000_000  # of a folder and those in it: more than ImageNet has


def is_hub_id(source: str | Path) -> bool:
    """Whether `source`, of which nothing is on disk, may name a data set of the hub."""
    path = Path(source)
    named = text_form(path) or path.suffix.lower() in {".safetensors", *PACKINGS, *TABLE_SUFFIXES}
    return HUB_ID.fullmatch(str(source)) is not None and not named


def check_exists(source: str | Path) -> None:
    """Raises:
    DataError: `source` is neither on disk nor may it be on the hub."""
    if not Path(source).exists() and not is_hub_id(source):
        raise DataError(
            f"{source}: no such file or folder (looked for {Path(source).absolute()}); expected {SUPPORTED}"
        )


def read_samples(
    source: str | Path,
    samples: int,
    seed: int,
    longest: int | None = None,
    notes: list[str] | None = None,
    targets: bool = False,
) -> Iterator[Sample]:
    """The drawn samples of any source; what exists on disk wins over a hub id.

    Args:
        source: one of
            - a file of texts, see `text_files.read_texts`; every line, item or row has the keys of a kind of `kinds`;
            - a `.safetensors` file of ready model inputs, samples in the first dimension of every tensor;
            - a folder of images or of files of texts, searched recursively;
            - a folder saved by `datasets` or one of parquet or arrow files, or a hub id `org/name[:split]`;
              the split is `train` unless given. Columns: keys of texts, an image column, or `input_ids` with an
              optional `attention_mask`; the first of these it has, others are ignored.
        samples: how many to draw without replacement; all of them if there are fewer.
        seed: of the draw.
        longest: tokens of ready inputs, if the model has a limit.
        notes: a list for what the user should know of it, in sentences: keys, columns and files that are ignored.
        targets: see `kinds.as_texts`.
    """
    check_exists(source)
    path, notes = Path(source), [] if notes is None else notes
    suffix = path.suffix.lower()
    if path.is_dir():
        found = data_files(path)
        notes += found.notes
        if found.kind == "tables":
            yield from read_dataset(path, "train", samples, seed, found.files, notes, targets)
        elif found.kind == "texts":
            yield from read_texts(found.files, samples, seed, path, notes, targets)
        else:
            for i in draw(len(found.files), samples, seed, path):
                yield Sample(str(found.files[i]), {"image": found.files[i]})
    elif not path.exists():
        hub = HUB_ID.fullmatch(str(source))
        assert hub is not None
        yield from read_dataset(hub[1], hub[2] or "train", samples, seed, (), notes, targets)
    elif text_form(path):
        yield from read_texts([path], samples, seed, path, notes, targets)
    elif suffix == ".safetensors":
        yield from read_tensors(path, samples, seed, longest)
    elif suffix in TABLE_SUFFIXES:
        yield from read_dataset(path, "train", samples, seed, [path], notes, targets)
    else:
        raise DataError(f"{path}: found the unknown file type {suffix!r}; expected {SUPPORTED}")


@dataclass(frozen=True)
class DataFiles:
    """The files of a folder that hold its data.

    Attributes:
        kind: what they are: `tables`, `images` or `texts`.
        files: in order.
        notes: what the user should know of the others, in sentences.
    """

    kind: str
    files: list[Path]
    notes: list[str] = field(default_factory=list)


def data_files(folder: Path) -> DataFiles:
    """All tables below a folder; or, where there are none, all images; or all texts of one form, if they are more.

    Hidden ones are caches, version control and resource forks, never data. Files that are named for a split other than
    the training one are left out where there are some of that; so are notes about the data.

    Raises:
        DataError: there are none of any, or far too many files to look through.
    """
    tables: list[Path] = []
    images: list[Path] = []
    texts: dict[str, list[Path]] = {}
    others: list[Path] = []
    for path in files_below(folder):
        note = NOTES.fullmatch(path.name) is not None
        suffix, form = path.suffix.lower(), "" if note else text_form(path)
        if not form and suffix not in TABLE_SUFFIXES | IMAGE_SUFFIXES:
            others += [] if note else [path]
        elif path.exists():
            if not path.is_file():  # but a pipe or a device, which may keep its reader waiting forever
                raise DataError(f"{path}: it is not a regular file; expected a table, an image or texts, or remove it")
            if form:
                texts.setdefault(form, []).append(path)
            else:
                (tables if suffix in TABLE_SUFFIXES else images).append(path)
        else:  # a link to nowhere
            others.append(path)
    # Tables first: the clone of a hub dataset may hold a picture for its card. Notes may lie beside images.
    if tables:
        return DataFiles("tables", tables)
    alone = _without_captions(texts, images)
    form = next((each for each in TEXT_FORMS if alone[each]), "")
    if images and len(images) + (form == ".txt") > len(alone.get(form, ())):  # a single .txt is rather a note
        counts = Counter(_ending(each) for each in chain(others, *texts.values()))
        names = listed((f"{count:,} {ending}" for ending, count in counts.most_common()), 5)
        return DataFiles(
            "images", images, [f"{folder}: {len(images):,} images are read (ignored: {names})"] if counts else []
        )
    if not form:
        raise DataError(f"{folder}: found no images, parquet or arrow files, nor texts; expected {SUPPORTED}")
    found = _of_training(alone[form], folder)
    read = set(found)
    rest = [each.name for each in chain(images, *texts.values(), others) if each not in read]
    told = f"{folder}: {len(found):,} files of texts ({form}) are read (ignored: {listed(rest, 5)})"
    return DataFiles("texts", found, [told] if rest else [])


def _without_captions(texts: Mapping[str, list[Path]], images: Sequence[Path]) -> dict[str, list[Path]]:
    """Files of texts but those that are called as an image beside them, and tell about it."""
    told = {*images, *(each.with_suffix("") for each in images)} if {*CAPTIONS} & texts.keys() else set()
    return {
        form: [each for each in texts.get(form, ()) if form not in CAPTIONS or each.with_suffix("") not in told]
        for form in TEXT_FORMS
    }


def _ending(path: Path) -> str:
    return ending if SUFFIX.fullmatch(ending := path.suffix.lower()) else "files of other names"


def _of_training(found: list[Path], folder: Path) -> list[Path]:
    """Files that are named for the training split, or in a folder that is, if others are for other ones."""
    splits = [{*re.split(r"[^a-z]+", str(each.relative_to(folder)).lower())} for each in found]
    train = [each for each, words in zip(found, splits, strict=True) if TRAIN in words]
    return train if train and any(words & OTHER_SPLITS for words in splits) else found


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
