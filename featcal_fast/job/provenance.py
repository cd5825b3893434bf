"""What a run was made of, for its report: files by size, time and hash, and the data by its content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from featcal_fast import files
from featcal_fast.checkpoints import (
    BitsAndBytesCheckpoint,
    Fp8Checkpoint,
    GgufExpert,
    LoraExpert,
    TensorSource,
    leads_out,
    read_header,
    unwrapped,
)
from featcal_fast.checkpoints.nested import model_folder
from featcal_fast.inputs.models import RecipeModels
from featcal_fast.inputs.recipe import Recipe
from featcal_fast.inputs.task_data import TaskData
from featcal_fast.job.fingerprint import Facts, data_label, read_models
from featcal_fast.reporting.inputs import DataInput, InputFile, Inputs, ModelInput

# Hashed, if it lies beside a model's config: what the model is described by, and its vocabulary.
DOCUMENTS = {".json", ".jinja", ".model", ".spm", ".tiktoken", ".codes", ".txt", ".yml"}
LARGEST = 2**26  # bytes of one
WEIGHTS = ".safetensors"
PIECE = 2**22  # bytes that are hashed at a time
SHA256 = re.compile("[0-9a-f]{64}")
FORMS: dict[type, str] = {
    LoraExpert: "lora",
    BitsAndBytesCheckpoint: "bitsandbytes",
    Fp8Checkpoint: "fp8",
    GgufExpert: "gguf",
}


def describe_inputs(
    recipe: Recipe, models: RecipeModels, facts: Facts, sizes: Mapping[str, TaskData], read: Mapping[str, Sequence[Any]]
) -> Inputs:
    """What was read, at the end of a run.

    Weights are not hashed, but for an adapter's: that takes longer than reading them does. A file that cannot be read
    has no hash; nobody needed it.

    Args:
        recipe: the job.
        models: its models.
        facts: the job's fingerprint, which has sizes and times of all files.
        sizes: of each task's data.
        read: of each task the SHA-256 of its batches, their number, samples, and those that are held out.
    """
    found = Inputs()
    if recipe.merge is not None:
        found.models[models.merged.label] = ModelInput(None, "merge")
    references = {models.merged.label: recipe.merged_model, models.base.label: recipe.base_model}
    references |= {models.experts[task].label: expert.model for task, expert in recipe.experts.items()}
    for source, of in read_models(models):
        found.models[source.label] = _model(source, references[of.label], facts["inputs"][source.label])
    for task in recipe.experts:
        digest, batches, samples, held_out = read[task]
        lies_in = facts["inputs"].get(data_label(task), {})
        found.data[task] = DataInput(
            reference=recipe.experts[task].data,
            samples_asked=sizes[task].asked,
            samples=samples,
            held_out=held_out,
            batches=batches,
            sha256=digest,
            max_length=sizes[task].max_length,
            left_out=dict(sizes[task].left_out),
            files=len(lies_in),
            bytes=sum(size for size, _ in lies_in.values()),
        )
    return found


def _model(source: TensorSource, reference: str | None, facts: Mapping[str, list[int]]) -> ModelInput:
    inner = unwrapped(source)
    form = FORMS.get(type(inner), "checkpoint")
    path = inner.path
    found = ModelInput(reference, form, path.name if path.parent.name == "snapshots" else None)
    weights = set(inner.shards.files) if isinstance(inner, LoraExpert) else set()
    for name, (size, time) in facts.items():
        own = name.removeprefix(f"{path.name}/")
        found.files[own] = file = InputFile(size, time)
        document = Path(own).suffix in DOCUMENTS and size <= LARGEST
        with suppress(OSError):
            _hash(file, path / own, path, whole=document or own in weights)
    return found


def _hash(file: InputFile, path: Path, folder: Path, *, whole: bool) -> None:
    """Fill in what `file` is to know of the content of what lies at `path`."""
    if path.suffix not in {*DOCUMENTS, WEIGHTS} or path.parent not in (folder, model_folder(folder)):
        return
    if path.is_symlink():
        if leads_out(path, folder):
            return
        stored = files.resolve(path)
        if stored.parent.name == "blobs" and SHA256.fullmatch(stored.name):
            file.hub_sha256 = stored.name
    with closing(files.open_to_read(path)) as opened:
        if path.suffix == WEIGHTS:
            with suppress(ValueError):  # none of the model's
                file.header_sha256 = hashlib.sha256(read_header(opened, file.bytes)).hexdigest()
        if whole:
            file.sha256 = sha256(opened, file.bytes)


def sha256(opened: FileIO, size: int) -> str:
    """Of a file's first `size` bytes."""
    digest, done, memory = hashlib.sha256(), 0, memoryview(bytearray(min(PIECE, size)))
    while done < size and (count := files.read_into(opened, memory[: size - done], done)):
        digest.update(memory[:count])
        done += count
    return digest.hexdigest()
