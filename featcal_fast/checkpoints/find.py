"""From what a recipe names, a folder or a hub id, to the source that reads it."""

from __future__ import annotations

import re
from pathlib import Path

from featcal_fast import files
from featcal_fast.checkpoints.adapter import WEIGHTS, LoraExpert
from featcal_fast.checkpoints.documents import read_errors
from featcal_fast.checkpoints.quantised import BitsAndBytesCheckpoint
from featcal_fast.checkpoints.reader import ADAPTER_CONFIG, Checkpoint, TensorSource, quant_method, read_json
from featcal_fast.errors import CheckpointError, shown

REFERENCE = 1024  # bytes of the file that names a commit
# Of a model of the hub; `*` stands for folders too. Pickled are modules beside the model, which are copied, not opened.
FILES = ["*.safetensors", "*.json", "*.model", "*.spm", "*.tiktoken", "*.txt", "*.md", "*.jinja", "*/pytorch_model.bin"]


def find_checkpoint(reference: str, root: Path, label: str) -> Checkpoint:
    """The full checkpoint that a recipe names.

    Args:
        reference: a folder, relative to `root`; the folder of a model in the hub's cache; or a hub id `org/name` or
            `org/name@revision`, from the cache where that has it.
        root: what relative paths start from.
        label: what to call it in errors.

    Raises:
        CheckpointError: no such folder, and no such model in the hub or its local cache.
    """
    return Checkpoint(find_folder(reference, root, label), label)


def find_expert(reference: str, root: Path, label: str, base: Checkpoint) -> TensorSource:
    """The expert that a recipe names: a full checkpoint, one quantised by bitsandbytes, or a LoRA adapter of `base`.

    Raises:
        CheckpointError: as `find_checkpoint`.
        UnsupportedModelError: another kind of adapter or quantisation.
        ModelMismatchError: an adapter of another base model.
    """
    path = find_folder(reference, root, label)
    with read_errors(label, path):
        # Some trainers put the base's config.json beside an adapter.
        plain = (path / "config.json").is_file() and not (path / WEIGHTS).is_file()
        adapter = (path / ADAPTER_CONFIG).is_file() and not plain
    if adapter:
        return LoraExpert(path, label, base)
    if quant_method(read_json(path, "config.json", label)) == BitsAndBytesCheckpoint.quantisation:
        return BitsAndBytesCheckpoint(path, label)
    return Checkpoint(path, label)


def find_folder(reference: str, root: Path, label: str) -> Path:
    """The folder of the model that a recipe names; it need not exist where a path is named."""
    path = root / Path(reference).expanduser()
    with read_errors(label, path):
        if (path / "snapshots").is_dir() and not (path / "config.json").is_file():
            return _snapshot(path, label)
        if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", reference):
            return path
    repo, _, revision = reference.partition("@")
    if ".." in revision:
        raise CheckpointError(f"{label}: {shown(reference)}: found the revision {shown(revision)}, expected no `..`")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=FILES))
    except Exception as error:  # the hub client has many ways to fail, all of them final here
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CheckpointError(
            f"{label}: {shown(reference)} is neither a folder ({path}) nor a model that could be had from the hub: "
            f"{reason[:500]}"
        ) from error


def _snapshot(path: Path, label: str) -> Path:
    """The snapshot that a model's folder in the hub's cache stands for: that of `main`, or the only one."""
    main = path / "refs" / "main"
    inner = files.list_folder(path / "snapshots")
    found = [folder.name for folder in inner if folder.is_dir() and not folder.is_symlink()]
    name = files.read_bytes(main, REFERENCE).decode(errors="replace").strip() if main.is_file() else None
    if name not in found:
        if len(found) != 1:
            raise CheckpointError(
                f"{label}: {path} holds {len(found)} snapshots and no ref main; name one of them, "
                f"{path / 'snapshots'}/..."
            )
        name = found[0]
    return path / "snapshots" / str(name)
