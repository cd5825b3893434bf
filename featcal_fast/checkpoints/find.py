"""From what a recipe names, a folder or a hub id, to the source that reads it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from featcal_fast import files
from featcal_fast.checkpoints.adapter import WEIGHTS, LoraExpert
from featcal_fast.checkpoints.bnb import BitsAndBytesCheckpoint
from featcal_fast.checkpoints.documents import read_errors
from featcal_fast.checkpoints.fp8 import Fp8Checkpoint
from featcal_fast.checkpoints.gguf import GgufExpert
from featcal_fast.checkpoints.gguf_file import find_files
from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.checkpoints.quantised import FOREIGN
from featcal_fast.checkpoints.reader import ADAPTER_CONFIG, Checkpoint, TensorSource, quant_method, read_json
from featcal_fast.checkpoints.shards import INDEX, SINGLE
from featcal_fast.errors import CheckpointError, UnsupportedModelError, shown

GGUF = ".gguf"
REFERENCE = 1024  # bytes of the file that names a commit
# Of a model of the hub; `*` stands for folders too. Pickled are modules beside the model, which are copied, not opened.
FILES = ["*.safetensors", "*.json", "*.model", "*.spm", "*.tiktoken", "*.txt", "*.md", "*.yml", "*.jinja"]
FILES += ["*/pytorch_model.bin"]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
SIGNS = 16  # plus signs of a reference that are looked at
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")  # names of a branch, a tag or a commit; none leads out of its folder


def find_checkpoint(reference: str, root: Path, label: str) -> Checkpoint:
    """The full checkpoint that a recipe names, in floating point or quantised in a way that is read.

    Args:
        reference: a folder, relative to `root`; the folder of a model in the hub's cache, or `folder@revision` of it;
            or a hub id `org/name` or `org/name@revision`, from the cache where that has it.
        root: what relative paths start from.
        label: what to call it in errors.

    Raises:
        CheckpointError: no such folder, and no such model in the hub or its local cache.
        UnsupportedModelError: a model with a LoRA adapter, `model+adapter`.
    """
    if split_reference(reference, lambda part: _is_model(part, root, label))[1] is not None:
        raise UnsupportedModelError(
            f"{label}: {shown(reference)} is a model with a LoRA adapter, expected a full checkpoint: only experts may "
            "have adapters; merge it into its model first (peft: merge_and_unload, save_pretrained)"
        )
    return open_checkpoint(find_folder(reference, root, label), label)


def find_expert(reference: str, root: Path, label: str, base: Checkpoint) -> TensorSource:
    """The expert that a recipe names: a full checkpoint, quantised or not, a LoRA adapter, or a GGUF file.

    Args:
        reference: as `find_checkpoint` has it; the folder or hub id of an adapter of `base`; `model+adapter`, where it
            is another model's; or a GGUF file, or the folder of one.
        root: what relative paths start from.
        label: what to call it in errors.
        base: the base model.

    Raises:
        CheckpointError: as `find_checkpoint`.
        UnsupportedModelError: another kind of adapter or quantisation.
        ModelMismatchError: an adapter of another model.
    """
    model, adapter = split_reference(reference, lambda part: _is_model(part, root, label))
    path = find_folder(model, root, label)
    if adapter is not None:
        with read_errors(label, path):
            same = files.resolve(path) == files.resolve(base.path)
        if not same:
            base = open_checkpoint(path, f"{label}, base model")
        return LoraExpert(_adapter_folder(adapter, root, label), label, base)
    if _is_adapter(inner := model_folder(path, label), label):
        return LoraExpert(inner, label, base)
    if _is_gguf(path, label):
        return GgufExpert(path, label, base)
    return open_checkpoint(path, label)


def open_checkpoint(path: Path, label: str) -> Checkpoint:
    """A folder with `config.json` and weights, by what that says of their form.

    Raises:
        CheckpointError: as `Checkpoint`.
        UnsupportedModelError: as `Checkpoint`, or another quantisation.
    """
    if _is_gguf(path, label):
        raise UnsupportedModelError(f"{label}: {_no_full_checkpoint(find_files(path, label)[0])}")
    folder = model_folder(path, label)
    method = quant_method(read_json(folder, "config.json", label))
    with read_errors(label, path):
        aside = method is None and any((folder / name).is_file() for name in FOREIGN)
    if aside or method in Fp8Checkpoint.methods:
        return Fp8Checkpoint(path, label)
    if method in BitsAndBytesCheckpoint.methods:
        return BitsAndBytesCheckpoint(path, label)
    return Checkpoint(path, label)


def split_reference(reference: str, is_model: Callable[[str], bool]) -> tuple[str, str | None]:
    """A model and the LoRA adapter on it, as mergekit writes them: `model[@revision][+adapter[@revision]]`.

    Args:
        reference: of which a path may hold plus signs, too: where the whole is a model, it is that; else a sign parts
            two models, or at least has one before it.
        is_model: whether a part names something that is there, or may be on the hub.

    Returns:
        Both; the whole and None where it names no adapter.
    """
    signs = [place for place, each in enumerate(reference) if each == "+" and 0 < place < len(reference) - 1]
    pairs: list[tuple[str, str | None]] = [(reference[:place], reference[place + 1 :]) for place in signs[:SIGNS]]
    if not pairs or is_model(reference):
        return reference, None
    first = [pair for pair in pairs if is_model(pair[0])]
    both = [pair for pair in first if pair[1] and is_model(pair[1])]
    return (both or first or [(reference, None)])[0]


def split_revision(reference: str) -> tuple[str, str]:
    """A model without an adapter and its revision, which is empty where it names none: `model[@revision]`."""
    name, _, revision = reference.rpartition("@")
    return (name, revision) if name and REVISION.fullmatch(revision) else (reference, "")


def find_folder(reference: str, root: Path, label: str) -> Path:
    """The folder of the model that a recipe names; it need not exist where a path is named."""
    path = _local(reference, root, label)
    with read_errors(label, path):
        if is_cache(path):
            return _snapshot(path, label)
        if path.exists():
            return path
        name, revision = split_revision(reference)
        folder = _local(name, root, label)
        if is_cache(folder):
            return _snapshot(folder, label, revision)
        if folder.exists():
            raise CheckpointError(
                f"{label}: {shown(reference)} names the revision {shown(revision)}, but {folder} is a folder, which "
                "has none; leave the revision out, or name the folder otherwise than the hub's model"
            )
        if not HUB_ID.fullmatch(reference):
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


def is_cache(path: Path) -> bool:
    """Whether a folder is that of a model in the hub's cache."""
    return (path / "snapshots").is_dir() and not (path / "config.json").is_file()


