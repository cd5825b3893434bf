"""Random models and data in folders: the same inputs for everything that is measured or compared."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar


@dataclass(frozen=True)
class Workload:
    """A job: one expert a task around a base of random weights, merged by task arithmetic 0.3.

    Attributes:
        model: its class in transformers.
        config: of the model.
        tasks: experts.
        preset: of the settings.
        samples: a task.
        tokens: of a text; 0 for images.
        targets: tokens of a text's target.
        dtype: of all weights.
        padded: whether texts are of different lengths; otherwise they are all `tokens` long.
        lora: rank of the experts' adapters on q and v; 0 for whole checkpoints.
        toy: what makes the config tiny.
    """

    model: str
    config: dict[str, Any]
    tasks: int
    preset: str = "default"
    samples: int = 64
    tokens: int = 0
    targets: int = 0
    dtype: str = "float32"
    padded: bool = True
    lora: int = 0
    toy: dict[str, Any] = field(default_factory=dict)

    @property
    def small(self) -> Workload:
        """The same at toy size, to see that everything works."""
        return replace(self, config={**self.config, **self.toy}, samples=16, tokens=min(self.tokens, 12))


CLIP = {"image_size": 224, "patch_size": 32}
CLIP_TOY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CLIP_TOY |= {"image_size": 32, "patch_size": 8}
SMALL = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
SMALL |= {"image_size": 32, "patch_size": 8}
B32 = {**CLIP, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
L14 = {**CLIP, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
L14 |= {"patch_size": 14}
T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
T5_BASE |= {"feed_forward_proj": "gated-gelu", "vocab_size": 32128, "decoder_start_token_id": 0}
T5_TOY = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
LLAMA_1B |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True}
LLAMA_1B |= {"max_position_embeddings": 131072, "rope_theta": 500000.0}
LLAMA_8B = {**LLAMA_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
LLAMA_8B |= {"tie_word_embeddings": False}
LLAMA_SMALL = {**LLAMA_1B, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
LLAMA_SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000}
LLAMA_TOY = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_TOY |= {"head_dim": 16, "num_key_value_heads": 2, "vocab_size": 1000}

QUERIES_AND_VALUES = ("q", "v", "q_proj", "v_proj", "query", "value")  # T5's names, Llama's and CLIP's, BERT's

HELD_OUT = 0  # as all that it is compared with fit to every sample
SHARDS = "2GB"
NUMBERS = ("samples", "tasks", "layers")  # that a command line may change
VISION, TEXT, T5 = "CLIPVisionModel", "LlamaForCausalLM", "T5ForConditionalGeneration"
WORKLOADS = {
    "clip-small": Workload(VISION, SMALL, 3, toy=CLIP_TOY),
    "clip-b32-shallow": Workload(VISION, {**B32, "num_hidden_layers": 2}, 8, toy=CLIP_TOY),
    "clip-b32": Workload(VISION, B32, 8, samples=256, toy=CLIP_TOY),
    "clip-l14": Workload(VISION, L14, 8, samples=256, toy=CLIP_TOY),
    "flan-t5-base": Workload(
        T5, T5_BASE, 8, "flan-t5", samples=256, tokens=128, targets=8, lora=16, toy=T5_TOY | {"vocab_size": 1000}
    ),
    "llama-small": Workload(TEXT, LLAMA_SMALL, 3, "llm", samples=32, tokens=256, dtype="bfloat16", toy=LLAMA_TOY),
    "llama-1b": Workload(TEXT, LLAMA_1B, 3, "llm", samples=256, tokens=256, dtype="bfloat16", toy=LLAMA_TOY),
    "llama-8b": Workload(
        TEXT, LLAMA_8B, 5, "llm", samples=256, tokens=512, dtype="bfloat16", padded=False, toy=LLAMA_TOY
    ),
}


def known(name: str) -> str:
    """A workload's name, for a command line."""
    if name not in WORKLOADS:
        raise argparse.ArgumentTypeError(f"unknown workload {name!r}; expected one of {', '.join(WORKLOADS)}")
    return name


def chosen(name: str, args: argparse.Namespace) -> tuple[str, Workload]:
    """A workload, with the numbers that a command line has instead of its own, and what it is called then."""
    work = WORKLOADS[name].small if args.toy else WORKLOADS[name]
    if args.layers:
        keys = [key for key in ("num_hidden_layers", "num_layers", "num_decoder_layers") if key in work.config]
        work = replace(work, config={**work.config, **dict.fromkeys(keys, args.layers)})
    changed = [f"{value}-{number}" for number in NUMBERS if (value := getattr(args, number))]
    label = "-".join([*["toy"] * args.toy, name, *changed])
    return label, replace(work, samples=args.samples or work.samples, tasks=args.tasks or work.tasks)


