"""What a model gives for the hidden states that leave its last block: bit for bit what it gives for the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pico
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from featcal_fast.checkpoints import Checkpoint
from featcal_fast.forward.outputs import NoOutputs
from featcal_fast.streaming.sources import CheckpointSource, ModuleSource

CPU = torch.device("cpu")
MASKED_LM = partial(pico._model, "BertForMaskedLM", "BertConfig", pico.TEXT)
HEADS: dict[str, Callable[[], nn.Module]] = {
    **pico.KINDS,
    "bert masked": MASKED_LM,
    "bert tokens": partial(pico._model, "BertForTokenClassification", "BertConfig", pico.TEXT),
    "clip projected": partial(
        pico._model, "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**pico.IMAGE, "projection_dim": 32}
    ),
    "clip classifier": partial(
        pico._model, "CLIPForImageClassification", "CLIPConfig", {**pico.TOWERS, "num_labels": 4}
    ),
    "llama classifier": partial(
        pico._model, "LlamaForSequenceClassification", "LlamaConfig", {**pico.DECODER, "num_hidden_layers": 2}
    ),
    "llama without head": partial(pico._model, "LlamaModel", "LlamaConfig", {**pico.DECODER, "num_hidden_layers": 2}),
    "mixtral that reports routers": partial(
        pico.decoder, "Mixtral", num_local_experts=4, intermediate_size=48, output_router_logits=True
    ),
    "bert that returns tuples": partial(
        pico._model, "BertForSequenceClassification", "BertConfig", {**pico.TEXT, "return_dict": False}
    ),
    "one layer of llama": partial(pico.llama, 1),
    "one layer of clip": partial(pico.clip, 1),
    "one layer of t5": partial(
        pico._model, "T5ForConditionalGeneration", "T5Config", {**pico.T5, "num_layers": 1, "num_decoder_layers": 1}
    ),
}


def model_of(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return pico.perturbed(HEADS[kind](), 1.0, seed=99).eval()


@torch.no_grad()
def run(model: nn.Module, batch: pico.Batch, part: nn.Module, block: nn.Module) -> tuple[object, Tensor]:
    """What `part` of a model returns, and the hidden states that left its last block."""
    left: list[Tensor] = []
    hook = block.register_forward_hook(lambda _module, _args, out: left.append(out[0] if type(out) is tuple else out))
    made = part(**batch, return_dict=True)
    hook.remove()
    return made, left[0]


@pytest.mark.parametrize("kind", HEADS)
def test_outputs_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    batch = pico.batches_for(kind, 3, "left" if kind == "qwen2" else "right")[0]
    source = ModuleSource(model, "merged model", CPU)
    structure = source.structure
    part = structure.entry if kind == "clip whole" else model  # which wants texts
    made, final = run(model, batch, part, structure.blocks[-1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = source.outputs(batch, final)
    expected = getattr(made, found.name)
    assert found.name == ("logits" if hasattr(made, "logits") else found.name)
    assert not (hasattr(made, "image_embeds") and found.name != "image_embeds")
    assert torch.equal(found.values, expected)
    source.release_stage_inputs()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(block) for block in structure.blocks)

    model.save_pretrained(tmp_path)
    stored = CheckpointSource(Checkpoint(tmp_path, "merged model"), CPU)
    again = stored.outputs(batch, final)
    assert again.name == found.name
    assert torch.equal(again.values, expected)
    assert all(block.state_dict() == {} or next(block.parameters()).is_meta for block in stored.structure.blocks)
    stored.release_stage_inputs()
    assert all(parameter.is_meta for parameter in stored.model.parameters())


class Unpacking(nn.Module):
    """A block as old models have them: what it gives is unpacked by whoever calls it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor]:
        return (self.block(*args, **kwargs),)


class Unpacks(nn.Module):
    """An encoder that unpacks what its blocks return."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Unpacking, layers))

    def forward(self, inputs_embeds: Tensor, **_: object) -> BaseModelOutput:
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, None)[0]
        return BaseModelOutput(last_hidden_state=inputs_embeds)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_that_unpacks_what_its_blocks_return(layers: int) -> None:
    model = pico.clip(layers)
    batch = {"pixel_values": torch.randn(17, 3, 16, 16)}  # as many samples as tokens
    made, final = run(model, batch, model, ModuleSource(model, "merged model", CPU).structure.blocks[-1])
    owner = getattr(model, "vision_model", model)
    owner.encoder = Unpacks(owner.encoder.layers)
    found = ModuleSource(model, "merged model", CPU).outputs(batch, final)
    assert torch.equal(found.values, made.pooler_output)  # type: ignore[attr-defined]


def test_what_cannot_be_run_says_why(tmp_path: Path) -> None:
    model = pico._model("BertForQuestionAnswering", "BertConfig", pico.TEXT)
    batch = pico.texts(1, 0)[0]
    _, final = run(model, batch, model, model.bert.encoder.layer[-1])
    with pytest.raises(
        NoOutputs, match="expert a, a BertForQuestionAnswering, has no outputs to compare: it returns a Quest"
    ):
        ModuleSource(model, "expert a", CPU).outputs(batch, final)

    model = model_of("bert classifier")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["classifier.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = CheckpointSource(Checkpoint(tmp_path, "expert a"), CPU)
    with pytest.raises(NoOutputs, match=r"classifier\.weight"):
        source.outputs(batch, final)
    assert all("forward" not in vars(block) for block in source.structure.blocks)

    model = pico.clip()
    model.register_module("other", nn.Module())
    model.other.graph = (torch.ones(1, requires_grad=True) * 2,)  # no leaf: it cannot be copied
    with pytest.raises(NoOutputs, match="expert a cannot be copied: RuntimeError"):
        ModuleSource(model, "expert a", CPU).outputs(
            {"pixel_values": torch.zeros(1, 3, 16, 16)}, torch.zeros(1, 17, 48)
        )


def test_labels_that_a_decoder_could_not_take_do_not_count() -> None:
    model, batch = model_of("llama"), pico.texts(1, 0)[0]
    source = ModuleSource(model, "merged model", CPU)
    made, final = run(model, batch, model, source.structure.blocks[-1])
    found = source.outputs({**batch, "labels": torch.full((4, 20), 10**6)}, final)
    assert torch.equal(found.values, made.logits)  # type: ignore[attr-defined]


def test_training_mode_is_left_and_counts_for_nothing() -> None:
    model = pico._model("BertForSequenceClassification", "BertConfig", {**pico.TEXT, "classifier_dropout": 0.5})
    batch = pico.texts(1, 0)[0]
    made, final = run(model, batch, model, model.bert.encoder.layer[-1])
    trained = copy.deepcopy(model).train()
    found = ModuleSource(trained, "merged model", CPU).outputs(batch, final)
    assert torch.equal(found.values, made.logits)  # type: ignore[attr-defined]
    assert all(module.training for module in trained.modules())
