"""The real models' benchmark: statistics, rows that are kept, and a run from its units to its results and tables."""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import featcal_fast as ff
from bench import readme
from bench.harness.results import ROOT, SOURCES, Results
from bench.real import command, plots, summary
from bench.real.paired import HeldOut, difference
from bench.real.repairs import Repair, compare
from bench.real.sources import SourceError
from bench.real.units import ARITHMETIC, BASE, EXPERTS, ITEMS, SECTION, Rows, Unit


def test_a_difference_is_that_of_the_scores_and_its_error_that_of_pairs() -> None:
    test = HeldOut({"a": [1, 3], "b": [1, 1]}, {"a": [0, 1], "b": [0, 1]})
    ours, theirs = {"a": [2.0, 6.0], "b": [1.0, 0.0]}, {"a": [1.0, 3.0], "b": [0.0, 0.0]}
    mean, error = difference(test, [ours], [theirs])
    assert mean == pytest.approx((4 / 4 + 1 / 2) / 2)
    # Of `a` each item's difference is its size: no error. Of `b` they are 1 and 0: 0.5 / sqrt(2) * sqrt(2) of a mean.
    assert error == pytest.approx(0.5 / 2)


def test_items_of_one_file_count_as_one() -> None:
    values = [float(i // 4 % 2) for i in range(40)]
    alone = HeldOut({"a": [1] * 40}, {"a": list(range(40))})
    together = HeldOut({"a": [1] * 40}, {"a": [i // 4 for i in range(40)]})
    nothing = {"a": [0.0] * 40}
    errors = [difference(test, [{"a": values}], [nothing])[1] for test in (alone, together)]
    assert errors[1] == pytest.approx(2 * errors[0], rel=0.1)


def test_two_errors_hold_what_they_should() -> None:
    """Items that differ, seeds that differ, and both: the true difference is 0."""
    draw = random.Random(0)
    sizes = {"a": [draw.choice([1, 2, 3]) for _ in range(60)], "b": [1] * 60}
    test = HeldOut(sizes, {task: [i // 2 for i in range(60)] for task in sizes})
    found = []
    for _ in range(200):
        of_seed = [draw.gauss(0, 0.1) for _ in range(3)]
        of_file = {task: [draw.gauss(0, 1) for _ in range(30)] for task in sizes}
        ours = [
            {t: [of_file[t][i // 2] + lead * size + draw.gauss(0, 1) for i, size in enumerate(sizes[t])] for t in sizes}
            for lead in of_seed
        ]
        found.append(difference(test, ours, [{task: [0.0] * 60 for task in sizes}] * 3))
    spread = statistics.stdev(mean for mean, _ in found)
    assert spread * 0.9 < statistics.fmean(error for _, error in found) < spread * 1.6
    assert sum(abs(mean) > 2 * error for mean, error in found) < 20


def rows_of(seed: int) -> dict[str, dict[str, Any]]:
    """Bits of four texts of 8 bytes in two tasks, and of two texts of no task."""
    bits = {BASE: 16, EXPERTS: 8, ARITHMETIC: 12, "anchor alone, preset": 14, "TIES": 13}
    bits |= {"FeatCal 8": 10, "FeatCal 32": 13}
    rows: dict[str, dict[str, Any]] = {
        ITEMS: {
            "sizes": {"code": [8] * 4, "mails": [8] * 4, "other text": [8, 8]},
            "files": {"code": [0, 0, 1, 1], "mails": [0, 1, 2, 3], "other text": [0, 1]},
            "apart": ["other text"],
        }
    }
    for key, each in bits.items():
        wiggle = [0.1, -0.1, 0.2, -0.2] if key == "FeatCal 8" else [0.0] * 4
        items = {task: [each + w + 0.01 * seed for w in wiggle] for task in ("code", "mails")}
        rows[key] = {"items": {**items, "other text": [each / 2, each / 2]}}
    rows[ARITHMETIC]["validation"] = {"scaling": 0.4}
    rows["FeatCal 8"]["took"] = {"seconds": 2.0 + seed, "peak_gib": 0.5, "plan": {"host": 0.6, "TFLOP": 1.0}}
    return rows


def results() -> dict[str, Any]:
    units = {Unit("lm", "lora", seed): rows_of(seed) for seed in range(3)}
    return {
        "study": "SmolLM2",
        "measure": "bits per byte",
        "digits": 3,
        "scale": 1,
        "forms": summary.summary(units, lower_is_better=True),
    }


def test_a_summary_says_what_each_row_gains_and_how_sure_that_is() -> None:
    rows = results()["forms"]["lora"]["rows"]
    assert rows[BASE]["mean"] == pytest.approx(2 + 0.01 / 8)
    assert rows["FeatCal 8"]["closed"] == pytest.approx(6 / 8)
    lead = rows["FeatCal 8"]["differences"][ARITHMETIC]
    assert lead["mean"] == pytest.approx(-2 / 8)
    assert lead["better"]
    assert 0 < lead["error"] < 0.05
    assert not rows["FeatCal 32"]["differences"][ARITHMETIC]["better"]  # worse, and surely so
    assert rows["FeatCal 8"]["apart"]["other text"]["difference"] == pytest.approx(-3 / 8)
    assert rows["FeatCal 8"]["took"]["seconds"] == 3.0
    assert results()["forms"]["lora"]["tuned"] == {ARITHMETIC: [{"scaling": 0.4}] * 3}


def test_a_row_that_a_seed_lacks_is_left_out() -> None:
    units = {Unit("lm", "lora", seed): rows_of(seed) for seed in range(2)}
    del units[Unit("lm", "lora", 1)]["FeatCal 32"]
    assert "FeatCal 32" not in summary.summary(units, True)["lora"]["rows"]


def test_only_what_is_better_beyond_two_errors_is_bold() -> None:
    shown = {line["model"]: line["from task arithmetic"] for line in summary.lines(results(), "lora", "model")}
    assert shown["FeatCal 8"].startswith("**-0.250 ±")
    assert shown["FeatCal 32"] == "+0.125 ± 0.000"
    assert shown[BASE] == shown[EXPERTS] == shown[ARITHMETIC] == ""


def test_a_finished_row_is_not_measured_again(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(key: str) -> Callable[[], dict[str, Any]]:
        return lambda: measured.append(key) or {"items": {}}  # type: ignore[func-returns-value]

    for conditions in ({"code": "1", "time": "now"}, {"code": "1", "time": "later"}, {"code": "2", "time": "later"}):
        rows = Rows(Results(tmp_path / "lm-lora-0.json", conditions))
        for key in ("base", "TIES"):
            rows.measure(key, measure(key))
    assert measured == ["base", "TIES", "base", "TIES"]  # once for each code


class Here:
    """A pool that works in this process: what a test replaces is not replaced in others."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[..., Any], *each: Iterable[Any]) -> Iterable[Any]:
        return map(work, *each)


def study(name: str, measured: list[str]) -> SimpleNamespace:
    def run(unit: Unit, archives: dict[str, Path], folder: Path, rows: Rows, quick: bool) -> None:
        for key, row in rows_of(unit.seed).items():
            rows.measure(key, lambda key=key, row=row: measured.append(f"{unit.name} {key}") or row)  # type: ignore

    def choose(archives: dict[str, Path], folder: Path, rows: Rows, quick: bool) -> dict[str, Any]:
        return rows.measure("lambda 1", lambda: measured.append(name) or {"mean": 1})  # type: ignore

    return SimpleNamespace(
        NAME=name,
        TITLE="SmolLM2",
        MEASURE="bits per byte",
        LOWER_IS_BETTER=True,
        DIGITS=3,
        SCALE=1,
        FILES=("units",),
        units=lambda quick: [Unit(name, "lora", seed) for seed in range(1 if quick else 2)],
        prepare=lambda archives, folder: None,
        run=run,
        describe=lambda quick: {"counts": [8, 32]},
        fingerprint=lambda archives: "0",
        choose=choose,
    )


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(command, "STUDIES", {name: study(name, found) for name in ("lm", "encoder")})
    monkeypatch.setattr(command, "MEASURES", ("bench/real/units.py",))
    monkeypatch.setattr(command, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(command.sources, "fetch", lambda folder, say=print: {})
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setenv("BENCH_PARENT", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return found


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.real", "--folder", str(folder), *options])
    command.main()


def test_a_run_goes_from_units_to_results_and_again_at_no_cost(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, tmp_path / "work")
    assert len(measured) == 2 * 2 * 8
    assert "FeatCal 8" in capsys.readouterr().out
    assert (tmp_path / "results" / "real.png").stat().st_size > 10_000
    for name in ("lm", "encoder"):
        kept = json.loads((tmp_path / "results" / f"real-{name}.json").read_text())
        assert kept["seeds"] == [0, 1]
        assert kept["counts"] == [8, 32]
        assert kept["thread_seconds"] > 0
        assert '"items"' not in json.dumps(kept)  # summaries only
    # As if it had been ended in the middle of a unit: what was finished stays.
    path = tmp_path / "work" / "rows" / "lm-lora-1.json"
    part = json.loads(path.read_text())
    del part["sections"][SECTION]["rows"]["FeatCal 32"]
    path.write_text(json.dumps(part))
    measured.clear()
    run(monkeypatch, tmp_path / "work")
    assert measured == ["lm-lora-1 FeatCal 32"]


def test_a_quick_run_keeps_nothing_in_the_results(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, tmp_path / "work", "--quick", "lm")
    assert len(measured) == 8
    assert not (tmp_path / "results").exists()
    assert (tmp_path / "work" / "real-lm.json").exists()


def test_settings_are_compared_apart_and_finished_ones_kept(
    measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, tmp_path / "work", "--choose", "encoder")
    run(monkeypatch, tmp_path / "work", "--choose", "encoder")
    assert measured == ["encoder"]
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["settings-real-encoder.json"]
    monkeypatch.setattr(command.STUDIES["encoder"], "fingerprint", lambda archives: "other texts")
    run(monkeypatch, tmp_path / "work", "--choose", "encoder")
    run(monkeypatch, tmp_path / "work", "--choose", "encoder", "--quick")
    assert measured == ["encoder"] * 3
    assert (tmp_path / "work" / "settings-real-encoder.json").exists()
    assert len(list((tmp_path / "results").iterdir())) == 1


@pytest.mark.parametrize("option", ["--quick", "--choose"])
def test_a_study_whose_base_cannot_be_had_is_left_out(
    option: str,
    measured: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def prepare(archives: dict[str, Path], folder: Path) -> None:
        raise SourceError("it could not be fetched")

    monkeypatch.setattr(command.STUDIES["lm"], "prepare", prepare)
    run(monkeypatch, tmp_path / "work", option)
    assert "lm is left out: it could not be fetched" in capsys.readouterr().out
    assert measured
    assert all(each.startswith("encoder") for each in measured)
    with pytest.raises(SystemExit, match="Nothing was measured"):
        run(monkeypatch, tmp_path / "work", option, "lm")


def test_sources_are_fetched_once_a_run(measured: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []
    monkeypatch.setattr(command.sources, "fetch", lambda folder, say=print: fetched.append(folder) or {})
    run(monkeypatch, tmp_path / "work", "--quick")
    assert fetched == [tmp_path / "work" / "sources"]


def test_rows_depend_on_all_code_that_measures_them() -> None:
    """What the studies import of bench is theirs, common to all benchmarks, or in `MEASURES`."""
    for study in command.STUDIES.values():
        files = {f"bench/real/{name}.py" for name in study.FILES}
        known = {*files, *command.MEASURES, *SOURCES}
        for file in sorted(files | set(command.MEASURES)):
            names = re.findall(r"^from (bench[\w.]*) import ([^\n]+)", (ROOT / file).read_text(), re.MULTILINE)
            modules = {f"{package}.{name}" for package, found in names for name in found.split(", ")}
            paths = {module.replace(".", "/") + ".py" for module in modules | {package for package, _ in names}}
            used = {path for path in paths if (ROOT / path).is_file()}
            assert not {path for path in used if not path.startswith(tuple(known))}, file


def test_repairs_are_compared_by_the_mean_over_numbers_of_samples() -> None:
    grid = {name: Repair(scaling, ff.Settings()) for name, scaling in (("a", 1.0), ("b", 2.0))}
    found = compare(grid, (1, 10), Rows(Results(None, {})), lambda repair, n: {"mean": n * repair.scaling}, max)
    assert found["means"] == {"a": 5.5, "b": 11}
    assert found["best"] == "b"
    assert [row["mean"] for row in found["scores"].values()] == [1, 2, 10, 20]


def test_the_readme_shows_held_out_samples_beside_fixed_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which fixed ones the preset and the chosen ones are is found by their values, and the best one is named."""
    seconds = {"preset": 1.0, "chosen": 20.0, "other": 3.0, "auto": 4.0}
    for name in readme.REAL:
        scores = {f"{key}, 32": {"mean": took / 100, "took": {"seconds": took}} for key, took in seconds.items()}
        grid = {key: {"scaling": number} for number, key in enumerate(("preset", "chosen", "other"))}
        found = {"study": name, "measure": "bits", "digits": 2, "scale": 1, "samples": [32], "best": "other"}
        found |= {"preset": grid["preset"], "chosen": grid["chosen"], "grid": grid, "scores": scores}
        found["with held-out samples"] = {"grid": {"auto": {}}, "scores": scores}
        (tmp_path / f"settings-real-{name}.json").write_text(json.dumps(found))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    head, _, *lines = readme.chosen_real().splitlines()
    assert head.count("32 texts a task: bits (seconds)") == 2
    fixed = {"preset": "0.01 (1.0)", "chosen": "0.20 (20)", "best fixed": "0.03 (3.0)"}
    cells = {f"{name}, all texts": cell for name, cell in fixed.items()} | {"auto": "0.04 (4.0)"}
    assert lines == [f"| {name} | {cell} | {cell} |" for name, cell in cells.items()]


def test_the_readme_shows_both_studies_in_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = results()
    rows = kept["forms"]["lora"]["rows"]
    rows["FeatCal 128, chosen"] = rows["FeatCal 8"]
    for name in readme.REAL:
        (tmp_path / f"real-{name}.json").write_text(json.dumps(kept | {"measure": f"measure of {name}"}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    head, _, *lines = readme.real().splitlines()
    assert head == "|  | base | experts | task arithmetic | FeatCal 128 | FeatCal's difference |"
    assert [line.split(" | ")[0] for line in lines] == [f"| SmolLM2: measure of {name}" for name in readme.REAL]


def test_points_of_a_plot_are_told_apart_by_their_settings() -> None:
    rows = {"FeatCal 8": 1, "FeatCal 256": 2, "FeatCal 8, chosen": 3, "TIES": 4}
    assert plots.points_of(rows, "preset") == {8: 1, 256: 2}
    assert plots.points_of(rows, "chosen") == {8: 3}