@torch.no_grad()
def write(work: Workload, folder: Path, linked: torch.device | None = None) -> dict[str, Any]:
    """Write `base`, an expert and a data file a task, and `recipe.json`, once; half-written folders are written again.

    Args:
        work: what to write.
        folder: where.
        linked: make ONE expert, on this device, and links to it for the other tasks. For models so large that five
            would take longer to make than to merge, and more room than memory-backed disk has.

    Returns:
        The recipe.
    """
    path, made_of = folder / "recipe.json", folder / "workload.json"
    described = json.dumps({**asdict(work), "linked": linked is not None, "held_out": HELD_OUT})
    if path.exists() and made_of.exists() and made_of.read_text() == described:
        return json.loads(path.read_text())
    shutil.rmtree(folder, ignore_errors=True)
    disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = random_model(work) if linked is None else _lean_model(work, linked)
    base.save_pretrained(folder / "base", max_shard_size=SHARDS)
    made_of.write_text(described)
    origin = {} if linked else {name: parameter.clone() for name, parameter in base.named_parameters()}
    experts = {}
    for k in range(work.tasks):
        task, generator = f"task{k}", torch.Generator().manual_seed(k)
        if work.lora:
            _write_adapter(work, origin, folder / task, generator)
        elif linked and k:
            (folder / task).symlink_to("task0", target_is_directory=True)
        else:
            noise = torch.Generator(linked).manual_seed(k) if linked else generator
            for name, parameter in base.named_parameters():
                start = origin.get(name, parameter).float()
                spread = float(start.std()) if parameter.numel() > 1 else 0.0
                change = torch.randn(parameter.shape, generator=noise, device=linked)
                parameter.copy_(start + 0.2 * (spread + 0.02) * change)
            base.save_pretrained(folder / task, max_shard_size=SHARDS)
        save_file(_inputs(work, generator), folder / f"{task}.safetensors")
        experts[task] = {"model": str(folder / task), "data": str(folder / f"{task}.safetensors")}
    recipe = {
        "base_model": str(folder / "base"),
        "merge": {"method": "task_arithmetic", "scaling": 0.3},
        "experts": experts,
        "settings": {"preset": work.preset},
        "samples": work.samples,
        "held_out": HELD_OUT,
    }
    path.write_text(json.dumps(recipe))
    return recipe


def empty_model(work: Workload) -> Any:
    """The model without storage: names and shapes."""
    cls = getattr(transformers, work.model)
    with torch.device("meta"):
        return cls(cls.config_class(**work.config))


def model_bytes(work: Workload) -> int:
    """Of a checkpoint."""
    size = getattr(torch, work.dtype).itemsize
    return size * sum(parameter.numel() for parameter in empty_model(work).parameters())


@torch.no_grad()
def random_model(work: Workload) -> Any:
    cls = getattr(transformers, work.model)
    model = cls(cls.config_class(**work.config)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # a fresh model's biases are all 0, its norms' weights all 1: no trained model's are
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(getattr(torch, work.dtype))


@torch.no_grad()
def _lean_model(work: Workload, device: torch.device) -> Any:
    """Made on a device in its own dtype, which takes seconds for a large one."""
    model, generator = empty_model(work).to(getattr(torch, work.dtype)), torch.Generator(device).manual_seed(0)
    model.to_empty(device=device).tie_weights()
    for parameter in model.parameters():
        mean, std = (1.0, 0.1) if parameter.ndim == 1 else (0.0, 0.02)
        parameter.normal_(mean, std, generator=generator)
    return model


def _write_adapter(work: Workload, base: dict[str, Tensor], folder: Path, generator: torch.Generator) -> None:
    """A LoRA expert: random factors for every projection to queries and values, by the names that the model has."""
    modules = {name.removesuffix(".weight"): weight for name, weight in base.items() if weight.ndim == 2}
    chosen = {name: weight for name, weight in modules.items() if name.rpartition(".")[2] in QUERIES_AND_VALUES}
    if not chosen:
        raise ValueError(f"{work.model}: no projection is named {', '.join(QUERIES_AND_VALUES)}: an empty adapter")
    targets = [name for name in QUERIES_AND_VALUES if any(module.endswith(f".{name}") for module in chosen)]
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": work.lora, "lora_alpha": 2 * work.lora, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    factors = {}
    for module, weight in chosen.items():
        out, size = weight.shape
        a = torch.randn(work.lora, size, generator=generator) / size**0.5
        b = 0.05 * float(weight.float().std()) * torch.randn(out, work.lora, generator=generator)
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(factors, folder / "adapter_model.safetensors")


def _inputs(work: Workload, generator: torch.Generator) -> dict[str, Tensor]:
    """Random samples: images, or texts of a quarter to all of `tokens`, with targets for an encoder-decoder."""
    if not work.tokens:
        side = work.config["image_size"]
        return {"pixel_values": torch.randn(work.samples, 3, side, side, generator=generator)}
    size = (work.samples, work.tokens)
    shortest = work.tokens // 4 if work.padded else work.tokens
    lengths = torch.randint(shortest, work.tokens + 1, (work.samples, 1), generator=generator)
    found = {"input_ids": torch.randint(3, work.config["vocab_size"], size, generator=generator)}
    if work.padded:
        found["attention_mask"] = (torch.arange(work.tokens) < lengths).long()
    if work.targets:
        labels = torch.randint(3, work.config["vocab_size"], (work.samples, work.targets), generator=generator)
        lengths = torch.randint(1, work.targets + 1, (work.samples, 1), generator=generator)
        found["labels"] = labels.masked_fill(torch.arange(work.targets) >= lengths, -100)
    return found
