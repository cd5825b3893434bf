"""A calibration that is worse than the merge on held-out samples: the merge is written, wherever the run is killed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pico
import pytest
from file_operations import killing, operations
from runs import EXHAUSTIVE, Case, check_all, contents, exit_code, goes_on
from safetensors import safe_open

import featcal_fast as ff
from featcal_fast.cli import NOT_BETTER
from featcal_fast.reporting.outcome import LAYER_WORSE, MODEL_WORSE

BAD = {"ridge_lambda": 1e-8, "teacher_alpha": 1.0}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A job whose layers pass the gate, but not the whole."""
    folder = tmp_path_factory.mktemp("worse")
    recipe = {**pico.save(pico.job("llama", 3), folder), "held_out": 0.2, "settings": BAD}
    case = Case(recipe)
    case.run(folder / "planned")
    with operations() as case.operations:
        case.run(folder / "whole")
    case.whole = contents(folder / "whole" / "out")
    return case


def tensors(folder: Path) -> dict[str, bytes]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


def test_the_merge_is_what_is_written(case: Case, tmp_path: Path) -> None:
    report = case.run(tmp_path)
    assert report.outcome is not None
    assert report.outcome.worse
    assert report.outcome.kept == "merged"
    assert tensors(tmp_path / "out") == tensors(Path(case.recipe["merged_model"]))
    assert report.calibrated == 0
    assert {MODEL_WORSE, LAYER_WORSE} <= set(report.kept.values()), "layers that got worse, and others"
    assert all(layer.drift_after == layer.drift_before for layer in report.layers)
    assert any("all weights keep their merged values" in warning for warning in report.warnings)
    assert "is worse than the merge on held-out samples" in (tmp_path / "out" / "README.md").read_text()
    assert ff.check(tmp_path / "out").status == 0


def test_it_is_written_all_the_same_where_nothing_is_to_be_kept(case: Case, tmp_path: Path) -> None:
    report = case.changed(settings={**BAD, "keep_better": False}).run(tmp_path)
    assert report.outcome.worse
    assert report.outcome.kept == ""
    assert tensors(tmp_path / "out") != tensors(Path(case.recipe["merged_model"]))
    assert any("it was written all the same" in warning for warning in report.warnings)


def test_killed_at_any_file_operation_it_goes_on_to_the_merge(case: Case, tmp_path: Path) -> None:
    def check(number: int) -> None:
        folder = tmp_path / str(number)

        def run() -> None:
            with operations(killing(number)):
                case.run(folder)

        assert exit_code(run) == -signal.SIGKILL
        goes_on(case, folder)

    numbers = range(1, len(case.operations) + 1)
    late = len(numbers) // 2  # by when weights may be put back
    check_all(check, [number for number in numbers if EXHAUSTIVE or (number > late and number % 5 == 2)])


@pytest.mark.parametrize("keep", [[], ["--no-keep-better"]])
def test_the_exit_code_says_so_where_it_is_asked_for(case: Case, keep: list[str], command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(case.recipe))
    out = ["--out", str(tmp_path / "out"), "--device", "cpu", *keep]
    code, shown, _ = command("calibrate", str(tmp_path / "recipe.yaml"), *out, "--require-better")
    assert code == NOT_BETTER
    assert "held-out: the calibrated model is worse than the merged one" in shown
    assert (tmp_path / "out" / "report.json").is_file()


def test_a_merge_has_no_delta_to_itself(case: Case, command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(case.recipe))
    out = ["--out", str(tmp_path / "out"), "--delta", str(tmp_path / "delta"), "--device", "cpu"]
    code, shown, _ = command("calibrate", str(tmp_path / "recipe.yaml"), *out)
    assert code == 0
    assert "No delta: all weights are the merge's" in shown
    assert not (tmp_path / "delta").exists()


def test_nothing_is_required_of_what_nobody_judges(case: Case, command, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({**case.recipe, "held_out": 0}))
    code, _, told = command("calibrate", str(tmp_path / "recipe.yaml"), "--require-better")
    assert code == 2
    assert "found held_out: 0, expected samples to judge by" in told
