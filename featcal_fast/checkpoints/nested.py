"""Folders of sentence-transformers, of which the transformer is one module among several.

Old ones have its config, weights and tokenizer in a folder in theirs, mostly `0_Transformer`, which `modules.json`
names as a path; in new ones that path is empty, and the folder is a model's as any other.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from featcal_fast.checkpoints.documents import is_file_name, leads_out, read_document, read_errors
from featcal_fast.errors import CheckpointError, UnsupportedModelError, shown

MODULES = "modules.json"
CONFIG, ADAPTER = CONFIGS = ("config.json", "adapter_config.json")
LARGEST = 2**20  # bytes of a list of modules
MOST = 100  # modules
DEEPEST = 4  # folders of a module's path


def model_folder(path: Path, label: str = "model") -> Path:
    """The folder that holds a model's config, weights and tokenizer: `path` itself, or one in it; see `module_path`."""
    return path / module_path(path, label)


def module_path(path: Path, label: str) -> str:
    """Where in a model's folder its transformer is: empty but for an old folder of sentence-transformers.

    Args:
        path: the folder; it need not be there.
        label: what to call it in errors.

    Raises:
        CheckpointError: `modules.json` is none, or leads out of the folder.
        UnsupportedModelError: none of the modules that it names is a transformer, or several are.
    """
    with read_errors(label, path):
        whole = any((path / name).is_file() for name in CONFIGS)  # a model, whatever a list beside it says
        if not (path / MODULES).is_file():
            return ""
        try:
            found = _transformers(path, label)
        except CheckpointError:
            if whole:
                return ""
            raise
        if whole and (not found or "" in found):
            return ""
        where = f"{label}: {path / MODULES}"
        if whole or len(found) != 1:
            count = "another one beside it" if whole else f"{len(found)}"
            raise UnsupportedModelError(
                f"{where}: found {count} among its modules ({shown(found)}), expected one transformer, a folder with "
                "its config.json and safetensors; name the folder of the one that is meant as the model"
            )
        return found[0]


def _transformers(path: Path, label: str) -> list[str]:
    """Modules that are models: layers that are put on top have no config, or one that names no kind of model."""
    where, modules = f"{label}: {path / MODULES}", read_document(path / MODULES, label, LARGEST)
    listed = modules if isinstance(modules, list) else []
    named = [each.get("path") for each in listed if isinstance(each, dict)]
    if not 0 < len(named) <= MOST:
        raise CheckpointError(f"{where}: found {shown(modules)}, expected a list of modules, each with its path")
    found = []
    for name in named:
        parts = PurePosixPath(name).parts if isinstance(name, str) else ("",)
        if len(parts) > DEEPEST or not all(map(is_file_name, parts)):
            raise CheckpointError(f"{where}: found the path {shown(name)}, expected one of a folder beside it")
        folder = path.joinpath(*parts)
        if leads_out(folder, path):
            raise CheckpointError(f"{where}: {folder} is a link out of the folder; put a copy there")
        if (folder / ADAPTER).is_file() or ((folder / CONFIG).is_file() and _names_a_model(folder / CONFIG, label)):
            found.append("/".join(parts))
    return list(dict.fromkeys(found))


def _names_a_model(config: Path, label: str) -> bool:
    values = read_document(config, label)
    return isinstance(values, dict) and "model_type" in values
