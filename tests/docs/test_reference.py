"""Every key, setting, option, variable, error and figure of the reference pages is the code's, and none is left out."""

from __future__ import annotations

import ast
import inspect
import json
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from pages import ROOT, Page, codes

import featcal_fast as ff
from featcal_fast import cli, errors, settings
from featcal_fast.checkpoints import STORAGES
from featcal_fast.checkpoints.cached import BITS, BLOCKSIZES
from featcal_fast.data.kinds import TEXT_KINDS
from featcal_fast.data.packed import PACKINGS
from featcal_fast.data.preprocess import VOCABULARIES
from featcal_fast.data.samples import IMAGE_SUFFIXES, SUPPORTED, TABLE_SUFFIXES
from featcal_fast.data.text_files import TEXT_FORMS
from featcal_fast.errors import FeatCalError
from featcal_fast.inputs.task_data import CHUNK_TOKENS
from featcal_fast.job.interrupts import ENDING
from featcal_fast.layer.solve import MAX_CONDITION_FLOAT32, RAISES
from featcal_fast.merging.methods import METHODS
from featcal_fast.models import families_table
from featcal_fast.ranks.panels import row_panels
from featcal_fast.settings import MOST_SHARDS
from featcal_fast.untrusted.documents import YAML_BYTES, parse_yaml

RECIPES, DATA, MEMORY, PYTHON, FAMILIES, METHOD, REPORT, RANKS = (
    Page(ROOT / "docs" / f"{name}.md")
    for name in ("recipes", "data", "memory", "python", "families", "method", "report", "several-gpus")
)
CHOICES = {
    "preset": settings.PRESETS,
    "ridge_scale": settings.RIDGE_SCALES,
    "calibrate_bias": (True, False),
    "calibrate_layernorm": (True, False),
    "forward_dtype": settings.FORWARD_DTYPES,
    "moment_dtype": settings.MOMENT_DTYPES,
    "solve_dtype": settings.SOLVE_DTYPES,
    "compile_blocks": (True, False, None),
    "auto": (True, False),
    "keep_better": (True, False),
}
# What the page says of a number: values within, and values beyond.
RANGES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "0 to 1e6": ((0, 1e-9, 1e6), (-1e-9, 1.1e6, "a")),
    "1e-12 to 1": ((1e-12, 1), (0, -1, 1.1)),
    "0 to 1e6, `null`": ((0, 1e6, None), (-1e-9, "a")),
    "0 to 1": ((0, 0.5, 1), (-0.01, 1.01)),
    f"1 to {MOST_SHARDS:,}": ((1, MOST_SHARDS), (0, MOST_SHARDS + 1, 1.5, True)),
    "-100 to 100": ((-100, 0, 100), (-101, 101, float("inf"), "a")),
    "pattern or list": (("a.*", ["a", "b"], None), (7, [], ["a", 1], "(", ["a"] * 1001)),
}


@pytest.mark.parametrize(
    ("heading", "cls"), [("Keys", ff.Recipe), ("Experts", ff.ExpertRecipe), ("Merge", ff.MergeRecipe)]
)
def test_keys_of_a_recipe(heading: str, cls: type) -> None:
    known = {item.name: item for item in fields(cls) if item.name != "root"}
    rows = {codes(key)[0]: default for key, default, *_ in RECIPES.table(heading)}
    assert rows.keys() == known.keys()
    for name, said in rows.items():
        if name != "settings":  # by its preset
            assert said == _default(known[name]), name


@pytest.mark.parametrize(
    ("key", "said", "least", "most"),
    [
        ("samples", "1 to 2^31 - 1", 1, 2**31 - 1),
        ("max_length", "1 to 2^31 - 1", 1, 2**31 - 1),
        ("batch_size", "1 to 2^31 - 1", 1, 2**31 - 1),
        ("seed", "0 to 2^63 - 1", 0, 2**63 - 1),
        ("merge.scaling", "-100 to 100", -100, 100),
        ("merge.t", "0 to 1", 0, 1),
        ("merge.seed", "0 to 2^63 - 1", 0, 2**63 - 1),
        ("merge.steps", "1 to 100,000", 1, 100_000),
    ],
)
def test_ranges_of_numbers(key: str, said: str, least: int, most: int) -> None:
    part, _, name = key.rpartition(".")
    (row,) = (row[2] for row in RECIPES.table("Merge" if part else "Keys") if codes(row[0]) == [name])
    assert said in row
    method = next((each for each, has in METHODS.items() if name in has.defaults), "average")

    def load(value: int) -> ff.Recipe:
        merge = {"method": method, **({name: value} if part else {})}
        experts = {each: {"model": "a", "data": "a"} for each in ("a", "b")}
        values = {"base_model": "base", "merge": merge, "experts": experts}
        return ff.Recipe.load(values if part else {**values, name: value})

    for value in (least, most):
        load(value)
    for value in (least - 1, most + 1):
        with pytest.raises(FeatCalError, match=f"{key}: found {value}, expected a number from"):
            load(value)


