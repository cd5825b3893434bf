"""What a model that was made says of itself: read by the hub's own library, true, and published without harm."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pico
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from runs import Stop

import featcal_fast as ff
from featcal_fast import files
from featcal_fast.job.card import model_name
from featcal_fast.job.check import check
from featcal_fast.reporting.card import LAYERS, Name, Origin, card
from featcal_fast.reporting.markdown import code, escaped
from featcal_fast.reporting.own_card import LARGEST, OwnCard, read_card
from featcal_fast.reporting.plot import drift_svg
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import GroupReport, LayerReport, Report
from featcal_fast.settings import Settings

MERGEKIT = """---
base_model:
- org/base
- org/coder
library_name: transformers
tags:
- mergekit
- merge

---
# union

This is a merge of pre-trained language models created using [mergekit](https://github.com/cg123/mergekit).

## Merge Details
### Merge Method

This model was merged using the [Task Arithmetic](https://arxiv.org/abs/2212.04089) merge method using ./base as a base.

### Configuration

```yaml
# the whole of it
merge_method: task_arithmetic
```
"""
READER = MarkdownIt("commonmark", {"html": True}).enable("table")
HOSTILE = [
    "a|b",
    "a\\|b",
    "``` `x` ```",
    "<script>alert(1)</script>",
    "*bold* _x_ ~y~ [a](http://b.c) ![i](j)",
    "# heading",
    "https://evil.example www.evil.example a@b.example &lt; &#60;",
    "- 1. > x",
    "---",
    "\\",
    " `",
    "__init__ a_b _c",
]


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return pico.save(pico.job("llama", 2, layers=2), tmp_path)


def loaded(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def read(text: str) -> tuple[dict[str, Any], str]:
    found = ModelCard(text)
    return found.data.to_dict(), found.text


def origin(**changes: Any) -> Origin:
    values: dict[str, Any] = {
        "title": "out",
        "merged": Name("merged"),
        "base": Name("base"),
        "experts": {"math": [Name("math")], "code": [Name("code")]},
        "data": {"math": "math.jsonl", "code": "code.jsonl"},
        "recipe": {"base_model": "base"},
        "folders": frozenset({"base", "merged", "math", "code"}),
        "own": None,
        "config": {},
        "files": (),
    }
    return Origin(**{**values, **changes})


def report(layers: int = 2, **changes: Any) -> Report:
    groups = [GroupReport(["q", "k"], 4, 8, "input", "float32", 0.1)]
    found = [LayerReport(number, 0.5 + number, 0.25 + number, 1.0, groups, []) for number in range(layers)]
    return replace(Report(Settings(), "decoder", "cpu", {"math": 1234, "code": 5}, found, {"head": "why"}), **changes)


def own(text: str) -> Origin:
    return origin(own=read_card(text.encode()))


# A run's


def test_a_merge_of_mergekits(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merged" / "README.md").write_text(MERGEKIT)
    (tmp_path / "merged" / "mergekit_config.yml").write_text("merge_method: task_arithmetic\n")
    made = ff.calibrate(recipe)
    found = loaded(tmp_path / "out")
    assert found.data.to_dict() == {
        "base_model": ["org/base", "org/coder"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "featcal", "mergekit"],
    }
    text = found.text
    assert f"**{made.calibrated} of {made.calibrated + len(made.kept)} linear weights were calibrated**" in text
    for task in ("task0", "task1"):
        samples, tokens = made.inputs.data[task].samples, made.tokens[task]
        assert f"| `{task}` | `{task}` | `{task}.safetensors` | {samples} | {tokens:,} |" in text
    for layer in made.layers:
        assert f"| {layer.index} | {layer.drift_before:.4f} | {layer.drift_after:.4f} |" in text
    assert "![Drift of every layer, before and after](drift.svg)" in text
    assert (tmp_path / "out" / "drift.svg").read_text() == drift_svg(made.layers)
    assert all(escaped(each) in text for each in made.warnings)
    assert made.warnings
    assert all(f"`{name}` {escaped(version)}" in text for name, version in made.versions.items())
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "featcal-fast check out\n" in text
    ending = text[text.index("## The merged model's own card") :]
    assert "#### Merge Details\n##### Merge Method\n" in ending
    assert "```yaml\n# the whole of it\nmerge_method: task_arithmetic\n```" in ending
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == "merge_method: task_arithmetic\n"
    assert check(tmp_path / "out").whole
    (tmp_path / "out" / "README.md").write_text(MERGEKIT)
    assert check(tmp_path / "out").problems == ["README.md is not as it was written"]


def test_a_published_recipe_is_one_and_tells_nothing_of_this_machine(recipe: dict[str, Any], tmp_path: Path) -> None:
    settings = {"ridge_lambda": 1e-05, "include": ["q_proj"]}
    ff.calibrate({**recipe, "settings": settings})
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert not re.search(r"(?<![\w/<:.])/[a-z]", text.replace("norm(H - H_expert) / norm", ""))
    (block,) = re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    values = yaml.safe_load(block)
    assert values["experts"]["task1"] == {"model": "task1", "data": "task1.safetensors"}
    assert (values["base_model"], values["merged_model"], values["out"]) == ("base", "merged", "out")
    assert ff.Recipe.load(values).settings == Settings.from_dict(settings)


def test_warnings_tell_nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a path ends is not told by blanks: folders may have them in their names."""
    folder = tmp_path / "Jane Doe" / "it's secret"
    recipe = pico.save(pico.job("llama", 2, layers=2), folder)
    named = [folder / "merged", *(folder / each["data"] for each in recipe["experts"].values())]
    told = [f"left out, such as {path}, line 3 (tokenizer of {path})" for path in named]
    monkeypatch.setattr("featcal_fast.job.run.about_run", lambda report: [*told, "and of '/else/where/x.jsonl'"])
    ff.calibrate(recipe)
    text = unescape((Path(recipe["out"]) / "README.md").read_text())
    assert "and of 'x.jsonl'" in text
    assert all(f"such as {path.name}, line 3 (tokenizer of {path.name})" in text.replace("\\", "") for path in named)
    assert not re.search("Doe|secret", text)


def test_a_run_that_was_stopped_gives_the_same(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merged" / "README.md").write_text(MERGEKIT)
    ff.calibrate(recipe, out=tmp_path / "one" / "out")
    with pytest.raises(KeyboardInterrupt):
        ff.calibrate(recipe, out=tmp_path / "two" / "out", progress=Stop(1), checkpoint_every=1)
    ff.calibrate(recipe, out=tmp_path / "two" / "out", resume=True)
    for name in ("README.md", "drift.svg"):
        assert (tmp_path / "one" / "out" / name).read_bytes() == (tmp_path / "two" / "out" / name).read_bytes()
    assert check(tmp_path / "two" / "out").whole


def test_a_merge_says_that_it_is_not_calibrated(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "base" / "README.md").write_text(
        "---\nlicense: mit\ntags: [pretrained]\nbase_model: org/older\n---\n# Base\n\nThe best base model.\n"
    )
    del recipe["merged_model"]
    recipe["merge"] = {"method": "task_arithmetic", "scaling": 0.25}
    out = ff.merge(recipe)
    found = loaded(out)
    assert found.data.to_dict() == {
        "base_model": [],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "license": "mit",
        "tags": ["merge", "featcal"],
    }
    assert "**It is not calibrated.**" in found.text
    assert "`task_arithmetic` of base and experts, scaling 0.25" in found.text
    assert str(tmp_path) not in found.text
    assert found.text.index("# out") < found.text.index("## The base model's own card") < found.text.index("### Base")
    ff.calibrate(recipe, out=tmp_path / "calibrated")
    text = loaded(tmp_path / "calibrated").text
    assert "| merged | `task_arithmetic` of base and experts, scaling 0.25 |" in text
    assert "## The base model's own card" in text


def test_pictures_of_the_merged_model_are_kept(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merged" / "Drift.svg").write_text("another")
    (tmp_path / "merged" / "drift-2.svg").write_text("one more")
    (tmp_path / "merged" / "README.md").write_text("![](drift-2.svg)\n")
    made = ff.calibrate(recipe)
    out = tmp_path / "out"
    assert [(out / name).read_text() for name in ("Drift.svg", "drift-2.svg")] == ["another", "one more"]
    assert (out / "drift-3.svg").read_text() == drift_svg(made.layers)
    assert "(drift-3.svg)" in (out / "README.md").read_text()
    assert check(out).whole


def test_a_folder_that_is_called_like_the_picture_is_kept(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merged" / "Drift.svg").mkdir()
    (tmp_path / "merged" / "Drift.svg" / "one.txt").write_text("kept")
    made = ff.calibrate(recipe)
    out = tmp_path / "out"
    assert (out / "Drift.svg" / "one.txt").read_text() == "kept"
    assert (out / "drift-2.svg").read_text() == drift_svg(made.layers)
    assert check(out).whole


def test_nothing_is_read_for_a_card_once_layers_are_done(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be read at the end would cost all that was done before."""
    (tmp_path / "merged" / "README.md").write_text("# The merge\n")

    class Gone(Progress):
        def layer(self, report: LayerReport) -> None:
            monkeypatch.setattr(files, "read_bytes", unreadable)

    def unreadable(path: Path, *_: Any) -> bytes:
        if path.name == "README.md":
            raise OSError(5, "gone", str(path))
        return read(path, *_)

    read = files.read_bytes
    ff.calibrate(recipe, progress=Gone())
    assert "# The merge" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("data", [b"\xff\xfe\0", b"x" * (LARGEST + 1)], ids=["noise", "huge"])
def test_a_broken_card_stops_no_run(data: bytes, recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merged" / "README.md").write_bytes(data)
    ff.calibrate(recipe)
    assert loaded(tmp_path / "out").data.base_model == []
    assert (tmp_path / "out" / "README.md").stat().st_size < 2**15


def test_a_card_that_is_no_file_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "merged" / "README.md").mkdir()
    with pytest.raises(ff.FeatCalError, match=r"merged model: .*README.md is a folder, expected a file"):
        ff.plan(recipe)


# Names


def test_models_of_the_hub_are_told_by_their_ids(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Where they are in its cache; a folder that is called like one of its models is none."""
    cache = tmp_path / "hub" / "models--org--the-base" / "snapshots" / ("c0ffee" * 6 + "abcd")
    cache.parent.mkdir(parents=True)
    (tmp_path / "base").rename(cache)
    (tmp_path / "org").mkdir()
    (tmp_path / "task0").rename(tmp_path / "org" / "math")
    (tmp_path / "merged" / "README.md").write_text("---\nbase_model: [org/math, org/other]\n---\n")
    os.symlink(tmp_path, tmp_path / "root")
    recipe["experts"]["task0"]["model"] = "org/math"
    loaded_recipe = replace(
        ff.Recipe.load({**recipe, "base_model": str(tmp_path / "hub" / "models--org--the-base")}), root=tmp_path
    )
    ff.calibrate(loaded_recipe)
    found = loaded(tmp_path / "out")
    assert found.data.base_model == ["org/the-base", "org/other"]
    assert "| base | [org/the-base](https://huggingface.co/org/the-base) at `c0ffeec0ffee` |" in found.text
    assert "| `task0` | `math` |" in found.text
    assert f"base_model: org/the-base@{cache.name}\n" in found.text


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/a/models--org--name/snapshots/abc", Name("org/name", True, "abc")),
        ("/a/models--gpt2/snapshots/abc", Name("gpt2", True, "abc")),
        ("/a/models--<b>--name/snapshots/abc", Name("abc")),
        ("/a/models--org--na--me/snapshots/abc", Name("abc")),
        ("/a/org/name", Name("name")),
        ("/a/b\nc", Name("b\\nc")),
        ("/", Name("/")),
    ],
)
def test_names_of_folders(path: str, expected: Name) -> None:
    assert model_name(Path(path)) == expected


@pytest.mark.parametrize("name", HOSTILE)
def test_names_break_nothing(name: str) -> None:
    """Read as Markdown, each is what it was, where it was meant to be."""
    made = origin(
        title=name,
        base=Name(name),
        experts={name: [Name(name)]},
        data={name: name},
        recipe={"base_model": name, "experts": {name: {"data": name}}},
    )
    text = read(card(made, report(warnings=[f"see {name}"], tokens={name: 3})))[1]
    tokens = READER.parse(text)
    assert text.count(code(name)) >= 4
    assert len([each for each in tokens if each.type == "tr_open"]) == 4 + 3  # of both tables
    assert not any(each.type == "html_block" for each in tokens)
    assert next(each.tag for each in tokens if each.type == "heading_open") == "h1"
    assert sum(each.type == "list_item_open" for each in tokens) == 1  # the warning
    blocks = [each.content for each in tokens if each.type == "fence" and each.info == "yaml"]
    assert yaml.safe_load(blocks[0]) == made.recipe
    assert "<script>" not in READER.render(text)
    assert visible(code(name)) == name
    assert visible(f"# {escaped(name)}") == name.strip()  # as all headings are


def visible(text: str) -> str:
    """What a reader sees of a line."""
    return unescape(re.sub(r"</?(?:p|code|h1)>", "", READER.render(text))).removesuffix("\n")


def test_links_are_made_of_no_text() -> None:
    for name in HOSTILE:
        found = MarkdownIt("gfm-like", {"linkify": False}).parse(f"{escaped(name)} {code(name)}")
        kinds = {child.type for each in found for child in each.children or []}
        assert not kinds & {"link_open", "image"}, name
    assert "://" not in escaped("https://evil.example")
    assert "www." not in escaped("WWW.evil.example").lower()


def test_half_characters_can_be_written() -> None:
    made = card(origin(title="a\udc80", recipe={"out": "b"}), report())
    assert "\\\\udc80" in made
    made.encode()


# Tables


def test_many_layers_are_thinned() -> None:
    text = card(origin(), report(layers=80), "drift.svg")
    rows = [int(each) for each in re.findall(r"^\| (\d+) \| [\d.]+ \| [\d.]+ \|$", text, re.MULTILINE)]
    assert len(rows) == LAYERS
    assert (rows[0], rows[-1]) == (0, 79)
    assert rows == sorted(set(rows))
    assert "16 of 80 layers" in text
    assert "16 of" not in card(origin(), report(layers=16))
    assert "](drift.svg)" not in card(origin(), report(layers=16))
    assert "## Drift" not in card(origin(), report(layers=0))


def test_a_picture_is_one_however_odd_the_numbers() -> None:
    for before, after in ((0.0, 0.0), (1e-320, 0.0), (1e-9, 1e-10), (5e307, 1.0), (0.3, 0.31)):
        for count in (1, 2, 100):
            layers = [LayerReport(number, before, after, 1.0, [], []) for number in range(count)]
            root = ElementTree.fromstring(drift_svg(layers))
            places = [each.get(axis) for each in root.iter() for axis in ("x", "y", "cx", "cy")]
            assert all(0 <= float(each) <= 640 for each in places if each is not None)
            assert len(root.findall("{*}circle")) == 2 * count
            assert len([each for each in root.findall("{*}text") if each.get("text-anchor") == "end"]) <= 9
    assert drift_svg([LayerReport(0, float("inf"), 1.0, 1.0, [], [])]) == ""


# The card that a model came with


def test_metadata_that_stays_true_is_kept() -> None:
    text = (
        "---\nlicense: other\nlicense_name: mine\nlanguage:\n- en\n- no\npipeline_tag: text-generation\n"
        "library_name: sentence-transformers\ndatasets: org/data\ntags: [a, merge, 'b: c']\n"
        "extra_gated_prompt: |-\n  You agree\n\n  to all.\nwidget:\n- text: Hello\n  output: {x: 1.5}\n"
        "model-index:\n- name: x\n  results:\n  - task: {type: y}\n    dataset: {type: z, name: w}\n"
        "    metrics: [{type: acc, value: 1}]\n"
        "metrics: [accuracy]\nnew_version: org/other\nco2_eq_emissions: 5\nbase_model: org/one\n---\nText\n"
    )
    found, body = read(card(own(text), report()))
    assert found == {
        "base_model": ["org/one"],
        "base_model_relation": "merge",
        "library_name": "sentence-transformers",
        "license": "other",
        "license_name": "mine",
        "language": ["en", "no"],
        "pipeline_tag": "text-generation",
        "datasets": ["org/data"],
        "extra_gated_prompt": "You agree\n\nto all.",
        "widget": [{"text": "Hello", "output": {"x": 1.5}}],
        "tags": ["merge", "featcal", "a", "b: c"],
    }
    assert "before anything was done:\n\nText\n" in body


@pytest.mark.parametrize(
    ("front", "kept"),
    [
        ("license: [1, 2]\ntags: {a: b}\nbase_model: 7", {}),
        ("license: ''\nlicense_name: 2024-01-01", {"license_name": "2024-01-01"}),
        ('license: "a\\e[2Jb"\ntags: ["\\u202e", ok]', {"tags": ["ok"]}),
        ("pipeline_tag: <script>\nlibrary_name: a b", {}),
        ("base_model: ['../x', /etc/x, a/b/c, 'a b', '<x>/y', org/ok, ./src/base, a--b/c]", {"base_model": ["org/ok"]}),
        ("model-index:\n" + "- name: x\n  results: []\n" * 20_000 + "license: mit", {"license": "mit"}),
        (f"tags: [{', '.join(map(str, range(600)))}]", {}),
        ("ignore_metadata_errors: true\nself: 1\nyaml: 2", {}),
        ("license: mit\nlicense: apache-2.0", None),
        ("license: &a [x]\ntags: *b", None),
        ("tags: &a [*a]", None),
        ("license: !!python/object/apply:os.system [ls]", None),
        ("widget: " + "[" * 500, None),
        ("tags: &a [x, x]\nwidget: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\ninference: [" + "*b, " * 2000 + "]", None),
        ("tags: [\ud7ff`````]]", None),
    ],
)  # fmt: skip
def test_metadata_of_strangers(front: str, kept: dict[str, Any] | None) -> None:
    """What is not as it must be is left out; what cannot be read is shown, and nothing of it believed."""
    text = f"---\n{front}\n---\n# A model\n"
    found = read_card(text.encode())
    assert found.metadata == (kept or {})
    assert ("*Its metadata could not be read:*" in found.text) == (kept is None)
    values, body = read(card(origin(own=found), report()))
    assert values.items() >= {key: value for key, value in (kept or {}).items() if key != "tags"}.items()
    assert body.endswith("### A model\n")
    if kept is None:
        assert front in [each.content.removesuffix("\n") for each in MarkdownIt().parse(body) if each.type == "fence"]


@pytest.mark.parametrize(
    "text",
    ["No metadata\n", "---\nnot a mapping\n---\nrest\n", "---\nnever ended: 1\n", "----\na: b\n----\n"],
)
def test_a_card_without_metadata_is_text(text: str) -> None:
    assert read_card(text.encode()) == OwnCard(text=text)


def test_metadata_in_the_ways_of_other_systems() -> None:
    assert read_card(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# A\r\n") == OwnCard({"license": "mit"}, "# A\r\n")
    assert read_card(b"---\n---\n# A\n") == OwnCard(text="# A\n")
    assert read_card(b"\n---  \nlicense: mit\n---") == OwnCard({"license": "mit"}, "")
    assert read_card(b"---\n{license: mit, x: 1}\n---\n") == OwnCard({"license": "mit"}, "")
    assert read_card(b"---\n# all\n'license' : mit\n---\n") == OwnCard({"license": "mit"}, "")


def test_an_empty_card_is_no_section() -> None:
    for text in ("", "\n", "---\nlicense: mit\n---\n\n"):
        assert "own card" not in card(own(text), report())


def test_what_acts_on_terminals_is_gone() -> None:
    assert read_card("# \0\x1b[2J\x9b é\t数\r\n".encode()).text == "# [2J é\t数\r\n"


def test_what_cannot_be_a_text_is_said() -> None:
    assert "UTF-8" in read_card(b"\xff").text
    assert "1 MiB" in read_card(None).text
