"""Good jobs of every kind, as small as they can be, and a copy of one to damage."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pico
import torch
import yaml
from data_files import TEMPLATE, save_image, save_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

LLAMA = {
    "layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 20,
    "max_position_embeddings": 64,
}
WEIGHTS = "model.safetensors"
QUANTISED = "model.layers.0.self_attn.q_proj"


@dataclass(frozen=True)
class Job:
    """A job's folder, `job`, alone in another one: what leaves it is seen.

    `base`, `merged`, `math` and `code` are models, `data` holds the experts' data, `recipe.yaml` names them all.
    """

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "job"

    def path(self, file: str) -> Path:
        return self.folder / file

    def write(self, file: str, data: bytes | str) -> None:
        """A file's whole content; parents are made."""
        path = self.path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            path.unlink()
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))

    def edit(self, file: str, change: Callable[[bytes], bytes]) -> None:
        self.write(file, change(self.path(file).read_bytes()))

    def json(self, file: str, *removed: str, **changes: Any) -> None:
        """Keys of a JSON object."""
        values = {**json.loads(self.path(file).read_text()), **changes}
        self.write(file, json.dumps({key: value for key, value in values.items() if key not in removed}))

    def recipe(self, *removed: str, **changes: Any) -> None:
        """Keys of the recipe."""
        values = {**yaml.safe_load(self.path("recipe.yaml").read_text()), **changes}
        self.write("recipe.yaml", yaml.safe_dump({key: values[key] for key in values if key not in removed}))

    def expert(self, *removed: str, task: str = "math", **changes: Any) -> None:
        """Keys of an expert of the recipe."""
        experts = yaml.safe_load(self.path("recipe.yaml").read_text())["experts"]
        values = {**experts[task], **changes}
        experts[task] = {key: values[key] for key in values if key not in removed}
        self.recipe(experts=experts)

    def line(self, text: str) -> None:
        """One more line of the recipe, as it is."""
        self.edit("recipe.yaml", lambda data: data + text.encode("utf-8", "surrogatepass") + b"\n")

    def tensors(self, file: str, *removed: str, **changes: Tensor | Callable[[Tensor], Tensor]) -> None:
        """Tensors of a file, by name: removed, replaced, or changed."""
        found = load_file(self.path(file))
        for name, change in changes.items():
            found[name] = (change(found[name]) if callable(change) else change).contiguous()
        save_file({key: found[key] for key in found if key not in removed}, self.path(file), {"format": "pt"})

    def header(self, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
        """What stands before a file's tensors; `change` may change it in place, or give another one."""
        data = self.path(file).read_bytes()
        length = int.from_bytes(data[:8], "little")
        values = json.loads(data[8 : 8 + length])
        values = change(values) or values
        text = values if isinstance(values, bytes) else json.dumps(values).encode()
        self.write(file, len(text).to_bytes(8, "little") + text + data[8 + length :])

    def link(self, file: str, target: str | Path) -> None:
        """A link in place of what is there."""
        path = self.path(file)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def outside(self, file: str) -> Path:
        """Move a file or folder of the job out of it, and link to it from there."""
        target = self.root / "outside" / Path(file).name
        target.parent.mkdir(exist_ok=True)
        self.path(file).rename(target)
        self.link(file, target)
        return target

    def pipe(self, file: str) -> None:
        """A pipe in place of what is there: who reads it waits forever."""
        self.path(file).unlink(missing_ok=True)
        os.mkfifo(self.path(file))

    def sparse(self, file: str, size: int) -> None:
        """Make a file so long; what is new takes no room."""
        with open(self.path(file), "ab") as handle:
            handle.truncate(size)


class Goods:
    """Good jobs by kind, each made once, below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def copy(self, kind: str, root: Path) -> Job:
        """A job of a kind of one's own."""
        made = self.folder / kind
        if not made.exists():
            made.mkdir()
            with torch.random.fork_rng():
                torch.manual_seed(0)
                KINDS[kind](Job(made))
        shutil.copytree(made, root, symlinks=True, dirs_exist_ok=True)
        return Job(root)


def _save(job: Job, models: pico.Job) -> None:
    models.experts = {"math": models.experts["task0"], "code": models.experts["task1"]}
    models.batches = {"math": models.batches["task0"][:1], "code": models.batches["task1"][:1]}
    pico.save(models, job.folder)
    job.path("data").mkdir()
    for task in models.experts:
        job.path(f"{task}.safetensors").rename(job.path(f"data/{task}.safetensors"))
    experts = {task: {"model": task, "data": f"data/{task}.safetensors"} for task in models.experts}
    job.write(
        "recipe.yaml",
        yaml.safe_dump({"base_model": "base", "merged_model": "merged", "experts": experts, "out": "out"}),
    )


def _llama(job: Job) -> None:
    """A decoder, and ready token ids with masks."""
    models = pico.job("llama", 2, **LLAMA)
    for batches in models.batches.values():
        for batch in batches:
            batch["input_ids"] %= LLAMA["vocab_size"]
    _save(job, models)


def _bert(job: Job) -> None:
    """An encoder, and ready token ids with masks."""
    _save(job, pico.job("bert", 2))


def _sharded(job: Job) -> None:
    """A decoder whose merged model is in two files behind an index."""
    _llama(job)
    found = load_file(job.path(f"merged/{WEIGHTS}"))
    job.path(f"merged/{WEIGHTS}").unlink()
    first = {name for name in found if ".layers.0." in name}
    files = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in found}
    for file in sorted(set(files.values())):
        save_file({name: found[name] for name in found if files[name] == file}, job.path(f"merged/{file}"))
    job.write(f"merged/{WEIGHTS}.index.json", json.dumps({"metadata": {}, "weight_map": files}))


