"""The demo, with models too small and too briefly trained to be good at anything."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import CLIPVisionModel

from featcal_fast import FeatCalError, Recipe, demo

TINY = demo.Config(layers=2, width=16, base_steps=2, expert_steps=2, batch_size=4)
SCANS = load_digits().images


def run(folder: Path, **options: Any) -> tuple[dict[str, Any], str]:
    console = Console(file=io.StringIO(), width=80)
    return demo.run(folder, console=console, device="cpu", **{"config": TINY, **options}), console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return folder, *run(folder)


def no_training(*_: Any) -> None:
    raise AssertionError("trained again")


def test_views() -> None:
    digits = demo.Digits()
    rows = digits.parts["held-out"]
    seen = {task: digits.see(task, "held-out")[0].squeeze(1).numpy() for task in demo.VIEWS}
    upright = SCANS[rows] / 8 - 1
    assert upright.min() == -1
    assert upright.max() == 1
    np.testing.assert_array_equal(seen["upright"], upright)
    np.testing.assert_array_equal(seen["rotated"], np.rot90(upright, axes=(1, 2)))
    np.testing.assert_array_equal(seen["inverted"], -upright)
    pixels = demo.SCRAMBLED.numpy()
    assert sorted(pixels) == list(range(64))
    np.testing.assert_array_equal(seen["scrambled"].reshape(-1, 64), upright.reshape(-1, 64)[:, pixels])


def test_parts_are_disjoint_and_cover_all_scans() -> None:
    parts = demo.Digits().parts
    assert {name: len(rows) for name, rows in parts.items()} == {"held-out": 500, "validation": 250, "training": 1047}
    assert torch.cat(list(parts.values())).sort().values.equal(torch.arange(1797))


def test_what_it_leaves(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, results, printed = finished
    left = {path.name for path in folder.iterdir()}
    files = {"demo.json", "drift.png", "heads.safetensors", "recipe.yaml", "results.json"}
    assert left == files | {"base", "calibrated", "calibrated-64", "calibrated-8", "data", "experts", "merged"}
    for model in ("base", *(f"experts/{task}" for task in demo.VIEWS), "merged", "calibrated-8", "calibrated"):
        assert CLIPVisionModel.from_pretrained(folder / model).config.image_size == 8
    assert (folder / "drift.png").read_bytes().startswith(b"\x89PNG")

    recipe = Recipe.load(folder / "recipe.yaml")
    assert list(recipe.experts) == list(demo.VIEWS)
    assert recipe.samples == max(demo.CALIBRATED.values())

    assert json.loads((folder / "results.json").read_text()) == results
    rows = ["base", *(f"expert {task}" for task in demo.VIEWS), "own expert", "task arithmetic", *demo.CALIBRATED]
    assert list(results["accuracy"]) == rows
    own = results["accuracy"]["own expert"]
    assert own["rotated"] == results["accuracy"]["expert rotated"]["rotated"]
    assert own["mean"] == pytest.approx(sum(own[task] for task in demo.VIEWS) / 4)
    assert all(row in printed for row in rows)
    assert max(map(len, printed.split("Drift from")[0].splitlines())) <= 80


def test_calibration_images_are_training_images(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, digits = finished[0], demo.Digits()
    for task in demo.VIEWS:
        given = load_file(folder / "data" / f"{task}.safetensors")["pixel_values"]
        training = {image.tobytes() for image in digits.see(task, "training")[0].numpy()}
        assert given.shape == (256, 1, 8, 8)
        assert len({image.tobytes() for image in given.numpy()} & training) >= 250  # a few scans are alike
        assert all(image.tobytes() in training for image in given.numpy())


def test_gap_closed() -> None:
    accuracy = {f"expert {task}": dict.fromkeys(demo.VIEWS, 0.0) | {task: 90.0} for task in demo.VIEWS}
    accuracy |= {"task arithmetic": dict.fromkeys(demo.VIEWS, 50.0)}
    accuracy |= {name: dict.fromkeys(demo.VIEWS, 40.0 + n / 8) for name, n in demo.CALIBRATED.items()}
    closed = demo._compare(accuracy)["gap_closed"]
    assert closed == {"FeatCal 8": -9 / 40, "FeatCal 64": -2 / 40, "FeatCal 256": 22 / 40}


def test_models_are_reused(finished: tuple[Path, dict[str, Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, first, _ = finished
    (folder / "mine").mkdir(exist_ok=True)  # the user's own: stays
    (folder / "recipe.yaml").write_text("")
    monkeypatch.setattr(demo, "_train", no_training)
    second, printed = run(folder)
    assert "reused" in printed
    assert second["accuracy"] == first["accuracy"]
    assert (folder / "mine").is_dir()
    (folder / "mine").rmdir()
    with pytest.raises(AssertionError, match="trained again"):
        run(folder, config=demo.Config(layers=1, width=16, base_steps=2, expert_steps=2))


def test_training_repeats_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    digits, console, hashes = demo.Digits(), Console(file=io.StringIO()), []
    for name in ("a", "b"):
        demo._claim(tmp_path / name)
        demo.make_models(tmp_path / name, TINY, digits, console)
        hashes.append(demo._hashes(tmp_path / name))
    assert hashes[0] == hashes[1]
    assert torch.get_rng_state().equal(state)

    # A damaged model is trained again.
    weights = tmp_path / "b" / "experts" / "rotated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    demo.make_models(tmp_path / "b", TINY, digits, console)
    assert demo._hashes(tmp_path / "b") == hashes[0]


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    with pytest.raises(FeatCalError, match="found something else"):
        run(tmp_path)
    (tmp_path / "demo.json").write_text("{}")
    with pytest.raises(FeatCalError, match="found something else"):
        run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "demo.json"}
    with pytest.raises(FeatCalError, match="found something else"):
        run(tmp_path / "demo.json")


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FeatCalError, match=rf"needs {package}: pip install 'featcal-fast\[demo\]'"):
        run(tmp_path / "new")
    assert not (tmp_path / "new").exists()
