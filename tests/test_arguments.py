"""Arguments of the calls from Python: what is of another type than it should be is one error that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pico
import pytest

import featcal_fast as ff


@pytest.fixture
def recipe(tmp_path: Path) -> dict:
    return {**pico.save(pico.job("clip", 2), tmp_path), "samples": 8}


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("device", [5, 1.5, True, [], "", "gpu", b"\xff"]),
        ("host_memory", [-1, 0, True, [1], b"8GB", float("nan"), float("inf"), 10**4000]),
        ("device_memory", [{"a": 1}, -(10**5000)]),
        ("scratch", [5, b"/tmp", "", "a\0b"]),
        ("out", [5, b"/tmp", "", "a\0b", ["a"]]),
        ("recipe", [5, None, b"a", ""]),
        ("checkpoint_every", [-1, 1.5, True, "1", 10**5000 * -1]),
    ],
)
def test_what_is_of_the_wrong_type_is_named(name: str, values: list, recipe: dict, tmp_path: Path) -> None:
    runs = {ff.calibrate, ff.plan, ff.merge, ff.check}
    takes = {"recipe": runs - {ff.check}, "out": runs - {ff.plan}, "checkpoint_every": {ff.calibrate}}
    for run in takes.get(name, {ff.calibrate, ff.plan}):
        for value in values:
            arguments = {} if run is ff.check else {"recipe": recipe}
            with pytest.raises(ff.FeatCalError, match=re.escape(name)) as found:
                run(**{**arguments, name: value})
            assert "found" in str(found.value)
            assert len(str(found.value)) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["9" * 400 + "GB", "8 apples", "8GBB", ""])
def test_memory_that_no_text_can_mean(value: str, recipe: dict) -> None:
    with pytest.raises(ff.FeatCalError, match=r"memory: found '.*, expected a number and a unit"):
        ff.plan(recipe, host_memory=value)


def test_memory_may_be_a_text_or_a_number(recipe: dict) -> None:
    found = [ff.plan(recipe, device="cpu", host_memory=value).host_budget for value in ("64GB", 64 * 10**9, 64e9)]
    assert found == [64 * 10**9] * 3
    assert ff.plan(recipe, device="cuda", device_memory="8GiB").device_budget == 8 * 2**30
