"""What the README shows works."""

from __future__ import annotations

import re
from pathlib import Path

import pico
import pytest
import yaml
from safetensors.torch import save_file

import featcal_fast as ff

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_python_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    job = pico.job("clip", 2)
    job.base.save_pretrained(tmp_path / "base")
    job.merged.save_pretrained(tmp_path / "merged")
    for task, expert, batches in zip(("upright", "rotated"), job.experts.values(), job.batches.values(), strict=True):
        expert.save_pretrained(tmp_path / task)
        save_file(batches[0], tmp_path / f"{task}.safetensors")
    monkeypatch.chdir(tmp_path)
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "18 of 18 linear weights calibrated" in capsys.readouterr().out
    assert (tmp_path / "calibrated" / "model.safetensors").is_file()


def test_the_recipe_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    recipe = ff.Recipe.load(yaml.safe_load(text))
    assert recipe.experts["code"].samples == 128
    assert recipe.settings.anchor_rho == 1.5


def test_tables_are_the_ones_that_results_and_registry_give() -> None:
    from bench.readme import filled

    assert filled(README) == README
