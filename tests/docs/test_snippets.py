"""Everything that README and docs show is done, page by page, as a reader would: snippets, recipes, commands, links."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from launches import check_calibrate, check_torchrun
from pages import PAGES, ROOT, Block, Page
from typer.testing import CliRunner

import featcal_fast as ff
from featcal_fast import cli
from featcal_fast.data.batches import load_batches
from featcal_fast.errors import DataError

OUT = "models/calibrated"  # where the folder's recipe writes
UNCHECKED = ("text", "{eval-rst}")  # kinds of blocks: what is printed; what Sphinx makes of docstrings
# Commands that are not ours to run, by their first words.
OTHERS = ("git clone", "cd", "source", "python -m venv", "python -m pytest", "pip install", "python -m pip install")


class _Accepted(Exception):
    """A parser accepted its arguments."""


class Reader:
    """Does what a page says.

    Args:
        page: whose blocks to follow, in order.
        folder: with models, data and recipe, the working directory.
    """

    def __init__(self, page: Page, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.page, self.folder, self._monkeypatch = page, folder, monkeypatch
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self._do = {
            "python": self._run_python,
            "yaml": lambda block: self._check_recipe(block, yaml.safe_load(block.text)),
            "yaml fragment": lambda block: self._check_recipe(block, self._completed(yaml.safe_load(block.text))),
            "json lines": self._check_samples,
            "console": self._run_commands,
            "shell": self._check_syntax,
        }

    def follow(self) -> None:
        for block in self.page.blocks:
            # Each block but one that reads it may write the recipe's output.
            if block.kind.startswith("yaml") or OUT not in block.text:
                shutil.rmtree(self.folder / OUT, ignore_errors=True)
            if block.kind not in UNCHECKED:
                assert block.kind in self._do, (
                    f"{self.page.path}:{block.line}: found a block of kind {block.kind!r}, expected one of "
                    f"{', '.join([*self._do, *UNCHECKED])}"
                )
                self._do[block.kind](block)

    def _run_python(self, block: Block) -> None:
        # Empty lines before it: a traceback then names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.text, str(self.page.path), "exec"), self.namespace)

    def _check_recipe(self, block: Block, values: Mapping[str, Any]) -> None:
        path = self.folder / f"line-{block.line}.yaml"
        path.write_text(yaml.safe_dump(values))
        recipe = ff.Recipe.load(path)
        named = [recipe.base_model, recipe.merged_model]
        named += [name for expert in recipe.experts.values() for name in (expert.model, expert.data)]
        if all(name is None or (self.folder / name).exists() for name in named):
            assert ff.plan(path).calibrated

    def _completed(self, fragment: Mapping[str, Any]) -> dict[str, Any]:
        """The folder's recipe with a fragment's keys."""
        values = yaml.safe_load((self.folder / "recipe.yaml").read_text())
        if "merge" in fragment:
            del values["merged_model"]
        return _joined(values, fragment)

    def _check_samples(self, block: Block) -> None:
        for number, line in enumerate(block.text.splitlines()):
            path = self.folder / "data" / f"line-{block.line + number}.jsonl"
            path.write_text(line)
            assert load_batches(path, folders=[self.folder / "models" / "merged"])

    def _check_syntax(self, block: Block) -> None:
        """What only a person does, with a network and for good: a release."""
        assert self.page.path.name == "releasing.md", f"{self.page.path}:{block.line}: use a console block"
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)

    def _run_commands(self, block: Block) -> None:
        for line in block.text.replace("\\\n", " ").splitlines():
            for command in line.partition(" #")[0].split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
                    del words[0]
                if words:
                    self._run_command(words, f"{self.page.path}:{block.line}: {' '.join(words)}")

    def _run_command(self, words: list[str], where: str) -> None:
        line = " ".join(words).replace("python3", "python")
        if words[0] == "featcal-fast":
            self._run_ours(words[1:], where)
        elif words[0] == "torchrun":
            check_torchrun(words[1:])
        elif words[0] == "sbatch" or words[:3] == ["kubectl", "apply", "-f"]:
            script = words[1] if words[0] == "sbatch" else words[3]
            assert (ROOT / script).is_file(), f"{where}: no such file"
        elif line.startswith("python -m bench"):
            self._parse(words[2], words[3:], where)
        elif re.match(r"python \S+\.py\b", line):
            assert (ROOT / words[1]).is_file(), f"{where}: no such script"
        else:
            assert line.startswith(OTHERS), f"{where}: nobody checks this command"
            for extras in re.findall(r"\[([\w,-]+)\]", line):
                assert set(extras.split(",")) <= _extras(), f"{where}: found {extras}, expected some of {_extras()}"

    def _run_ours(self, arguments: list[str], where: str) -> None:
        if arguments[0] == "demo":  # has tests of its own, and takes minutes
            demo = typer.main.get_command(cli.app).commands["demo"]  # type: ignore[attr-defined]
            demo.make_context("demo", arguments[1:])
            return
        if arguments[0] == "calibrate" and "--gpus" in arguments:  # which are not here
            check_calibrate(arguments[1:])
            return
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, f"{where}: {result.exception!r}\n{result.output}"

    def _parse(self, module: str, arguments: list[str], where: str) -> None:
        """Run a module up to where its parser has accepted the arguments."""
        found = find_spec(module)
        assert found is not None, f"{where}: no such module"
        main = find_spec(f"{module}.__main__") if found.submodule_search_locations else found
        assert main is not None, f"{where}: not to be run"
        assert main.origin is not None
        if not arguments and "argparse" not in Path(main.origin).read_text():
            return
        parse = ArgumentParser.parse_args

        def accept(*args: Any, **kwargs: Any) -> None:
            parse(*args, **kwargs)
            raise _Accepted

        with self._monkeypatch.context() as patch:
            patch.setattr(ArgumentParser, "parse_args", accept)
            patch.setattr(sys, "argv", [module, *arguments])
            with pytest.raises(_Accepted):
                runpy.run_module(module, run_name="__main__")


def _joined(values: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `more` first; mappings in them likewise."""
    joined = {**values, **more}
    both = (key for key in values.keys() & more.keys() if isinstance(values[key], dict) and isinstance(more[key], dict))
    return joined | {key: _joined(values[key], more[key]) for key in both}


