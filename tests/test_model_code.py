"""Whatever a model's own code raises inside of the engine says whose it is, where, and on what; ours stays ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pico
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

import featcal_fast as ff
from featcal_fast.errors import DataError, MemoryBudgetError, UnsupportedModelError
from featcal_fast.forward import calls
from featcal_fast.layer.moments import TaskMoments

IDS = torch.randint(0, 100, (4, 20), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(4, 20, dtype=torch.long)


def run(job: pico.Job, **settings: Any) -> ff.Report:
    return ff.calibrate_model(
        job.merged, base=job.base, experts=job.experts, batches=job.batches, settings=ff.Settings(**settings)
    )


@cache
def some_job(kind: str) -> pico.Job:
    """One that runs which fail leave as it is."""
    job = pico.job(kind, 2)
    return replace(job, batches={task: batches[:2] for task, batches in job.batches.items()})


@pytest.mark.parametrize(
    ("kind", "batch", "message"),
    [
        (
            "llama",
            {"input_ids": IDS + 90},
            r"input_ids \(4, 20\) from 90 to 18\d, says its LlamaForCausalLM: IndexError: index out of range",
        ),
        (
            "llama",
            {"input_ids": IDS - 50},
            r"input_ids \(4, 20\) from -\d+ to \d+, says its .*: IndexError: index out of range",
        ),
        ("llama", {"input_ids": IDS.float()}, r"the merged model cannot take the inputs input_ids \(4, 20\)"),
        ("llama", {"input_ids": IDS.to(torch.complex64)}, "the merged model cannot take the inputs"),
        ("llama", {"input_ids": IDS[0]}, "the merged model cannot take the inputs|expected"),
        ("llama", {"input_ids": IDS[None]}, "the merged model cannot take the inputs|expected"),
        (
            "llama",
            {"attention_mask": MASK},
            r"attention_mask \(4, 20\) from 1 to 1, says its .*: ValueError: You must specify",
        ),
        (
            "llama",
            {"input_ids": IDS, "pixel_values": torch.zeros(4, 3)},
            "merged model cannot take the input pixel_values, expected some of input_ids",
        ),
        ("llama", {"input_ids": IDS, "attention_mask": MASK[:, :7]}, r"found shape \(4, 7\)|cannot take"),
        ("llama", {"input_ids": IDS, "attention_mask": MASK[:2]}, r"found shape \(2, 20\)|cannot take"),
        ("llama", {"input_ids": IDS, "attention_mask": MASK[..., None]}, r"found shape \(4, 20, 1\)|cannot take"),
        (
            "llama",
            {"input_ids": IDS, "attention_masks": MASK},
            "cannot take the input attention_masks, expected some of",
        ),
        ("llama", {"input_ids": IDS, "position_ids": IDS[:, :3]}, "cannot take|running its layer"),
        ("llama", {"input_ids": IDS[:, :0]}, r"input_ids: found a tensor of shape \(4, 0\), expected a tensor"),
        ("llama", {"input_ids": torch.tensor(3)}, r"input_ids: found a tensor of shape \(\), expected a tensor"),
        ("llama", {"input_ids": IDS.tolist()}, "input_ids: found a list, expected a tensor"),
        ("llama", {"input_ids": IDS.numpy()}, "input_ids: found a ndarray, expected a tensor"),
        ("llama", {}, "found an empty dict, expected a dict of tensors"),
        ("llama", [IDS], "found a list, expected a dict of tensors"),
        ("bert", {"input_ids": IDS.repeat(1, 4)}, "position_embeddings|cannot take"),
        (
            "bert",
            {"input_ids": IDS, "token_type_ids": MASK + 1},
            r"token_type_ids \(4, 20\) from 2 to 2, says its BertModel: IndexError",
        ),
        (
            "clip",
            {"pixel_values": torch.zeros(2, 3, 20, 20)},
            r"pixel_values \(2, 3, 20, 20\), says its .*: ValueError: .*20\*20",
        ),
        ("clip", {"pixel_values": torch.zeros(2, 1, 16, 16)}, "RuntimeError: .*channels"),
        ("t5", {"input_ids": IDS, "labels": IDS + 90}, r"labels \(4, 20\) from 9\d to 18\d, says its .*: IndexError"),
        ("t5", {"input_ids": IDS, "labels": IDS[:2]}, r"task1"),
        (
            "t5",
            {"input_ids": IDS, "labels": IDS, "decoder_attention_mask": MASK[:, :7]},
            r"decoder_attention_mask: found shape \(4, 7\), expected \(4, 20\)",
        ),
    ],
)
def test_a_batch_that_a_model_cannot_take_is_a_clear_error(kind: str, batch: Any, message: str) -> None:
    job = some_job(kind)
    job = replace(job, batches={**job.batches, "task1": [job.batches["task1"][0], batch]})
    with pytest.raises(ff.FeatCalError, match=message) as found:
        run(job)
    assert "task1" in str(found.value)
    if "cannot take the inputs" not in str(found.value):
        return
    assert "task task1, batch 1: the merged model cannot take the inputs" in str(found.value)
    assert isinstance(found.value, DataError)
    cause = found.value.__cause__
    assert cause is None or f"{type(cause).__name__}: " in str(found.value)


@pytest.mark.parametrize(
    ("kind", "batch", "message"),
    [
        ("llama", {"input_ids": IDS + 90}, r"model.embed_tokens is asked for row 1\d\d, expected 0 to 99"),
        ("llama", {"input_ids": IDS - 50}, r"model.embed_tokens is asked for row -\d+, expected 0 to 99"),
        ("bert", {"input_ids": IDS, "token_type_ids": MASK + 1}, "embeddings.token_type_embeddings is asked for row 2"),
        ("t5", {"input_ids": IDS, "labels": IDS + 90}, "asked for row 1"),
    ],
)
def test_where_such_a_number_would_end_the_process_it_is_seen_before(
    kind: str, batch: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU."""
    monkeypatch.setattr(calls, "LATE", ("cpu",))
    job = some_job(kind)
    with pytest.raises(DataError, match=f"the merged model cannot take the inputs .*{message}"):
        run(replace(job, batches={**job.batches, "task1": [batch]}))


