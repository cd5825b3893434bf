"""README and the benchmarks' page: their tables are what results give, and the README stays short."""

from __future__ import annotations

import re

import pytest
from test_bench_gpu_parts import fake_gpu

from bench import readme
from featcal_fast import demo

README_WORDS = 1200
SECTIONS = {name: {"rows": rows} for name, rows in (fake_gpu() | {"peak": {"product": {"TFLOP/s": 800.0}}}).items()}
GPU = {"environment": {"device": "NVIDIA H200"}, "sections": SECTIONS}


def page(path: str) -> str:
    return (readme.ROOT / path).read_text()


@pytest.mark.parametrize("path", readme.PAGES)
def test_tables_are_the_ones_that_results_and_registry_give(path: str) -> None:
    assert readme.filled(page(path)) == page(path)


def test_every_table_has_its_place() -> None:
    pages = [page(path) for path in readme.PAGES]
    for name in readme.SECTIONS:
        assert sum(text.count(f"<!-- {name} -->\n") for text in pages) == 1, name


@pytest.mark.parametrize("found", [[], [GPU], [GPU, GPU]], ids=["no GPU", "one GPU", "two"])
def test_the_readme_is_a_page(found: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when GPUs will have been measured."""
    monkeypatch.setattr(readme, "_gpus", lambda: found)
    text = readme.filled(page("README.md"))
    assert ("| NVIDIA H200 | found | goal | met |" in text) == bool(found)
    assert len(text.split()) <= README_WORDS


def test_the_demo_says_what_real_models_showed() -> None:
    shares = []
    for name in readme.REAL:
        rows = next(iter(readme._read(f"real-{name}")["forms"].values()))["rows"]
        shares += [f"{rows[readme.REAL_ROWS[title]]['closed']:.0%}" for title in ("task arithmetic", "FeatCal 128")]
    assert re.findall(r"\d+%", demo.REAL_MODELS) == shares


def test_a_stale_table_is_made_anew() -> None:
    stale = "# Title\n\n<!-- gpu -->\nold\n<!-- /gpu -->\n\nold\n"
    assert readme.filled(stale) == f"# Title\n\n<!-- gpu -->\n{readme.gpu()}\n<!-- /gpu -->\n\nold\n"


@pytest.mark.parametrize(
    "text",
    [
        "<!-- jobz -->\n<!-- /jobz -->\n",
        "<!-- jobs -->\n",
        "<!-- jobs -->\n<!-- /demo -->\n",
        "<!-- /jobs -->\n<!-- jobs -->\n",
    ],
)
def test_markers_that_mean_nothing_are_found(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a pair of one of compared, demo, "):
        readme.filled(text)
