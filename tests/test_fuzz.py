"""The fuzzer finds what is wrong, keeps it, and tries it again; its targets take their own seeds."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from featcal_fast.errors import FeatCalError, RecipeError
from tests.fuzz import __main__ as driver
from tests.fuzz import recipe


def endless(_: bytes) -> None:
    while True:
        pass


def raising(error: BaseException) -> Any:
    def target(_: bytes) -> None:
        raise error

    return target


def unprintable(_: bytes) -> None:
    error = FeatCalError("a")
    error.args = ("a\x1b[31m",)
    raise error


@pytest.mark.parametrize(
    ("target", "fault"),
    [
        (len, ""),
        (raising(FeatCalError("a: found b, expected c")), ""),
        (raising(ValueError("odd")), "ValueError: odd"),
        (raising(MemoryError()), "MemoryError"),
        (raising(FeatCalError(" ")), "cannot be printed"),
        (unprintable, "cannot be printed"),
        (endless, "Hung"),
    ],
)
def test_what_is_wrong_is_told(target: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "SECONDS", 0.2)
    before = driver.signal.signal(driver.signal.SIGPROF, driver._hang)
    try:
        found = driver.attempt(target, b"x")[1]
    finally:
        driver.signal.signal(driver.signal.SIGPROF, before)
    assert fault in found
    assert bool(found) == bool(fault)


def test_faults_are_found_and_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def target(data: bytes) -> None:
        if b"bad" not in data:
            raise ValueError("it was damaged")

    broken: Any = SimpleNamespace(__name__="tests.fuzz.broken", SEEDS=[b"bad", b"as bad"], target=target)
    assert driver.fuzz(broken, 0.005, random.Random(0), tmp_path / "found") == 1
    (kept,) = (tmp_path / "found").iterdir()
    assert driver.attempt(target, kept.read_bytes())[1].startswith("ValueError: it was damaged")
    assert "1 of them wrong" in capsys.readouterr().out


def test_seeds_of_recipes_are_read_and_damaged(tmp_path: Path) -> None:
    for seed in (recipe.SEEDS[0], recipe.SEEDS[2]):
        recipe.target(seed)
    with pytest.raises(RecipeError, match="x: unknown key"):
        recipe.target(recipe.SEEDS[1])
    assert driver.fuzz(recipe, 0.02, random.Random(0), tmp_path) == 0


def test_seeds_of_model_folders_are_read_and_damaged(tmp_path: Path) -> None:
    from tests.fuzz import checkpoint  # which makes models

    for seed in checkpoint.SEEDS:
        checkpoint.target(seed)
    assert driver.fuzz(checkpoint, 0.02, random.Random(0), tmp_path) == 0


def test_seeds_of_cards_are_read_and_damaged(tmp_path: Path) -> None:
    from tests.fuzz import card

    for seed in card.SEEDS:
        card.target(seed)
    assert driver.fuzz(card, 0.02, random.Random(0), tmp_path) == 0


def test_seeds_of_mergekit_configs_are_mapped_and_damaged(tmp_path: Path) -> None:
    from tests.fuzz import mergekit

    for seed in mergekit.SEEDS:
        mergekit.target(seed)
    assert driver.fuzz(mergekit, 0.02, random.Random(0), tmp_path) == 0


def test_seeds_of_texts_are_read_and_damaged(tmp_path: Path) -> None:
    from tests.fuzz import texts

    for seed in texts.SEEDS:
        texts.target(seed)
    assert driver.fuzz(texts, 0.02, random.Random(0), tmp_path) == 0
