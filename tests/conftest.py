"""Two processes for the whole suite, and what tests share: one thread, the command line, model folders, jobs."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache

import pytest
import torch
from data_files import TEMPLATE, save_tokenizer

PROCESSES = min(2, len(os.sched_getaffinity(0)))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite takes two processes, if pytest-xdist is there and the command line says nothing else.

    A few files that are named are sooner done in one: each process takes ten seconds to import what tests need.
    """
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    unsaid = config.getoption("numprocesses", 0) is None and not config.option.usepdb
    if whole and unsaid and PROCESSES > 1:
        config.option.numprocesses, config.option.dist = PROCESSES, "worksteal"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Pico models are too small for more: threads would cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("chat"), template=TEMPLATE)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Adds no special tokens and has no pad token."""
    return save_tokenizer(tmp_path_factory.mktemp("bare"), wrapped=False, pad_token=None)


@pytest.fixture
def write(tmp_path):
    """Writes objects, or lines as they are, to data.jsonl."""

    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def vision(tmp_path):
    """A model folder whose CLIP image processor makes 4 x 4 pixels of (value / 255 - 0.5) / 0.5."""
    folder = tmp_path / "vision"
    folder.mkdir()
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 4},
        "crop_size": {"height": 4, "width": 4},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The library, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture(autouse=True)
def _set_up_for_no_other() -> Iterator[None]:
    """What a test sets this process up for, as programs do, says nothing of the next test's."""
    yield
    if (malloc := sys.modules.get("featcal_fast.streaming.malloc")) is not None:
        malloc._configured = False


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable]:
    """Does in this process what would be typed, quicker than in one of its own; exit code, output and errors."""
    from featcal_fast import cli
    from featcal_fast.job.interrupts import ENDING

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["featcal-fast", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    # For programs only, says its docstring: pytest is none of ours.
    monkeypatch.setattr("featcal_fast.cli.configure_process", lambda: None)
    before = {number: signal.getsignal(number) for number in ENDING}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Models, and a merge of them as mergekit writes one; only to be read."""
    from merges import make_sources  # takes seconds

    return make_sources(tmp_path_factory.mktemp("mergekit"))


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """The working directory, with these in it."""
    from merges import make_work

    monkeypatch.chdir(tmp_path)
    return make_work(tmp_path, made)


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """Cases by kind of model and by whether hidden states are `on_disk`; each is made once."""
    from runs import make_case  # takes seconds

    @lru_cache
    def case(kind, on_disk=False):
        sizes = {"llama": {"layers": 2}, "clip": {"layers": 3}}.get(kind, {})
        return make_case(kind, tmp_path_factory.mktemp(kind), on_disk=on_disk, **sizes)

    return case


@pytest.fixture
def case(cases):
    """Three layers, hidden states in memory."""
    return cases("clip")
