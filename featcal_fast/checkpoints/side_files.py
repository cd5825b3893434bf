"""What a model's folder holds beside the weights that are read: what goes with the model, and what is left out."""

from __future__ import annotations

import stat
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from featcal_fast import files
from featcal_fast.checkpoints.documents import is_file_name, leads_out, read_errors
from featcal_fast.checkpoints.shards import Shards
from featcal_fast.errors import CheckpointError, shown

MOST = 10_000  # files and folders beside the weights
CARD = "README.md"  # what a model says of itself; what is made of it says something else
REPORT = "report.json"  # of the run that wrote a folder; what is made of it gets its own
# What ends in one of these holds weights, or a graph that is of no use without them. In a model's root they are the
# model's own; in a subfolder they are those of another module, but for EXPORTS.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".npz", ".ot", ".pdparams", ".index.json"),
    *(".onnx", ".onnx_data", ".onnx.data", ".ort", ".xml", ".pb", ".tflite", ".pte", ".engine", ".gguf", ".ggml"),
    *(".mlmodel", ".mlpackage", ".mlmodelc"),
)
# Folders of the root that hold the whole model in another form.
EXPORTS = {
    *("original", "onnx", "openvino", "tensorrt", "executorch", "tflite", "coreml", "metal", "mlx", "gguf", "ggml"),
    *("flax", "jax", "tf", "tensorflow", "saved_model", "rust"),
}


@dataclass
class SideFiles:
    """The files beside the weights.

    Attributes:
        files: what goes with the model, by POSIX path relative to its folder.
        left_out: paths of what holds the same weights in another form, files or bundles.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def find_side_files(shards: Shards) -> SideFiles:
    """Go through a model's folder. Hidden files are caches and version control, never part of a model.

    Args:
        shards: the weights that are read.

    Raises:
        CheckpointError: something that would have to go with the model is unreadable, no file, or a link out of the
            folder.
    """
    root, label, found = shards.path, shards.label, SideFiles()
    inner = PurePath(shards.index).parent  # of the folder of the weights
    replaced = {*shards.files, shards.index, REPORT}
    with read_errors(label, root):
        waiting = [(path, False) for path in reversed(files.list_folder(root))]
    seen = 0
    while waiting:
        path, followed = waiting.pop()  # and whether a link led to it
        name = path.relative_to(root)
        if name.name.startswith(".") or name.as_posix() in replaced:
            continue
        if (seen := seen + 1) > MOST:
            raise CheckpointError(
                f"{label}: {root} holds more than {MOST} files beside the weights; expected a model's folder"
            )
        if not is_file_name(name.name):
            raise CheckpointError(
                f"{label}: {root}: the name {shown(name.as_posix())} holds control characters, or is not UTF-8; rename "
                "or remove it"
            )
        if _holds_weights(name) or (inner.parts and inner in name.parents and _holds_weights(name.relative_to(inner))):
            found.left_out.append(name.as_posix())
            continue
        with read_errors(label, path):
            mode = files.stat(path).st_mode
            linked = path.is_symlink()
            if (linked or followed) and leads_out(path, root):
                raise CheckpointError(
                    f"{label}: {path} is a link to {path.resolve()}, outside of the model folder; put a copy there"
                )
            if stat.S_ISREG(mode):
                with closing(files.open_to_read(path)):
                    found.files[name.as_posix()] = path
            elif stat.S_ISDIR(mode) and name.as_posix() == CARD:
                raise CheckpointError(f"{label}: {path} is a folder, expected a file, the model's card; rename it")
            elif stat.S_ISDIR(mode):
                if linked and followed:
                    raise CheckpointError(
                        f"{label}: {path} is a link to a folder, come to by another one: such may have no end; put a "
                        "copy there"
                    )
                waiting += [(each, linked or followed) for each in reversed(files.list_folder(path))]
            else:
                raise CheckpointError(f"{label}: {path} is neither a file nor a folder; remove it")
    return found


def _holds_weights(name: PurePath) -> bool:
    parts = name.parts if name.parts[0].lower() in EXPORTS else name.parts[:1]
    return any(part.lower().endswith(WEIGHT_SUFFIXES) for part in parts)
