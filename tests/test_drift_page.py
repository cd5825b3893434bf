"""A report of drift, its page and its pictures, made of numbers that are made up."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from importlib.resources import files as resources
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import featcal_fast as ff
from featcal_fast.errors import CheckpointError
from featcal_fast.reporting.charts import short_names
from featcal_fast.reporting.drift_page import page
from featcal_fast.reporting.splits import LayerSplit, ModuleError, Split

SCHEMA = json.loads(resources("featcal_fast.reporting").joinpath("drift.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA)


def made_up(layers: int, tasks: list[str], module: str = "mlp.up_proj") -> ff.DriftReport:
    """A report of so many layers and tasks, each with seven modules."""

    def split(part: float) -> Split:
        return Split(part, 0.3 * part, 0.9 * part, -0.1 * part, 1.1 * part)

    found = [
        LayerSplit(
            number,
            f"model.layers.{number}",
            {task: split(0.123456 * (1 + number)) for task in tasks},
            {task: split(0.0987654 * (1 + number)) for task in tasks},
            {f"{module}{each}": {task: ModuleError(1.0, 0.1 * each + 0.5) for task in tasks} for each in range(7)},
            {f"{module}{each}": 10.0 ** -((number + each) % 4) for each in range(7)},
            {f"{module}0": f"it is worse: {module}"} if number % 3 else {},
        )
        for number in range(layers)
    ]
    return ff.DriftReport(
        "a family",
        "cpu",
        dict.fromkeys(tasks, 51),
        dict.fromkeys(tasks, 51),
        found,
        model="out",
        settings=ff.Settings(),
    )


class Loads(HTMLParser):
    """Everything in a page that could load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}


def of_page(text: str) -> Loads:
    found = Loads()
    found.feed(text)
    return found


def test_a_page_of_many_layers_and_tasks_is_small_and_loads_nothing() -> None:
    text = page(made_up(80, [f"task number {number}" for number in range(20)]))
    assert len(text.encode()) < 2**20
    found = of_page(text)
    assert not found.tags & {"script", "link", "img", "image", "iframe", "object", "embed", "use", "a", "base", "form"}
    assert not found.attributes & {"src", "href", "srcset", "xlink:href", "data", "action", "onload"}
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'" in text
    assert text.count("<figure>") == 1 + 2 + 20


HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror='a'>",
    "</title></style><b>",
    "a&amp;b",
    "$\\frac{$",
    "e" * 200,
]


def test_names_are_only_text() -> None:
    report = made_up(3, HOSTILE, module="<svg onload='a'>")
    report.warnings, report.model = [HOSTILE[0]], HOSTILE[1]
    text = page(report)
    plain = of_page(page(made_up(3, [str(number) for number in range(len(HOSTILE))])))
    found = of_page(text)
    assert found.tags == plain.tags
    assert found.attributes == plain.attributes
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "a&amp;amp;b" in text


@pytest.mark.parametrize(
    "names",
    [
        ["self_attn.q_proj", "mlp.up_proj"],
        [f"{'a_long_module.' * 6}{end}" for end in ("q_proj", "k_proj")],
        [f"{start}{'.a_long_module' * 6}" for start in ("q_proj", "k_proj")],
        [f"{'before.' * 9}{middle}{'.after' * 9}" for middle in ("q_proj", "k_proj")],
        [f"{'x' * place}y{'x' * (99 - place)}" for place in range(100)],
    ],
)
def test_shortened_names_are_told_apart(names: list[str]) -> None:
    for most in (28, 60):
        found = short_names(names, most)
        assert len(set(found)) == len(names)
        assert max(map(len, found)) <= most
        assert all(a == b for a, b in zip(found, names, strict=True) if len(b) <= most)


def test_pictures_tell_long_names_apart(tmp_path: Path) -> None:
    report = made_up(2, ["a"], module="a_model_with_a_wrapper.around_another_wrapper.around.what_matters")
    report.plot(tmp_path / "a.svg")
    comments = re.findall(r"<!-- (.*?) -->", (tmp_path / "a.svg").read_text())
    assert len({each for each in comments if each.startswith("a_model")}) == 7
    shown = re.findall(r">(a_model[^<]*)<title>", page(report))
    assert len(shown) == 2 * 7
    assert len(set(shown)) == 7


def test_in_a_picture_nothing_is_on_top_of_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, figures = made_up(4, ["a"], module="m" * 80), []
    report.layers[2:] = [replace(layer, path=f"decoder.{layer.path}") for layer in report.layers[2:]]
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, _: figures.append(figure))
    report.plot(tmp_path / "a.png")
    figures[0].draw_without_rendering()
    panels = [axes for axes in figures[0].get_axes() if axes.get_title(loc="left")]
    assert len(panels) == 5
    for axes in panels:
        title = axes._left_title.get_window_extent()
        assert all(stage.get_window_extent().y1 <= title.y0 for stage in axes.texts)
        if legend := axes.get_legend():
            names = legend.get_window_extent()
            curves = [line for line in axes.lines if line.get_marker() == "o"]
            assert axes.patches or curves
            assert all(each.get_window_extent().y1 <= names.y0 for each in (*axes.patches, *curves))
    assert panels[0].get_position().x0 < 0.1  # however long the names of modules are


def test_a_picture_of_hostile_names_can_be_drawn(tmp_path: Path) -> None:
    made_up(3, HOSTILE, module="$\\frac{").plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e300, float("nan"), float("inf")])
def test_there_is_a_page_however_odd_the_numbers(value: float, tmp_path: Path) -> None:
    report = made_up(2, ["a", "b"])
    report.layers[0].merged["a"] = Split(*[value] * 5)
    report.layers[1].calibrated["b"] = Split(*[value] * 5)
    report.layers[1].modules["mlp.up_proj0"]["a"] = ModuleError(value, 1.0)
    report.layers[1].picked["mlp.up_proj0"] = value
    assert not re.search(r'="-?(nan|inf)', page(report))
    report.plot(tmp_path / "a.svg")
    json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert len(report.tables()) == 2
    assert report.summary()


def test_the_schema_has_the_code_s_keys() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$id"] == f"urn:featcal-fast:drift:{ff.DriftReport.schema_version}"
    parts = {"layer": LayerSplit, "split": Split, "module": ModuleError}
    for name, cls in parts.items():
        keys = SCHEMA["$defs"][name]["properties"]
        assert keys.keys() == {item.name for item in fields(cls)} | ({"mean", "removed"} if name == "layer" else set())
        assert set(SCHEMA["$defs"][name]["required"]) == set(keys)
        assert all(each["description"] for each in keys.values())
    assert SCHEMA["properties"].keys() == {item.name for item in fields(ff.DriftReport)} | {"schema_version"}


def test_what_is_read_of_a_report() -> None:
    text = made_up(2, ["a"]).to_json()
    VALIDATOR.validate(json.loads(text))
    assert ff.DriftReport.from_json(text) == replace(made_up(2, ["a"]))
    later = json.loads(text) | {"schema_version": 2}
    for wrong in ("", "[]", json.dumps(later), text.replace('"index": 0', '"index": "0"')):
        with pytest.raises(CheckpointError, match="drift: it cannot be read"):
            ff.DriftReport.from_json(wrong)