def _texts(job: Job) -> None:
    """A decoder with a tokenizer; math has texts, code has chats."""
    _llama(job)
    save_tokenizer(job.path("merged"), template=TEMPLATE)
    job.write("data/math.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in ("a b c", "d e", "f g h i")))
    chats = ([{"role": "user", "content": text}] for text in ("a b", "c d e"))
    job.write("data/code.jsonl", "".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    for task in ("math", "code"):
        job.expert(task=task, data=f"data/{task}.jsonl", max_length=32)


def _table(job: Job) -> None:
    """A decoder with a tokenizer; math has a data set saved by `datasets`, beside which are parquet files."""
    import datasets  # takes a second

    datasets.config.HF_DATASETS_CACHE = job.root.parent / "cache"  # the user's own is none of its business
    _texts(job)
    found = datasets.Dataset.from_dict({"text": ["a b c", "d e"]})
    found.save_to_disk(job.path("data/set"))
    job.path("data/tables").mkdir()
    found.to_parquet(job.path("data/tables/part.parquet"))
    job.expert(data="data/set")


def _clip(job: Job) -> None:
    """A vision tower with an image processor; math has images, code ready pixels."""
    _save(job, pico.job("clip", 2, layers=2))
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    job.write("merged/preprocessor_config.json", json.dumps(processor))
    for name, color in (("a", "red"), ("b", "green"), ("c", "blue")):
        save_image(job.path(f"data/images/{name}.png"), color, (20, 18))
    job.expert(data="data/images")


def _adapter(job: Job) -> None:
    """A decoder; the expert math is a LoRA adapter of the base, with an embedding trained whole."""
    _llama(job)
    shutil.rmtree(job.path("math"))
    base, made = load_file(job.path(f"base/{WEIGHTS}")), {}
    for name in (f"model.layers.{i}.self_attn.{kind}_proj" for i in range(2) for kind in "qv"):
        out, width = base[f"{name}.weight"].shape
        made[f"base_model.model.{name}.lora_A.weight"] = 0.1 * torch.randn(2, width)
        made[f"base_model.model.{name}.lora_B.weight"] = 0.1 * torch.randn(out, 2)
    made["base_model.model.model.embed_tokens.weight"] = base["model.embed_tokens.weight"] + 0.1
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    job.write("math/adapter_config.json", json.dumps({**config, "modules_to_save": ["embed_tokens"]}))
    save_file(made, job.path("math/adapter_model.safetensors"))


def _quantised(job: Job, pack: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    _llama(job)
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(job.path(f"math/{WEIGHTS}")).items():
        stored |= pack(name, weight) if name.endswith("proj.weight") else {name: weight}
    save_file(stored, job.path(f"math/{WEIGHTS}"))
    job.json("math/config.json", quantization_config={"quant_method": "bitsandbytes"}, dtype="float32")


def _four_bit(job: Job) -> None:
    """A decoder; the expert math is in NF4 with double quantisation. Its values are of no matter."""

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        blocks = -(-weight.numel() // 64)
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
        return {
            name: torch.randint(0, 256, (weight.numel() // 2, 1), dtype=torch.uint8),
            f"{name}.quant_map": torch.linspace(-1, 1, 16),
            f"{name}.absmax": torch.randint(0, 256, (blocks,), dtype=torch.uint8),
            f"{name}.nested_quant_map": torch.linspace(-1, 1, 256),
            f"{name}.nested_absmax": torch.full((1,), 0.04),
            f"{name}.quant_state.bitsandbytes__nf4": _bytes(state),
        }

    _quantised(job, pack)


def _eight_bit(job: Job) -> None:
    """A decoder; the expert math is in LLM.int8."""

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        largest = weight.abs().amax(dim=1)
        codes = (weight / largest[:, None] * 127).round().to(torch.int8)
        return {name: codes, f"{name[:-6]}SCB": largest, f"{name}_format": torch.zeros((), dtype=torch.uint8)}

    _quantised(job, pack)


def _scaled(job: Job) -> None:
    """A decoder; the expert math is in FP8 with a scale for each block."""

    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = (-(-size // 8) for size in weight.shape)
        return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.full((rows, columns), 0.5)}

    _quantised(job, pack)
    job.json("math/config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [8, 8]})


def _gguf(job: Job) -> None:
    """A decoder; the expert math is a GGUF file."""
    from gguf_files import write
    from transformers import LlamaConfig

    _llama(job)
    state = load_file(job.path(f"math/{WEIGHTS}"))
    config = LlamaConfig.from_pretrained(job.path("math"))
    shutil.rmtree(job.path("math"))
    write(job.path("math.gguf"), state, config, tokens=[f"t{row}" for row in range(config.vocab_size)])
    job.expert(model="math.gguf")


def _bytes(values: object) -> Tensor:
    """A JSON document as a tensor."""
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def _hub(job: Job) -> None:
    """A decoder whose base is the folder of a model in the hub's cache."""
    _llama(job)
    base = job.path("base").rename(job.path("whole"))
    snapshot = job.path("base/snapshots/abc")
    snapshot.mkdir(parents=True)
    job.write("base/refs/main", "abc")
    job.path("base/blobs").mkdir()
    for file in base.iterdir():
        file.rename(job.path(f"base/blobs/{file.name}-blob"))
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}-blob")
    base.rmdir()


def _mergekit(job: Job) -> None:
    """A decoder whose merge mergekit made: its config is there, and no recipe is used."""
    _llama(job)
    models = [{"model": "math", "parameters": {"weight": 0.5}}, {"model": "code"}]
    config = {"merge_method": "ties", "base_model": "base", "models": models, "dtype": "float32"}
    job.write("merged/mergekit_config.yml", yaml.safe_dump(config))


def _seq2seq(job: Job) -> None:
    """An encoder-decoder, and ready token ids with masks and labels."""
    _save(job, pico.job("t5", 2))


KINDS: dict[str, Callable[[Job], None]] = {
    "llama": _llama,
    "bert": _bert,
    "sharded": _sharded,
    "texts": _texts,
    "table": _table,
    "clip": _clip,
    "adapter": _adapter,
    "nf4": _four_bit,
    "int8": _eight_bit,
    "scaled": _scaled,
    "gguf": _gguf,
    "hub": _hub,
    "mergekit": _mergekit,
    "t5": _seq2seq,
}
