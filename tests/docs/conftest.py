"""The folder in which everything that the docs show is done: pico models, a tokenizer, data and a recipe."""

import json
import shutil

import pico
import pytest
import yaml
from data_files import TEMPLATE

RECIPE = {
    "base_model": "models/base",
    "merged_model": "models/merged",
    "experts": {
        "math": {"model": "models/math", "data": "data/math.jsonl"},
        "code": {"model": "models/code", "data": "data/code.jsonl"},
    },
    "settings": {"preset": "llm"},
    "out": "models/calibrated",
}

MERGEKIT = {
    "merge_method": "task_arithmetic",
    "base_model": "models/base",
    "models": [{"model": "models/math"}, {"model": "models/code"}],
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Models and data, made once."""
    folder = tmp_path_factory.mktemp("docs")
    job = pico.job("llama", 2, vocab_size=300, max_position_embeddings=1024)
    for name, model in zip(
        ("base", "merged", "math", "code"), (job.base, job.merged, *job.experts.values()), strict=True
    ):
        model.save_pretrained(folder / "models" / name)
        save_byte_tokenizer(folder / "models" / name)
    (folder / "data").mkdir()
    texts = [{"text": f"{i} and {i} make {2 * i}."} for i in range(24)]
    pairs = [{"prompt": f"print({i}", "completion": f" + {i})"} for i in range(24)]
    for name, lines in (("math", texts), ("code", pairs)):
        (folder / "data" / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        shutil.copy(folder / "data" / f"{name}.jsonl", folder)  # where the README has it
    (folder / "models" / "merged" / "mergekit_config.yml").write_text(yaml.safe_dump(MERGEKIT))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return folder


@pytest.fixture
def workspace(made, tmp_path, monkeypatch):
    """A copy of the folder, to work in."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # For programs only, says its docstring: pytest is none of ours.
    monkeypatch.setattr("featcal_fast.cli.configure_process", lambda: None)
    return folder


def save_byte_tokenizer(folder):
    """A tokenizer that reads any text, a byte a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    wrapper.save_pretrained(folder)