def test_how_long_a_recipe_may_be(tmp_path: Path) -> None:
    assert f"{YAML_BYTES // 2**10} KiB" in RECIPES.path.read_text()
    path = tmp_path / "recipe.yaml"
    path.write_text("#" * (YAML_BYTES + 1))
    with pytest.raises(FeatCalError, match=f"{YAML_BYTES + 1} bytes long"):
        ff.Recipe.load(path)


def _default(key: Field) -> str:
    if key.default is MISSING:
        return "required"
    return "none" if key.default is None else f"`{key.default}`"


def test_settings() -> None:
    known = {item.name: item.default for item in fields(ff.Settings)}
    rows = {codes(key)[0]: (default, values) for key, default, values, _ in RECIPES.table("Settings")}
    assert rows.keys() == {"preset", *known}
    assert codes(rows["preset"][0]) == ["default"]
    assert ff.Settings.from_dict({}) == ff.Settings()
    for name, default in known.items():
        assert _value(rows[name][0]) == default, name


@pytest.mark.parametrize("row", RECIPES.table("Settings"), ids=lambda row: row[0])
def test_values_of_settings(row: list[str]) -> None:
    name, values = codes(row[0])[0], row[2]
    if name in CHOICES:
        said = [yaml.safe_load(code) for code in codes(values)]
        assert said == list(CHOICES[name])
        assert ", ".join(f"`{code}`" for code in codes(values)) == values
        good, bad = said, ["something else"]
    else:
        good, bad = RANGES[values]
    for value in good:
        ff.Settings.from_dict({name: value})
    for value in bad:
        with pytest.raises(FeatCalError, match=f"settings.{name}"):
            ff.Settings.from_dict({name: value})


def test_presets() -> None:
    rows = {codes(row[0])[0]: row[1:4] for row in RECIPES.table("Presets")}
    assert rows.keys() == ff.PRESETS.keys()
    for name, preset in ff.PRESETS.items():
        ridge, rho, alpha = (parse_yaml(value.encode()) for value in rows[name])
        assert preset == ff.Settings(ridge_lambda=ridge, anchor_rho=rho, teacher_alpha=alpha, auto=name == "auto")


def test_choices_of_a_recipe() -> None:
    (storage,) = (row[2] for row in RECIPES.table("Keys") if codes(row[0]) == ["expert_storage"])
    assert tuple(codes(storage.partition(": ")[2])) == STORAGES


def test_methods_of_merging() -> None:
    rows = {codes(row[0])[0]: row[1:] for row in RECIPES.table("Methods of merging")}
    assert list(rows) == list(METHODS)
    for name, (_, options, source) in rows.items():
        method = METHODS[name]
        said = dict(parse_yaml(f"{{{code}}}".encode()).popitem() for code in codes(options) if code != "weights")
        assert said == method.defaults, name
        assert ("`weights`" in options) == method.weighted, name
        assert source


def test_options_of_the_commands() -> None:
    group: Any = typer.main.get_command(cli.app)
    taken: dict[str, set[str]] = {option: set() for parameter in group.params for option in parameter.opts}
    for name, command in group.commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                taken.setdefault(parameter.opts[0], set()).add(name)
    assert {codes(row[0])[0]: set(codes(row[1])) for row in PYTHON.table("Options")} == taken