def _snapshot(path: Path, label: str, revision: str = "") -> Path:
    """A snapshot in a model's folder in the hub's cache: of a revision, or else that of `main`, or the only one."""
    ref = path / "refs" / (revision or "main")
    inner = files.list_folder(path / "snapshots")
    found = [folder.name for folder in inner if folder.is_dir() and not folder.is_symlink()]
    name = files.read_bytes(ref, REFERENCE).decode(errors="replace").strip() if ref.is_file() else revision
    if name not in found:
        if revision:
            raise CheckpointError(f"{label}: {path} holds no revision {shown(revision)}; expected one of its snapshots")
        if len(found) != 1:
            raise CheckpointError(
                f"{label}: {path} holds {len(found)} snapshots and no ref main; name one of them, "
                f"{path / 'snapshots'}/..."
            )
        name = found[0]
    return path / "snapshots" / str(name)


def _is_gguf(path: Path, label: str) -> bool:
    """Whether it is a GGUF file, or a folder whose only weights are such."""
    with read_errors(label, path):
        if path.suffix == GGUF and not path.is_dir():
            if not path.is_file():
                raise CheckpointError(
                    f"{label}: {path}: there is no such file; expected a GGUF file, or a model folder"
                )
            return True
        if not path.is_dir() or any((path / name).is_file() for name in (SINGLE, INDEX)):
            return False
        return any(each.suffix == GGUF for each in files.list_folder(path))


def _no_full_checkpoint(file: Path) -> str:
    """What to do with a GGUF file that is to be a full checkpoint, in the words of the transformers that is here."""
    import transformers

    where = f'"{file.parent}", gguf_file="{file.name}"'
    # Newer ones leave weights packed unless told otherwise, and then cannot save them.
    packed = hasattr(transformers, "GgufConfig")
    unpack = ", quantization_config=GgufConfig(dequantize=True)" if packed else ""
    rounded = ', dtype="bfloat16"'  # as models are; they make float32 of it by themselves
    return (
        f"{file} is a GGUF file, which has no config and no tokenizer that others can read; expected a full "
        "checkpoint: only experts may be GGUF files; convert it first, with transformers' "
        f"AutoModelForCausalLM.from_pretrained({where}{rounded}{unpack}).save_pretrained(a new folder) and "
        f"AutoTokenizer.from_pretrained({where}).save_pretrained(the same), and name that folder here"
    )


def _is_adapter(path: Path, label: str) -> bool:
    with read_errors(label, path):
        # Some trainers put the base's config.json beside an adapter.
        plain = (path / "config.json").is_file() and not (path / WEIGHTS).is_file()
        return (path / ADAPTER_CONFIG).is_file() and not plain


def _adapter_folder(reference: str, root: Path, label: str) -> Path:
    path = find_folder(reference, root, label)
    with read_errors(label, path):
        if path.is_dir() and not (path / ADAPTER_CONFIG).is_file():
            raise CheckpointError(
                f"{label}: {path}, behind the `+`, is no LoRA adapter: {ADAPTER_CONFIG} is missing; expected "
                "model+adapter"
            )
    return path


def _is_model(reference: str, root: Path, label: str) -> bool:
    """Whether a reference without an adapter names what is there, or what may be on the hub."""
    paths = [_local(name, root, label) for name in (reference, split_revision(reference)[0])]
    with read_errors(label, paths[0]):
        return any(path.exists() for path in paths) or HUB_ID.fullmatch(reference) is not None


def _local(text: str, root: Path, label: str) -> Path:
    try:
        return root / Path(text).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{label}: {shown(text)} names no home that is there; write the path out") from error
