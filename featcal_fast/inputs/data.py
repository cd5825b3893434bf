"""Calibration data of one task: from a file, a folder or the hub to batches of model inputs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence

from featcal_fast.checkpoints import is_finite
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
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


class Sample(NamedTuple):
    """One sample: where it was found, for error messages, and its values by name."""

    where: str
    values: dict[str, Any]


def load_batches(
    source: str | Path,
    *,
    folders: Sequence[Path],
    samples: int = 256,
    max_length: int = 512,
    batch_size: int = 16,
    batch_tokens: int | None = None,
    seed: int = 0,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    targets: bool = False,
) -> list[dict[str, torch.Tensor]]:
    """Draw `samples` samples of `source` and make batches of model keyword arguments of them.

    Args:
        source: one of
            - a `.jsonl` file; every line an object with `text`, with `prompt` and `completion` (joined as
              they are), or with `messages` (rendered by the chat template);
            - a `.safetensors` file of ready model inputs, samples in the first dimension of every tensor;
            - a folder of images, searched recursively;
            - a folder saved by `datasets` or one of parquet or arrow files, or a hub id `org/name[:split]`;
              the split is `train` unless given. Columns: the keys of a line above, an image column, or
              `input_ids` with an optional `attention_mask`; the first of these it has, others are ignored.
        folders: model folders to take the tokenizer or image processor from; the first that has one.
        samples: how many to draw without replacement; all of them if there are fewer. What is not drawn is
            not read, and so not checked.
        max_length: tokens that a text is truncated to, at its end. Ready inputs are never truncated.
        batch_size: rows of a batch; the last one may be smaller.
        batch_tokens: of texts, in place of `batch_size`: as many rows as have no more positions, padding included.
        seed: of the draw; the same seed and data give the same batches.
        max_positions: the longest sequence that the model takes, if it has a limit.
        vocab_size: rows of the model's embedding, if known.
        targets: the model is an encoder-decoder: texts must be `prompt` and `completion`, the prompt becomes
            `input_ids`, the completion `labels`.

    Returns:
        Batches on the CPU. Texts: `input_ids` and `attention_mask`, `[rows, longest of the batch]`, int64,
        padded on the right, shorter sequences first; `labels` are padded with -100. Images: `pixel_values`,
        `[rows, channels, height, width]`, in the image processor's dtype. Ready inputs: every tensor of the
        file, `[rows, ...]`, rows in drawn order; floating tensors keep their dtype, all others become int64.

    Raises:
        DataError: the source is missing, empty, unreadable or of an unknown kind; a sample is malformed,
            empty, not finite, longer than the model takes or outside its vocabulary; a folder's tokenizer or
            image processor cannot be loaded, or none has one; an optional library is missing.
    """
    with os_errors(source):
        drawn = _read(source, samples, seed)
    padding = 0
    if tuple(drawn[0].values) in TEXT_KINDS:
        if max_positions is not None and max_length > max_positions:
            raise DataError(
                f"{source}: found max_length {max_length}, expected at most the model's {max_positions} "
                f"positions; lower max_length to {max_positions}"
            )
        tokenizer = _load_tokenizer(source, folders, chat="messages" in drawn[0].values)
        drawn = [_tokenize(sample, tokenizer, max_length, targets) for sample in drawn]
        # Padding is embedded too, so a pad token added beyond the model's vocabulary will not do.
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < (vocab_size or float("inf")):
            padding = tokenizer.pad_token_id
    elif "image" in drawn[0].values:
        processor = _load_image_processor(source, folders)
        drawn = [_process_image(sample, processor) for sample in drawn]
    for sample in drawn:
        _check(sample, max_positions, vocab_size)
    # Neighbours of similar length need little padding. The sort is stable: equal lengths stay as drawn.
    drawn.sort(key=lambda sample: len(sample.values.get("input_ids", ())))
    batches = []
    texts = all(value.ndim == 1 for value in drawn[0].values.values())
    while drawn:
        rows = _rows_within(drawn, batch_tokens) if batch_tokens is not None and texts else batch_size
        batches.append(_collate(drawn[:rows], padding))
        del drawn[:rows]  # or both would be held twice
    return batches


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


# Sources -> drawn samples


def _read(source: str | Path, samples: int, seed: int) -> list[Sample]:
    """The drawn samples of any source; what exists on disk wins over a hub id."""
    check_exists(source)
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_dir():
        below = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
        # Hidden files are caches, version control and resource forks, never data.
        files = [below[key] for key in sorted(below) if not any(part.startswith(".") for part in key.parts)]
        # Tables first: the clone of a hub dataset may hold a picture for its card.
        if any(file.suffix.lower() in TABLE_SUFFIXES for file in files):
            return _read_dataset(path, "train", samples, seed)
        images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
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


def _draw(count: int, samples: int, seed: int, source: object) -> list[int]:
    if count == 0:
        raise DataError(f"{source}: found zero samples; expected at least one")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples].tolist()


def _read_jsonl(path: Path, samples: int, seed: int) -> list[Sample]:
    drawn: list[Sample] = []
    with path.open("rb") as file:
        lines, offset = [], 0  # number and first byte of every line that is not blank
        for number, line in enumerate(file, 1):
            if line.strip():
                lines.append((number, offset))
            offset += len(line)
        for i in _draw(len(lines), samples, seed, path):
            number, offset = lines[i]
            file.seek(offset)
            drawn.append(_parse_line(file.readline(), f"{path}, line {number}"))
    for sample in drawn:
        if tuple(sample.values) != tuple(drawn[0].values):
            raise DataError(
                f"{sample.where}: found {_list(sample.values)}, expected {_list(drawn[0].values)} as in "
                f"{drawn[0].where}; give each kind its own file"
            )
    return drawn


def _parse_line(line: bytes, where: str) -> Sample:
    with _blame(f"{where}: found invalid JSON; expected one object a line"):
        values = json.loads(line)
    if not isinstance(values, dict):
        raise DataError(f"{where}: found a JSON {type(values).__name__}; expected an object with {TEXT_KEYS}")
    for kind in TEXT_KINDS:
        if set(kind) == set(values):
            return Sample(where, {key: values[key] for key in kind})
    raise DataError(f"{where}: found the keys {_list(values)}; expected {TEXT_KEYS}, and no other keys")


def _read_tensors(path: Path, samples: int, seed: int) -> list[Sample]:
    with _blame(f"{path}: cannot be read as safetensors"), safe_open(path, framework="pt") as file:
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
            Sample(f"{path}, sample {i}", {name: _widen(rows[i : i + 1][0]) for name, rows in tensors.items()})
            for i in _draw(expected, samples, seed, path)
        ]


def _read_dataset(source: Path | str, split: str, samples: int, seed: int) -> list[Sample]:
    datasets = _optional("datasets", "datasets", source)
    saved = any((Path(source) / name).is_file() for name in ("state.json", "dataset_dict.json"))
    absent = "" if isinstance(source, Path) else "no such file or folder, and as a hub id "
    with _blame(f"{source}: {absent}cannot be read with the split {split!r}; expected {SUPPORTED}"):
        dataset = datasets.load_from_disk(source) if saved else datasets.load_dataset(str(source), split=split)
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"{source}: found the splits {_list(dataset)}; name the folder of one of them")
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
            f"{source}: found the columns {_list(columns)}; expected {TEXT_KEYS}, an image column or input_ids"
        )
    dataset = dataset.with_format(None)
    drawn = [Sample(f"{source}, row {i}", dataset[i]) for i in _draw(len(dataset), samples, seed, source)]
    return [_tokens(sample) for sample in drawn] if "input_ids" in drawn[0].values else drawn


def _tokens(sample: Sample) -> Sample:
    """A row of token ids as tensors; where it has no mask, every token counts."""
    with _blame(f"{sample.where}: found no row of token ids; expected lists of integers"):
        values = {name: _widen(torch.tensor(value)) for name, value in sample.values.items()}
    values.setdefault("attention_mask", torch.ones_like(values["input_ids"]))
    return Sample(sample.where, values)


# Texts and images -> tensors


def _tokenize(sample: Sample, tokenizer: Any, max_length: int, targets: bool) -> Sample:
    where, values = sample
    if targets:
        if "completion" not in values:
            raise DataError(f"{where}: found {_list(values)}; expected prompt and completion, for the model's decoder")
        prompt, completion = (Sample(where, {"text": values[key]}) for key in ("prompt", "completion"))
        given = _tokenize(prompt, tokenizer, max_length, targets=False)
        labels = _tokenize(completion, tokenizer, max_length, targets=False).values["input_ids"]
        return Sample(given.where, {**given.values, "labels": labels})
    chat = "messages" in values
    text = _render(sample, tokenizer) if chat else _join(sample)
    # A chat template writes the special tokens itself.
    added = 0 if chat else tokenizer.num_special_tokens_to_add()
    if max_length <= added:
        raise DataError(
            f"{where}: found max_length {max_length}, expected more than the {added} special tokens that the "
            f"tokenizer of {tokenizer.name_or_path} adds"
        )
    where = f"{where} (tokenizer of {tokenizer.name_or_path})"
    with _blame(f"{where}: cannot be tokenized"):
        ids = tokenizer(text, add_special_tokens=not chat, truncation=True, max_length=max_length)["input_ids"]
    if len(ids) <= added:
        raise DataError(f"{where}: the text tokenizes to zero tokens; remove this sample")
    return _tokens(Sample(where, {"input_ids": ids}))


def _join(sample: Sample) -> str:
    for key, value in sample.values.items():
        if not isinstance(value, str):
            raise DataError(f"{sample.where}, {key}: found {type(value).__name__}; expected a string")
    return "".join(sample.values.values())


def _render(sample: Sample, tokenizer: Any) -> str:
    where, messages = sample.where, sample.values["messages"]
    if not (
        isinstance(messages, list)
        and messages
        and all(isinstance(message, dict) and {"role", "content"} <= {*message} for message in messages)
    ):
        raise DataError(f"{where}, messages: found {messages!r:.80}; expected a list of role and content objects")
    # A template is a program of the checkpoint's: it may refuse a role, or fail in any other way.
    with _blame(f"{where}: the chat template of {tokenizer.name_or_path} rejects the messages"):
        return tokenizer.apply_chat_template(messages, tokenize=False)


def _process_image(sample: Sample, processor: Any) -> Sample:
    from PIL import Image

    file = sample.values["image"]
    with _blame(f"{sample.where}: cannot be read as an image; replace or remove it"):
        if isinstance(file, dict):  # a dataset's cell
            file = file["path"] if file["bytes"] is None else BytesIO(file["bytes"])
        with Image.open(file) as image:
            pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    return Sample(sample.where, {"pixel_values": pixels[0]})


def _load_tokenizer(source: object, folders: Sequence[Path], *, chat: bool) -> Any:
    from transformers import AutoTokenizer

    for folder in map(Path, folders):
        if any((folder / name).is_file() for name in VOCABULARIES):
            tokenizer = _from_pretrained(AutoTokenizer, folder, truncation_side="right")
            if tokenizer.chat_template or not chat:
                return tokenizer
    needed = "tokenizer with a chat template" if chat else "tokenizer"
    raise DataError(f"{source}: found no {needed} in {_list(folders)}; copy its files into one of them")


def _load_image_processor(source: object, folders: Sequence[Path]) -> Any:
    _optional("PIL", "pillow", source)
    # Not from transformers itself: what 5.17 exports there demands torchvision, while the class does not.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    for folder in map(Path, folders):
        nested = folder / "processor_config.json"  # where a processor of texts and images is saved since v5
        if (folder / "preprocessor_config.json").is_file() or (
            nested.is_file() and "image_processor" in nested.read_text(encoding="utf-8")
        ):
            return _from_pretrained(AutoImageProcessor, folder)
    raise DataError(
        f"{source}: found no image processor in {_list(folders)}; copy the checkpoint's "
        "preprocessor_config.json into one of them"
    )


def _from_pretrained(auto_class: Any, folder: Path, **options: str) -> Any:
    with _blame(f"{folder}: {auto_class.__name__} cannot load it; repair its files"):
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)


# Tensors -> checked batches


def _check(sample: Sample, max_positions: int | None, vocab_size: int | None) -> None:
    for name, value in sample.values.items():
        where = f"{sample.where}, {name}"
        if name.endswith("input_ids"):
            _check_token_ids(value, where, max_positions, vocab_size)
        elif name == "labels" and value.ndim == 1 and not value.is_floating_point():
            if not (value != -100).any():
                raise DataError(f"{where}: found no target, expected at least one token; remove this sample")
            _check_token_ids(value[value != -100], where, max_positions, vocab_size)
        elif name.endswith("attention_mask"):
            ids = sample.values.get(name.replace("attention_mask", "input_ids"), value)
            if value.shape != ids.shape:
                raise DataError(f"{where}: found shape {[*value.shape]}, expected {[*ids.shape]} as the token ids")
            if not value.any():
                raise DataError(f"{where}: found only zeros, expected 1 for at least one token; remove this sample")
            if not ((value == 0) | (value == 1)).all():
                raise DataError(f"{where}: found other values than 0 and 1; expected 1 for tokens, 0 for padding")
        elif value.is_floating_point() and not is_finite(value):
            raise DataError(f"{where}: found values that are not finite; remove this sample")


def _check_token_ids(ids: torch.Tensor, where: str, max_positions: int | None, vocab_size: int | None) -> None:
    if ids.is_floating_point() or ids.ndim != 1 or not len(ids):
        raise DataError(f"{where}: found {ids.dtype} of shape {[*ids.shape]}, expected one or more integers")
    if max_positions is not None and len(ids) > max_positions:
        raise DataError(f"{where}: found {len(ids)} tokens, expected at most {max_positions}; shorten the samples")
    for token in map(int, ids.aminmax()):
        if token < 0 or (vocab_size is not None and token >= vocab_size):
            limit = "0 or more" if vocab_size is None else f"0 to {vocab_size - 1} (vocabulary of {vocab_size})"
            raise DataError(f"{where}: found token id {token}, expected {limit}; use the model's own tokenizer")


def _rows_within(samples: Sequence[Sample], tokens: int) -> int:
    """How many of the first samples have no more than `tokens` positions, all as long as the longest; at least one."""
    longest = 0
    for count, sample in enumerate(samples):
        longest = max(longest, *map(len, sample.values.values()))
        if (count + 1) * longest > tokens:
            return max(1, count)
    return len(samples)


def _collate(samples: Sequence[Sample], padding: int) -> dict[str, torch.Tensor]:
    """Stack samples to a batch; token ids are padded with `padding`, masks with 0, both on the right."""
    batch = {}
    for name, first in samples[0].values.items():
        rows = [sample.values[name] for sample in samples]
        odd = next((sample for sample in samples if sample.values[name].shape != first.shape), None)
        if odd is None:
            batch[name] = torch.stack(rows)
        elif name in ("input_ids", "attention_mask", "labels"):
            value = {"input_ids": padding, "attention_mask": 0, "labels": -100}[name]
            batch[name] = pad_sequence(rows, batch_first=True, padding_value=value)
        else:
            found, expected = [*odd.values[name].shape], [*first.shape]
            raise DataError(
                f"{odd.where}, {name}: found shape {found}, expected {expected} as in {samples[0].where}; "
                "give samples of one size, or batches of one"
            )
    return batch


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.is_floating_point() else tensor.long()


def _list(names: Iterable[object]) -> str:
    return ", ".join(map(str, names)) or "nothing"


def _optional(module: str, package: str, source: object) -> Any:
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
            f"{source}: cannot be read: {error.strerror or error}; check the file and its rights"
        ) from error


@contextmanager
def _blame(message: str) -> Iterator[None]:
    """Turn whatever a library raises on a user's file into a DataError that begins with `message`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{message} ({type(error).__name__}: {error})") from error
