"""Merges of models, folder to folder, against what mergekit made of the same: `fixtures/record_mergekit.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import featcal_fast as ff
from featcal_fast.merging import dare
from featcal_fast.merging.methods import METHODS

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = {"linear": "average"}  # what mergekit calls otherwise
RECORDED = {
    "float32": ["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "model_stock", "slerp"],
    "bfloat16": ["linear", "task_arithmetic", "slerp"],
}

Found = dict[str, dict[str, Tensor]]  # by model or merge, or `MERGE kept EXPERT`, and by tensor
Recorded = tuple[Path, Found, dict[str, Any]]  # a folder of the models, all tensors, and mergekit's configs


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorded]:
    return {
        dtype: unpack(FIXTURES / f"mergekit-{dtype}.safetensors", tmp_path_factory.mktemp(dtype)) for dtype in RECORDED
    }


def unpack(path: Path, folder: Path) -> Recorded:
    found: Found = {}
    for key, tensor in load_file(path).items():
        model, _, name = key.rpartition("/")
        found.setdefault(model, {})[name] = tensor
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for model in ("base", "a", "b", "c"):
        (folder / model).mkdir()
        (folder / model / "config.json").write_text(metadata["model"])
        save_file(found[model], folder / model / "model.safetensors", {"format": "pt"})
    return folder, found, json.loads(metadata["merges"])


def recipe(folder: Path, method: str, config: dict[str, Any]) -> dict[str, Any]:
    """Ours of a config of mergekit's."""
    experts, parameters = {each["model"]: each["parameters"] for each in config["models"]}, config["parameters"]
    options: dict[str, Any] = {"t": parameters["t"]} if "t" in parameters else {}
    if METHODS[NAMES.get(method, method)].weighted:
        options["weights"] = {task: each["weight"] for task, each in experts.items()}
    densities = {each["density"] for each in experts.values() if "density" in each}
    if densities:
        (options["density"],) = densities
    if "lambda" in parameters:  # by which mergekit multiplies changes that DARE left; ours are divided by the density
        options["scaling"] = parameters["lambda"] * (options["density"] if method.startswith("dare") else 1)
    return {
        "base_model": str(folder / "base"),
        "experts": {task: {"model": str(folder / task), "data": "none.jsonl"} for task in experts},
        "merge": {"method": NAMES.get(method, method), **options},
    }


def same_choice(method: str, found: Found) -> Callable[..., Tensor]:
    """What mergekit's DARE drew, in place of ours."""

    def kept(_seed: int, task: str, name: str, start: int, stop: int, _density: float, device: torch.device) -> Tensor:
        return found[f"{method} kept {task}"][name].flatten()[start:stop].to(device)

    return kept


@pytest.mark.parametrize(("dtype", "method"), [(dtype, name) for dtype, names in RECORDED.items() for name in names])
def test_as_mergekit_has_it(
    dtype: str, method: str, recorded: dict[str, Recorded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit of the weights: mergekit has changes, and their sum, in the models' dtype; we in float32."""
    folder, found, configs = recorded[dtype]
    monkeypatch.setattr(dare, "kept", same_choice(method, found))
    ours = load_file(ff.merge(recipe(folder, method, configs[method]), out=tmp_path / "out") / "model.safetensors")
    assert ours.keys() == found[method].keys()
    for name, wanted in found[method].items():
        assert ours[name].dtype == wanted.dtype == getattr(torch, dtype)
        error = (ours[name].double() - wanted.double()).norm()
        assert error <= 0.7 * torch.finfo(wanted.dtype).eps * wanted.double().norm()
        assert not torch.equal(wanted, found["base"][name])
