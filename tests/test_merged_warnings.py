"""What is said of a merged model that may be another one than was meant, or lacks its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from unions import union_job

import featcal_fast as ff
from featcal_fast.planning.planner import _is_calibrated


def test_a_merge_that_was_calibrated_before(tmp_path: Path) -> None:
    recipe = union_job(tmp_path)
    assert not _said(recipe, "calibrated before")
    ff.calibrate(recipe, device="cpu")
    again = {**recipe, "merged_model": recipe["out"], "out": str(tmp_path / "again")}
    assert _said(again, "calibrated before")
    assert [each for each in ff.calibrate(again, device="cpu").warnings if each.startswith("calibrated before")]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"versions": 3}', '{"versions": {"other": 1}}', "[" * 10**5])
def test_a_report_of_others_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    assert not _is_calibrated(tmp_path)


def test_a_merge_of_vocabularies_without_its_tokenizer(tmp_path: Path) -> None:
    recipe = union_job(tmp_path)
    merged = Path(recipe["merged_model"])
    assert not _said(recipe, "no tokenizer")
    rows = [json.loads((folder / "config.json").read_text())["vocab_size"] for folder in (merged, tmp_path / "base")]
    assert rows[0] > rows[1]
    for path in merged.glob("tokenizer*"):
        path.unlink()
    for task in recipe["experts"]:  # which both tokenizers split alike
        (tmp_path / f"{task}.jsonl").write_text('{"text": "a b c"}\n' * 8)
        recipe["experts"][task]["data"] = str(tmp_path / f"{task}.jsonl")
    (said,) = _said(recipe, "no tokenizer")
    assert f"{rows[0]} rows and the base model's {rows[1]}" in said


def _said(recipe: dict, beginning: str) -> list[str]:
    return [each for each in ff.plan(recipe, device="cpu").warnings if each.startswith(beginning)]
