"""Pico models, built from real config classes: a base, experts around it, their merge, and calibration batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

Batch = dict[str, Tensor]


@dataclass
class Job:
    """Models in memory and the batches to calibrate with."""

    base: PreTrainedModel
    experts: dict[str, PreTrainedModel]
    merged: PreTrainedModel
    batches: dict[str, list[Batch]]

    def double(self) -> Job:
        return Job(
            _double_model(self.base),
            {task: _double_model(model) for task, model in self.experts.items()},
            _double_model(self.merged),
            {task: [_double(batch) for batch in items] for task, items in self.batches.items()},
        )

    def copy(self) -> Job:
        return copy.deepcopy(self)


def _model(cls: str, config: str, sizes: dict[str, object]) -> PreTrainedModel:
    return getattr(transformers, cls)(getattr(transformers, config)(**sizes)).eval()


def clip(layers: int = 3) -> PreTrainedModel:
    return _model("CLIPVisionModel", "CLIPVisionConfig", {**IMAGE, "num_hidden_layers": layers})


def llama(layers: int = 3, **overrides: object) -> PreTrainedModel:
    return _model("LlamaForCausalLM", "LlamaConfig", {**DECODER, "num_hidden_layers": layers, **overrides})


def decoder(name: str, **overrides: object) -> PreTrainedModel:
    """Two layers of any decoder with Llama's config keys."""
    text = "Text" if name == "Gemma3" else ""
    return _model(f"{name}ForCausalLM", f"{name}{text}Config", {**DECODER, "num_hidden_layers": 2, **overrides})


IMAGE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
DECODER = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Some window is left of every padded token: Gemma 2 makes NaN of a row that is masked all over in float64.
GEMMA = {"head_dim": 16, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
T5 = {
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 100,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
GPT2 = {
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 100,
    "n_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWERS = {
    "vision_config": IMAGE,
    "text_config": {**TEXT, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2},
    "projection_dim": 32,
}


# One entry a model that docs/families.md names: how to build it.
KINDS: dict[str, Callable[..., PreTrainedModel]] = {
    "clip": clip,
    "clip whole": partial(_model, "CLIPModel", "CLIPConfig", TOWERS),
    "llama": llama,
    "llama tied": partial(llama, 2, tie_word_embeddings=True),
    "mistral": partial(decoder, "Mistral", sliding_window=6),
    "qwen2": partial(decoder, "Qwen2"),
    "qwen3": partial(decoder, "Qwen3", head_dim=16),
    "gemma2": partial(decoder, "Gemma2", **GEMMA, query_pre_attn_scalar=16),
    "gemma3": partial(decoder, "Gemma3", **GEMMA, query_pre_attn_scalar=16),
    "phi3": partial(decoder, "Phi3"),
    "mixtral": partial(decoder, "Mixtral", num_local_experts=4, intermediate_size=48),
    "qwen2-moe": partial(decoder, "Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=80),
    "qwen3-moe": partial(decoder, "Qwen3Moe", **EXPERTS, head_dim=16),
    "gpt2": partial(_model, "GPT2LMHeadModel", "GPT2Config", GPT2),
    "t5": partial(_model, "T5ForConditionalGeneration", "T5Config", T5),
    "flan-t5": partial(
        _model,
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 3},
    ),
    "vit": partial(_model, "ViTModel", "ViTConfig", IMAGE),
    "vit classifier": partial(_model, "ViTForImageClassification", "ViTConfig", {**IMAGE, "num_labels": 5}),
    "dinov2": partial(_model, "Dinov2Model", "Dinov2Config", IMAGE),
    "bert": partial(_model, "BertModel", "BertConfig", TEXT),
    "bert classifier": partial(_model, "BertForSequenceClassification", "BertConfig", TEXT),
    "roberta": partial(_model, "RobertaModel", "RobertaConfig", {**TEXT, "max_position_embeddings": 66}),
}


def perturbed(model: nn.Module, scale: float, seed: int) -> nn.Module:
    """A copy with noise of `scale` times each parameter's own spread."""
    generator, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = float(parameter.std()) if parameter.numel() > 1 else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((scale * (spread + 0.02) * noise).to(parameter.dtype))
    return model


def images(count: int, seed: int, batch_size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 16, 16, generator=generator)
    return [{"pixel_values": part} for part in pixels.split(batch_size)]


def texts(batches: int, seed: int, padding: str = "right") -> list[Batch]:
    """Batches of four rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(batches):
        ids = torch.randint(0, 100, (4, 20), generator=generator)
        mask = _mask((20, 13, 7, 16), 20, padding)
        out.append({"input_ids": ids, "attention_mask": mask})
    return out


def pairs(batches: int, seed: int, padding: str = "right") -> list[Batch]:
    """Texts with targets of unequal length, -100 where there is none."""
    generator = torch.Generator().manual_seed(seed + 1000)
    out = texts(batches, seed, padding)
    for batch in out:
        labels = torch.randint(3, 100, (4, 11), generator=generator)
        batch["labels"] = labels.masked_fill(_mask((9, 11, 4, 6), 11, "right") == 0, -100)
    return out


def batches_for(kind: str, seed: int, padding: str = "right") -> list[Batch]:
    """Calibration batches that a kind of model takes."""
    if "t5" in kind:
        return pairs(6, seed, padding)
    if any(word in kind for word in ("clip", "vit", "dino")):
        return images(24, seed)
    return texts(5, seed, padding)


def _mask(lengths: tuple[int, ...], width: int, padding: str) -> Tensor:
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(0, length) if padding == "right" else slice(width - length, width)] = 1
    return mask


def job(kind: str, tasks: int, scaling: float = 0.3, **overrides: object) -> Job:
    """A job on a pico model: `tasks` experts, merged by task arithmetic."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = KINDS[kind](**overrides)
    base = perturbed(fresh, 1.0, seed=99)
    experts = {f"task{k}": perturbed(base, 0.3, seed=k) for k in range(tasks)}
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            origin = base.get_parameter(name)
            deltas = [expert.get_parameter(name).float() - origin.float() for expert in experts.values()]
            parameter.copy_(origin.float() + scaling * sum(deltas))
    return Job(base, experts, merged, {task: batches_for(kind, k) for k, task in enumerate(experts)})  # type: ignore[arg-type]


def save(pico: Job, folder: Path) -> dict[str, object]:
    """Save a job's models and data as folders and files; returns a recipe for them."""
    pico.base.save_pretrained(folder / "base")
    pico.merged.save_pretrained(folder / "merged")
    experts = {}
    for task, expert in pico.experts.items():
        expert.save_pretrained(folder / task)
        rows = {key: torch.cat([batch[key] for batch in pico.batches[task]]) for key in pico.batches[task][0]}
        save_file(rows, folder / f"{task}.safetensors")
        experts[task] = {"model": str(folder / task), "data": str(folder / f"{task}.safetensors")}
    return {
        "base_model": str(folder / "base"),
        "merged_model": str(folder / "merged"),
        "experts": experts,
        "batch_size": len(next(iter(pico.batches.values()))[0][next(iter(next(iter(pico.batches.values()))[0]))]),
        "held_out": 0,  # few samples as they are
        "out": str(folder / "out"),
    }


def _double_model(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model).double()
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # grouped products know no float64
    return model


def _double(batch: Batch) -> Batch:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
