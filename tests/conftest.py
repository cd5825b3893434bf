"""Fixtures of the tests: one thread, model folders with a tokenizer or an image processor, jobs that are run often."""

import json
from functools import lru_cache

import pytest
import torch
from data_files import TEMPLATE, save_tokenizer


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
