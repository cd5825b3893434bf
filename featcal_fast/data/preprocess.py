"""A checkpoint's own tokenizer and image processor: found, their files looked at, and loaded without code of theirs."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcal_fast import files
from featcal_fast.checkpoints import leads_out
from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.data.samples import import_optional, listed, os_errors
from featcal_fast.errors import DataError, shown, told
from featcal_fast.untrusted.documents import DocumentError, parse_json

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json"),
    *("sentencepiece.bpe.model", "sentencepiece.model", "spm.model"),
)
PROCESSOR, NESTED_PROCESSOR = "preprocessor_config.json", "processor_config.json"
# What transformers may read beside them, by how files of the kind end, and how large one of them may be, in bytes.
LARGEST = {**dict.fromkeys((".json", ".txt", ".model", ".spm", ".tiktoken", ".codes"), 2**27), ".jinja": 2**20}
RESAMPLINGS = [0, 1, 2, 3, 4, 5]  # Pillow's; transformers takes another one without a word
CONFIGS = {
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *(PROCESSOR, NESTED_PROCESSOR),
}


def find_tokenizer(folders: Iterable[Path]) -> Path | None:
    """The first folder that has one, or a folder in it, where the model is; see `model_folder`."""
    for folder in map(model_folder, folders):
        with os_errors(folder):
            if any((folder / name).exists() for name in VOCABULARIES):  # what is no file is refused, not passed over
                return folder
    return None


def load_tokenizer(folder: Path) -> Any:
    """A folder's.

    Its files are a stranger's, and reading them may take any time: to be called in a process of its own.

    Raises:
        DataError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with os_errors(folder):
        _check_files(folder)
    return _from_pretrained(AutoTokenizer, folder, truncation_side="right")


def load_any_tokenizer(folder: Path) -> Any:
    """A folder's, also where transformers has not its class: then what its `tokenizer.json` holds, if there is one.

    As `load_tokenizer`.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        return load_tokenizer(folder)
    except DataError:
        with os_errors(folder):
            _check_files(folder)
        if not (path := folder / "tokenizer.json").is_file():
            raise
        with suppress(Exception):  # what was wrong at first says more
            return PreTrainedTokenizerFast(tokenizer_file=str(path), truncation_side="right", name_or_path=str(folder))
        raise


def find_image_processor(source: object, folders: Sequence[Path]) -> Path:
    """The first folder that has one, or a folder in it, likewise.

    Raises:
        DataError: there is none, or a library is missing.
    """
    import_optional("PIL", "pillow", source)
    from transformers.models.auto import image_processing_auto  # noqa: F401 (now: this process may be copied often)

    for folder in map(model_folder, folders):
        nested = folder / NESTED_PROCESSOR  # where a processor of texts and images is saved since v5
        with os_errors(nested):
            if (folder / PROCESSOR).is_file() or (nested.is_file() and b"image_processor" in files.read_bytes(nested)):
                _check_files(folder)
                return folder
    raise DataError(
        f"{source}: found no image processor in {listed(folders)}; copy the checkpoint's {PROCESSOR} into one of them"
    )


def load_image_processor(folder: Path) -> Any:
    """A folder's, whose files are a stranger's: to be called in a process of its own.

    Raises:
        DataError: it cannot be loaded.
    """
    # Not from transformers itself: what 5.17 exports there demands torchvision, while the class does not.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return _from_pretrained(AutoImageProcessor, folder)


def _from_pretrained(auto_class: Any, folder: Path, **options: str) -> Any:
    try:
        return auto_class.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:
        problem = told(error)
        if "trust_remote_code" in str(error):  # which is advice that nobody should take
            problem = "it needs code of its own, which is never run; expected a class that transformers has"
        raise DataError(f"{folder}: {auto_class.__name__} cannot load it; repair its files ({problem})") from None


def _check_files(folder: Path) -> None:
    """Raises:
    DataError: a file that a library may read is none, too large, outside of the folder, or a config that is no JSON."""
    for path in _side_files(folder):
        found = files.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"{path}: it is not a regular file; copy the checkpoint again")
        if leads_out(path, folder):
            raise DataError(f"{path}: it is a link to {path.resolve()}, outside of the model folder; expected a file")
        if found.st_size > (largest := LARGEST[path.suffix]):
            raise DataError(
                f"{path}: found {found.st_size} bytes, expected at most {largest}; copy the checkpoint again"
            )
        if path.name in CONFIGS or path.suffix == ".jinja":
            _check_text(path)


def _check_text(path: Path) -> None:
    """Raises:
    DataError: a config is no JSON object, or a template no text."""
    data = files.read_bytes(path)
    try:
        content = parse_json(data) if path.name in CONFIGS else {"template": data.decode()}
    except (DocumentError, UnicodeDecodeError) as error:
        kind = "valid JSON" if path.name in CONFIGS else "a chat template in UTF-8"
        raise DataError(f"{path}: it is not {kind}: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: found a JSON {type(content).__name__}, expected an object; copy it again")
    nested = content.get("image_processor")
    for config in (content, nested if isinstance(nested, dict) else {}):
        if (resample := config.get("resample")) is not None and resample not in RESAMPLINGS:
            raise DataError(f"{path}: found resample {shown(resample)}, expected one of {RESAMPLINGS}; copy it again")


def _side_files(folder: Path) -> Iterator[Path]:
    """What a library may read, of those that are there."""
    more = folder / "additional_chat_templates"
    for place in (folder, more) if more.is_dir() else (folder,):
        for path in files.list_folder(place):
            if path.suffix in LARGEST and path.exists() and not path.is_dir():
                yield path