def test_a_task_without_a_token_that_counts_is_refused() -> None:
    job = pico.job("llama", 2)
    job.batches["task1"] = [{"input_ids": IDS, "attention_mask": 0 * MASK}]
    with pytest.raises(DataError, match=r"task task1: no token counts in model\.layers"):
        run(job)


class Failing:
    """A hook, as a model's own code may have them, that fails when it is called for the n-th time."""

    def __init__(self, model: nn.Module, nth: int, error: BaseException, layer: int = 1) -> None:
        self.left, self.error = nth, error
        model.model.layers[layer].mlp.register_forward_pre_hook(self._hook)

    def __deepcopy__(self, _memo: dict) -> Failing:
        return self  # counts the calls of all copies

    def _hook(self, *_: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error


# The merged model's layer 1: 1 for the layout, 1 a batch and task, 2 and 1 a task for the drift, ...
@pytest.mark.parametrize("nth", [0, 1, 6, 11, 13, 16, 24])
def test_wherever_a_layer_fails_the_error_says_what_was_done(nth: int) -> None:
    job = pico.job("llama", 2)
    Failing(job.merged, nth, ValueError("the model's\n  own words"))
    with pytest.raises(UnsupportedModelError) as found:
        run(job)
    assert str(found.value).startswith("merged model, model.layers.1: running its layer on batch ")
    assert str(found.value).endswith(": ValueError: the model's own words")
    assert isinstance(found.value.__cause__, ValueError)


def test_an_experts_layer_that_fails_names_the_expert_and_the_samples() -> None:
    job = pico.job("llama", 2)
    Failing(job.experts["task1"], 2, KeyError("rope"))
    message = (
        r"^expert task1, model.layers.1: running its layer on batch 2, samples 0 to 3 of task task1: KeyError: 'rope'$"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        run(job)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), DataError("as it is")])
