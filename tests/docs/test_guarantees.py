"""What docs/guarantees.md promises is tested where it says; and what no other test holds to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pages import ROOT, Page, codes

import featcal_fast as ff

HEADINGS = ("The result", "Files", "Runs that are stopped", "Several ranks", "Strangers' models")
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Own: ...\n"


@pytest.mark.parametrize("heading", HEADINGS)
def test_every_guarantee_names_tests(heading: str) -> None:
    for guarantee, tested in Page(ROOT / "docs" / "guarantees.md").table(heading):
        assert codes(tested), guarantee
        for name in codes(tested):
            assert re.search(r"^def test_", (ROOT / name).read_text(), re.MULTILINE), name


@pytest.mark.parametrize("known", [True, False])
def test_no_code_of_a_model_is_run(known: bool, workspace: Path) -> None:
    """Every class that transformers would take from a folder if it were trusted, in every model's folder."""
    for folder in (workspace / "models").iterdir():
        (folder / "own.py").write_text(CODE)
        for name, classes in {
            "config.json": ("AutoConfig", "AutoModelForCausalLM"),
            "tokenizer_config.json": ("AutoTokenizer",),
        }.items():
            values = json.loads((folder / name).read_text())
            values["auto_map"] = {each: ["own.Own"] * 2 if each == "AutoTokenizer" else "own.Own" for each in classes}
            if not known:
                values |= {"model_type": "own", "architectures": ["Own"], "tokenizer_class": "Own"}
            (folder / name).write_text(json.dumps(values))
    if known:
        assert ff.calibrate("recipe.yaml").calibrated
    else:
        with pytest.raises(ff.FeatCalError, match=r"config.json: found model_type 'own', .* with code of their own"):
            ff.calibrate("recipe.yaml")
    assert not list(workspace.rglob("ran"))