def _extras() -> set[str]:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = ", section, re.MULTILINE))


def check_links(page: Page) -> None:
    """Links within the project lead to a file, and in a page to a heading; files that are only named are there, too."""
    for name in page.files:
        assert (ROOT / name).exists(), f"{page.path}: there is no {name}"
    for link in page.links:
        if re.match(r"https://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.path if not name else (page.path.parent / name).resolve()
        assert ROOT in target.parents or target == ROOT, f"{page.path}: {link} leads out of the project"
        assert target.exists(), f"{page.path}: {link} leads nowhere"
        if anchor:
            there = page if target == page.path else Page(target)
            assert anchor in there.anchors, f"{page.path}: {link}: no such heading; there are {sorted(there.anchors)}"


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules after import of package")  # where only parsers are wanted
@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_what_a_page_shows_works(path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Reader(Page(path), workspace, monkeypatch).follow()


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_lead_somewhere(path: Path) -> None:
    check_links(Page(path))


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_a_page_has_one_title(path: Path) -> None:
    assert [level for level, _ in Page(path).headings].count(1) == 1


def test_the_index_names_every_page() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in Page(index).links if "://" not in link}
    assert linked >= set((ROOT / "docs").glob("*.md")) - {index}


@pytest.mark.parametrize(
    ("kind", "text", "error", "message"),
    [
        ("python", "raise ValueError('no')", ValueError, "no"),
        ("python", "import featcal_fast as ff\nff.Settings(ridge=1)", TypeError, "ridge"),
        ("yaml", "base_model: models/base", ff.FeatCalError, "experts: missing"),
        ("yaml fragment", "sample: 3", ff.FeatCalError, "did you mean 'samples'"),
        ("yaml fragment", "settings: {include: [q_prj]}", ff.FeatCalError, "matches no module"),
        ("yaml fragment", "merge: {method: tiez}", ff.FeatCalError, "merge.method"),
        ("json lines", '{"txt": "a"}', DataError, "found the keys txt"),
        ("console", "featcal-fast plan recipe.yaml --device-mem 2GiB", AssertionError, "No such option"),
        ("console", "featcal-fast plan recipe.yaml --host-memory 1MiB", AssertionError, "MemoryBudgetError"),
        ("console", "featcal-fast demo --fast", Exception, "No such option"),
        ("console", "featcal-fast plan recipe.yaml && featcal-fast pla recipe.yaml", AssertionError, "No such command"),
        ("console", "python -m bench.compare --no-such-option", SystemExit, "2"),
        ("console", "python -m bench.nothing", AssertionError, "no such module"),
        ("console", "pip install -e '.[everything]'", AssertionError, "found everything"),
        ("console", "rm -r models  # careful", AssertionError, "nobody checks"),
        ("console", "featcal-fast calibrate recipe.yaml --gpus 8 --node 2", Exception, "No such option"),
        ("console", "torchrun --nproc-per-gpu 8 -m featcal_fast calibrate recipe.yaml", SystemExit, "2"),
        ("console", "torchrun --nproc-per-node 8 -m featcal_fast calibrate r.yaml --gpu", Exception, "No such option"),
        ("console", "sbatch examples/nothing.sbatch recipe.yaml", AssertionError, "no such file"),
        ("shell", "ls", AssertionError, "use a console block"),
        ("bash", "ls", AssertionError, "of kind 'bash'"),
    ],
)
def test_what_is_wrong_is_found(
    kind: str, text: str, error: type[BaseException], message: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Page(workspace / "page.md", f"# A page\n\n```{kind}\n{text}\n```\n")
    with pytest.raises(error, match=re.escape(message)):
        Reader(page, workspace, monkeypatch).follow()


@pytest.mark.parametrize(
    "text",
    ["[a](nothing.md)", "[a](../README.md#nothing)", "[a](../../nothing.md)", "[a](#nothing)", "`bench/nothing.py`"],
)
def test_links_that_lead_nowhere_are_found(text: str) -> None:
    check_links(Page(ROOT / "docs" / "page.md", "# A page\n\n[a](../README.md#limits), `bench/README.md`\n"))
    with pytest.raises(AssertionError, match="nothing"):
        check_links(Page(ROOT / "docs" / "page.md", f"# A page\n\n{text}\n"))