def test_interrupts_and_our_own_errors_pass(error: BaseException) -> None:
    job = pico.job("llama", 1)
    Failing(job.merged, 3, error)
    with pytest.raises(type(error)) as found:
        run(job)
    assert found.value is error


def test_memory_that_runs_out_in_a_model_still_halves_chunks() -> None:
    job, expected = pico.job("llama", 1), pico.job("llama", 1)
    run(expected)

    def full(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("full")

    job.experts["task0"].model.layers[1].mlp.register_forward_pre_hook(full)
    run(job)
    for name, value in expected.merged.named_parameters():
        assert (job.merged.get_parameter(name) - value).norm() <= 1e-5 * value.norm(), name
    job = pico.job("llama", 1)
    Failing(job.merged, 3, torch.OutOfMemoryError("full"))
    with pytest.raises(MemoryBudgetError):
        run(job)


def test_a_bug_of_ours_is_not_put_down_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one in the middle of the model's forward."""

    def broken(*_: Any) -> None:
        raise AssertionError("ours")

    monkeypatch.setattr(TaskMoments, "_in_one_dtype", broken)
    with pytest.raises(AssertionError, match=r"^ours$"):
        run(pico.job("llama", 1))


def changed(method: str, forward: Callable) -> pico.Job:
    """A job all of whose models have another forward in place of a method of their decoder's."""
    job = pico.job("llama", 1)
    for model in (job.base, job.merged, *job.experts.values()):
        owner = type(model.model)
        model.model.__class__ = type(owner.__name__, (owner,), {method: forward})
    return job


@pytest.mark.parametrize(
    "order",
    [[0, 1], [0, 2], [0, 1, 1, 2], [1, 0, 2], []],
    ids=["too few", "one left out", "one twice", "another order", "none"],
)
def test_a_model_that_does_not_call_each_block_once_is_refused(order: list[int]) -> None:
    def forward(self: nn.Module, input_ids: Tensor, **_: Any) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1])[None]
        angles = self.rotary_emb(hidden, positions)
        for number in order:
            hidden = self.layers[number](hidden, position_embeddings=angles)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    with pytest.raises(
        UnsupportedModelError, match=r"merged model: found a .*: its forward leaves the order after \d of the 3"
    ):
        run(changed("forward", forward))


def test_layers_that_share_parameters_are_refused() -> None:
    job = pico.job("llama", 1)
    job.merged.model.layers[2].mlp = job.merged.model.layers[0].mlp
    message = r"merged model: model.layers.2.mlp.\w+.weight is a parameter of model.layers.0, too"
    with pytest.raises(UnsupportedModelError, match=message):
        run(job)


@pytest.mark.parametrize("out", [lambda x: x[:, 1:], lambda _: None, lambda x: {"hidden": x}, lambda _: ()])
def test_a_layer_that_gives_no_hidden_states_is_refused(out: Callable) -> None:
    job = pico.job("llama", 1)
    owner = type(job.merged.model.layers[1])
    odd = type("Odd", (owner,), {"forward": lambda self, *args, **kwargs: out(owner.forward(self, *args, **kwargs))})
    job.merged.model.layers[1].__class__ = odd
    with pytest.raises(
        UnsupportedModelError, match=r"merged model, model.layers.1: .*: found .* expected hidden states"
    ):
        run(job)


def test_models_are_whole_after_an_error() -> None:
    job = pico.job("llama", 1)
    job.batches["task0"][1] = {"input_ids": IDS + 90}
    before = copy.deepcopy(job.merged).state_dict()
    with pytest.raises(DataError):
        run(job)
    assert all(torch.equal(value, before[name]) for name, value in job.merged.state_dict().items())
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in job.merged.modules())
