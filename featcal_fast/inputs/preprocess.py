"""Texts and images to tensors, by a checkpoint's own tokenizer, chat template and image processor."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from featcal_fast import files
from featcal_fast.errors import DataError
from featcal_fast.inputs.samples import Sample, as_data_error, as_tokens, import_optional, listed, os_errors

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def tokenize(sample: Sample, tokenizer: Any, max_length: int, targets: bool) -> Sample:
    where, values = sample
    if targets:
        if "completion" not in values:
            raise DataError(f"{where}: found {listed(values)}; expected prompt and completion, for the model's decoder")
        prompt, completion = (Sample(where, {"text": values[key]}) for key in ("prompt", "completion"))
        given = tokenize(prompt, tokenizer, max_length, targets=False)
        labels = tokenize(completion, tokenizer, max_length, targets=False).values["input_ids"]
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
    with as_data_error(f"{where}: cannot be tokenized"):
        ids = tokenizer(text, add_special_tokens=not chat, truncation=True, max_length=max_length)["input_ids"]
    if len(ids) <= added:
        raise DataError(f"{where}: the text tokenizes to zero tokens; remove this sample")
    return as_tokens(Sample(where, {"input_ids": ids}))


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
    with as_data_error(f"{where}: the chat template of {tokenizer.name_or_path} rejects the messages"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


def process_image(sample: Sample, processor: Any) -> Sample:
    from PIL import Image

    data = sample.values["image"]
    if isinstance(data, dict):  # a dataset's cell
        data = Path(data["path"]) if data["bytes"] is None else data["bytes"]
    if isinstance(data, Path):
        with os_errors(sample.where):
            data = files.read_bytes(data)
    error = f"{sample.where}: cannot be read as an image; replace or remove it"
    with as_data_error(error), Image.open(BytesIO(data)) as image:
        pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
    return Sample(sample.where, {"pixel_values": pixels[0]})


def load_tokenizer(source: object, folders: Sequence[Path], *, chat: bool) -> Any:
    from transformers import AutoTokenizer

    for folder in map(Path, folders):
        with os_errors(folder):
            found = any((folder / name).is_file() for name in VOCABULARIES)
        if found:
            tokenizer = _from_pretrained(AutoTokenizer, folder, truncation_side="right")
            if tokenizer.chat_template or not chat:
                return tokenizer
    needed = "tokenizer with a chat template" if chat else "tokenizer"
    raise DataError(f"{source}: found no {needed} in {listed(folders)}; copy its files into one of them")


def load_image_processor(source: object, folders: Sequence[Path]) -> Any:
    import_optional("PIL", "pillow", source)
    # Not from transformers itself: what 5.17 exports there demands torchvision, while the class does not.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    for folder in map(Path, folders):
        nested = folder / "processor_config.json"  # where a processor of texts and images is saved since v5
        with os_errors(nested):
            found = (folder / "preprocessor_config.json").is_file() or (
                nested.is_file() and b"image_processor" in files.read_bytes(nested)
            )
        if found:
            return _from_pretrained(AutoImageProcessor, folder)
    raise DataError(
        f"{source}: found no image processor in {listed(folders)}; copy the checkpoint's "
        "preprocessor_config.json into one of them"
    )


def _from_pretrained(auto_class: Any, folder: Path, **options: str) -> Any:
    with as_data_error(f"{folder}: {auto_class.__name__} cannot load it; repair its files"):
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