def test_exit_codes(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*arguments: str, by: Callable[[], Any] = lambda: None) -> int:
        monkeypatch.setattr("featcal_fast.planning.planner.find_device", lambda *_, **__: by() or torch.device("cpu"))
        monkeypatch.setattr(sys, "argv", ["featcal-fast", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        found = {
            ended("plan", "recipe.yaml"),
            ended("plan", "recipe.yaml", "--host-memory", "1MiB"),
            ended("plan", "recipe.yaml", "--memory", "1MiB"),
            ended("plan", "recipe.yaml", by=lambda: ast.parse("(")),
            _checked_where_nothing_loads(ended, monkeypatch),
            ended("plan", "recipe.yaml", by=lambda: signal.raise_signal(signal.SIGINT)),
            ended("plan", "recipe.yaml", by=lambda: signal.raise_signal(signal.SIGTERM)),
            ended("plan", "recipe.yaml", by=lambda: signal.raise_signal(signal.SIGHUP)),
        }
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert found == {int(row[0]) for row in PYTHON.table("Exit codes")}


def _checked_where_nothing_loads(ended: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> int:
    ff.calibrate("recipe.yaml")
    with monkeypatch.context() as patch:
        patch.setattr("featcal_fast.job.check.check_loads", lambda out: ast.parse("("))
        return ended("check", "models/calibrated")


def test_environment_variables() -> None:
    files = [*(ROOT / "featcal_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    read = {name for file in files for name in variables(file.read_text())}
    assert read == {name for row in PYTHON.table("Environment variables") for name in codes(row[0])}


def variables(text: str) -> set[str]:
    """The environment variables that a module reads."""
    tree, found, understood = ast.parse(text), set(), 0
    for node in ast.walk(tree):
        match node:
            case (
                ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ")), args=[ast.Constant(name), *_])
                | ast.Subscript(value=ast.Attribute(attr="environ"), slice=ast.Constant(name))
                | ast.Call(func=ast.Attribute(attr="getenv"), args=[ast.Constant(name), *_])
            ):
                found.add(name)
                understood += 1
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr="items")):  # libraries' own
                understood += 1
    mentions = sum(
        getattr(node, "attr", getattr(node, "id", getattr(node, "name", None))) in ("environ", "getenv")
        for node in ast.walk(tree)
    )
    assert mentions == understood, "the environment is read in a way that this test does not understand"
    return found


def test_how_variables_are_found() -> None:
    text = "import os\nos.environ.get('A', 1)\nos.environ['B']\nos.getenv('C')\n"
    assert variables(text) == {"A", "B", "C"}
    for hidden in ("os.environ.copy()", "os.environ[name]", "from os import environ"):
        with pytest.raises(AssertionError, match="does not understand"):
            variables(hidden)


def test_errors() -> None:
    classes = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, FeatCalError)}
    assert {codes(row[0])[0] for row in PYTHON.table("Errors")} == classes.keys()


def test_the_report() -> None:
    """Every key of the schema has its line, and no other has one."""
    schema = json.loads((ROOT / "featcal_fast" / "reporting" / "report.schema.json").read_text())
    whole, parts = schema["properties"], schema["$defs"]
    tables = {
        "The run": [whole],
        "A layer": [parts["layer"]["properties"]],
        "A group": [parts["group"]["properties"]],
        "Phases": [whole["phases"]["properties"]],
        "Peaks": [whole["peaks"]["properties"]],
        "A rank": [parts["rank"]["properties"]],
        "Inputs": [parts[name]["properties"] for name in ("model", "file", "task")],
    }
    for heading, expected in tables.items():
        said = [key for row in REPORT.table(heading) for key in codes(row[0])]
        assert sorted(said) == sorted(key for each in expected for key in each), heading
    assert set(whole) == json.loads(ff.Report(ff.Settings(), "a family", "cpu", {}).to_json()).keys()


def test_calls() -> None:
    """Every function that is public, with arguments that it has."""
    rows = [codes(row[0])[0] for row in PYTHON.table("Python and pipelines")]
    public = {name for name in ff.__all__ if inspect.isfunction(getattr(ff, name))}
    assert {re.match(r"ff\.([\w.]+)", row)[1] for row in rows} == public | {"reference.calibrate_model"}  # type: ignore[index]
    for row in rows:
        function: Any = ff
        for part in row.partition("(")[0].split(".")[1:]:
            function = getattr(function, part)
        named = re.findall(r"\w+", row.partition("(")[2])
        assert inspect.signature(function).parameters.keys() >= set(named), row


def test_sources_of_data() -> None:
    said = {suffix for row in DATA.table("Sources") for suffix in codes(row[0]) if suffix.startswith(".")}
    files = {f".{suffix}" for suffix in re.findall(r"\.(\w+) file", SUPPORTED)}
    assert len(files) == 2
    assert said == files | {*TEXT_FORMS} | PACKINGS | IMAGE_SUFFIXES | TABLE_SUFFIXES
    assert all(f"{suffix}" in SUPPORTED for suffix in {*TEXT_FORMS} | PACKINGS)
    assert [tuple(codes(row[0])) for row in DATA.table("Texts")] == list(TEXT_KINDS)
    text = DATA.path.read_text()
    assert all(f"`{name}`" in text for name in VOCABULARIES)


def test_items_of_a_plan(workspace: Path) -> None:
    """Those that plans have are explained; and none that the planner does not know."""
    said = {code for row in MEMORY.table("What is in memory") for code in codes(row[0])}
    kept = {"expert_storage": "host", "settings": {"compile_blocks": True}}
    recipe = yaml.safe_load((workspace / "recipe.yaml").read_text())
    plans = [ff.plan({**recipe, **kept}), ff.plan(recipe, device="cuda", device_memory=2**34, scratch=workspace)]
    assert said >= {item for plan in plans for items in (plan.host, plan.device_items, plan.disk) for item in items}
    planner = [*(ROOT / "featcal_fast" / "planning").glob("*.py"), ROOT / "featcal_fast" / "streaming" / "streams.py"]
    modules = [ast.parse(file.read_text()) for file in planner]
    assert said <= {node.value for tree in modules for node in ast.walk(tree) if isinstance(node, ast.Constant)}


def test_figures_of_memory() -> None:
    text = MEMORY.path.read_text()
    assert f"{CHUNK_TOKENS['cuda']:,} tokens on a GPU and {CHUNK_TOKENS['cpu']:,} on a CPU" in text
    rows = {codes(row[0])[0]: row[1:] for row in MEMORY.table("Experts in host memory")}
    assert rows.keys() == set(STORAGES)
    for name, size in BLOCKSIZES.items():
        assert float(rows[name][0]) == pytest.approx(BITS[name] / 8 + 4 / size, abs=0.005)
        assert f"blocks of {size} values" in rows[name][1]


def test_figures_of_the_ladder() -> None:
    text = METHOD.path.read_text()
    assert f"at most {MAX_CONDITION_FLOAT32:,.0f}," in text
    assert f"by {_power(RAISES[0])} of its mean, then tenfold, up to {_power(RAISES[-1])}." in text
    assert all(after == pytest.approx(10 * before) for before, after in pairwise(RAISES))


def test_figures_of_ranks() -> None:
    """Llama 3.1's widths: hidden states, keys, MLP; and its layers."""
    models = {"8B": (4096, 1024, 14336, 32), "70B": (8192, 1024, 28672, 80), "405B": (16384, 1024, 53248, 126)}
    text, columns = " ".join(RANKS.path.read_text().split()), []
    for name, (hidden, keys, wide, layers) in models.items():
        groups = [(hidden, hidden + 2 * keys), (hidden, hidden), (hidden, 2 * wide), (wide, hidden)]
        # Of each panel of rows all from its first diagonal entry on.
        parts = [(size, rows) for size, _ in groups for rows in row_panels(size, size)]
        left = 4e-9 * layers * sum((rows.stop - rows.start) * (size - rows.start) for size, rows in parts)
        right = 4e-9 * layers * sum(size * out for size, out in groups)
        columns.append([f"{each:,.0f}" for each in (left + right, left, right, right / 2)])
        whole = 4 / 2**30 * sum(size * (size + out) for size, out in groups)
        assert re.search(rf" {whole:.2g} GiB for (a layer of Llama 3.1|one of) {name},", text)
    assert [row[1:] for row in RANKS.table("Bytes")] == [list(row) for row in zip(*columns, strict=True)]


def test_what_was_measured_of_ranks() -> None:
    """The page's table and speed-ups are those of the results."""
    found = json.loads((RANKS.path.parents[1] / "bench/results/scale-cpu.json").read_text())
    text, measured = " ".join(RANKS.path.read_text().split()), found["measured"]
    two, four = measured["2 ranks"], measured["4 ranks"]
    assert f"Two ranks were {two['speed_up']} times as fast as one in layers" in text
    assert f"the model below says {two['model_speed_up']} by" in text
    assert f"share the two cores, {four['speed_up']} times" in text
    for name, ranks, seconds, *cells, device in RANKS.table("What was measured"):
        model, tasks = re.fullmatch(r"(\w+), (\d) tasks", name).groups()
        where = "alone" if ranks == "1" else "{} ranks, {} shards, {} GB/s".format(*re.findall(r"\d+", ranks))
        row = found["by the model alone"][f"Llama {model}, K = {tasks}, {where}"]
        value, unit = seconds.split()
        assert float(value) == pytest.approx(3600 * row["hours"] / {"s": 1, "min": 60}[unit], rel=0.06)
        speed_up, efficiency, received = (float(cell.strip("% GB").replace(",", "")) for cell in cells)
        assert speed_up == pytest.approx(row["speed_up"], rel=0.02)
        assert efficiency == pytest.approx(100 * row["efficiency"], abs=0.6)
        assert received == pytest.approx(row["received_GB"], abs=0.6)
        assert float(device.removesuffix(" GiB")) == pytest.approx(row["device_GiB"], abs=0.51)


def test_families() -> None:
    """`python -m bench.readme` puts the table there."""
    inside = FAMILIES.path.read_text().partition("<!-- families -->\n")[2].partition("<!-- /families -->")[0]
    assert inside == families_table()


def _value(cell: str) -> Any:
    (code,) = codes(cell)
    return parse_yaml(code.encode())


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")
