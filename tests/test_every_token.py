"""Every module is given each token that counts once, or the run stops: no hook that never fires, or fires twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pico
import pytest
import torch
from test_compiled import as_they_are
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast.errors import UnsupportedModelError
from featcal_fast.forward import compiled
from featcal_fast.forward.calls import BatchCalls
from featcal_fast.forward.runner import BlockRunner


def changed(forward: Callable[[Any, Tensor], Tensor], only: str = "", kind: str = "llama", layer: int = 1) -> pico.Job:
    """A job whose models, or one of them, have another forward in a layer's MLP."""
    job = pico.job(kind, 2, layers=2)
    job.batches = {task: batches[:3] for task, batches in job.batches.items()}
    for name, model in {"base": job.base, "merged": job.merged, **job.experts}.items():
        if only in ("", name):
            mlp = model.model.layers[layer].mlp
            mlp.__class__ = type("Odd", (type(mlp),), {"forward": forward, "plain": type(mlp).forward})
    return job


def refusal(job: pico.Job, **settings: Any) -> str:
    with pytest.raises(UnsupportedModelError) as found:
        ff.calibrate_model(
            job.merged, base=job.base, experts=job.experts, batches=job.batches, settings=ff.Settings(**settings)
        )
    return str(found.value)


def some_samples(self: Any, x: Tensor) -> Tensor:
    """Its `down_proj` is called for a sample alone, as the layer is first looked at, and for nothing else."""
    return self.plain(x) if len(x) == 1 else self.up_proj(x)[..., :64] + self.gate_proj(x)[..., :64]


def test_a_module_that_most_samples_pass_by() -> None:
    message = refusal(changed(some_samples))
    expected = 3 * (20 + 13 + 7 + 16)
    assert message.startswith("model.layers.1.mlp.down_proj: found 0 tokens of task task0 to reach it in the merged mo")
    assert f"expected {expected}: " in message


class Sometimes(nn.Module):
    """Calls one of its modules for a sample alone only, or twice."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first, self.second, self.twice = nn.Linear(8, 8), nn.Linear(8, 8), twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(self.second(y)) if self.twice else self.second(y) if len(x) == 1 else y


def test_compiled_too_nothing_is_made_up_for_a_module_that_is_passed_by(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", as_they_are)
    block, runner = Sometimes(twice=False).requires_grad_(False), BlockRunner(True)
    for samples, expected in ((1, ["first", "second"]), (3, ["first"])):
        seen: list[str] = []
        runner.capture(
            BatchCalls([()], [{}]),
            0,
            block,
            torch.randn(samples, 5, 8),
            ["first", "second"],
            lambda name, _, seen=seen: seen.append(name),
            stop_at="second",
        )
        assert seen == expected
    assert not [each for each in recwarn if "compiled" in str(each.message)]


def test_compiled_too_a_module_that_is_called_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", as_they_are)
    block, calls = Sometimes(twice=True).requires_grad_(False), BatchCalls([()], [{}])
    with pytest.warns(UserWarning, match="cannot be compiled"), pytest.raises(UnsupportedModelError, match="twice"):
        BlockRunner(True).capture(calls, 0, block, torch.randn(3, 5, 8), ["second"], lambda *_: None)


def test_a_module_that_is_left_out_of_one_batch() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.plain(x) if x.shape[1] == 20 else x

    job = changed(forward)
    job.batches["task1"][1] = {name: value[:, :19] for name, value in job.batches["task1"][1].items()}
    message = refusal(job)
    missing = int(job.batches["task1"][1]["attention_mask"].sum())
    expected = missing + 2 * (20 + 13 + 7 + 16)
    assert message.startswith(f"model.layers.1.mlp.gate_proj: found {expected - missing} tokens of task task1 to reach")
    assert f"expected {expected}: " in message


def test_a_layernorm_that_most_samples_pass_by() -> None:
    job = pico.job("vit", 1)
    owner = type(job.base.layers[1])

    def forward(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        modules, norm = self._modules, self.layernorm_after
        modules["layernorm_after"] = norm if len(hidden) == 1 else nn.Identity()
        out = owner.forward(self, hidden, *args, **kwargs)
        modules["layernorm_after"] = norm
        return out

    for model in (job.base, job.merged, job.experts["task0"]):
        model.layers[1].__class__ = type("Odd", (owner,), {"forward": forward})
    assert refusal(job).startswith("layers.1.layernorm_after: found 0 tokens of task task0 to reach it")


def test_a_module_that_the_first_sample_passes_by() -> None:
    """It would keep its merged weight, as one that is never used."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.plain(x) if len(x) > 1 else x + self.up_proj(x)[..., :64]

    assert refusal(changed(forward)).startswith("model.layers.1.mlp.gate_proj: its layer's forward reached it for task")


def test_a_module_that_an_expert_passes_by() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.up_proj(x)[..., :64] + self.gate_proj(x)[..., :64]

    message = refusal(changed(forward, only="task1"))
    assert message.startswith(
        "model.layers.1.mlp.down_proj: the merged model's forward reaches it where that of expert "
    )


def test_a_module_that_is_called_twice() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.plain(self.plain(x))

    message = refusal(changed(forward))
    assert message.startswith(
        "merged model, model.layers.1: running its layer on batch 0, sample 0 of task task0: mlp."
    )
    assert "is called twice in one forward, expected once" in message


def test_a_module_that_an_expert_calls_twice_for_some_samples() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.plain(x) if len(x) == 1 else self.plain(self.plain(x))

    message = refusal(changed(forward, only="task1"))
    assert message.startswith(
        "expert task1, model.layers.1: running its layer on batch 0, samples 0 to 3 of task task1: "
    )


def test_two_names_for_one_module() -> None:
    """The second is called with another input, and has the same weight."""
    job = pico.job("llama", 1)
    for model in (job.base, job.merged, job.experts["task0"]):
        attention = model.model.layers[1].self_attn
        attention.v_proj = attention.k_proj
    message = refusal(job)
    assert "self_attn.k_proj is called twice in one forward" in message


def test_a_layer_that_goes_round_its_modules() -> None:
    """Their weights are used, but no hook would ever fire."""

    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, f"{name}_proj").weight for name in ("gate", "up", "down"))
        return (nn.functional.silu(x @ gate.mT) * (x @ up.mT)) @ down.mT

    message = refusal(changed(forward), include=["gate_proj", "up_proj", "down_proj"])
    assert message.startswith(
        "model.layers.1: its forward calls none of its linear modules (mlp.gate_proj, mlp.up_proj"
    )


def test_features_that_are_not_one_row_a_token() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.plain(x) if len(x) == 1 else x + self.plain(x[:, :5]).mean(1, keepdim=True)

    message = refusal(changed(forward))
    assert message.startswith(
        "merged model, model.layers.1.mlp.gate_proj: found an input of shape (4, 5, 64) for task "
    )


def test_modules_that_are_called_by_keyword_are_seen() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(input=x), self.up_proj(input=x)
        return self.down_proj(input=self.act_fn(gate) * up)

    job, plain = changed(forward), changed(lambda self, x: self.plain(x))
    for each in (job, plain):
        ff.calibrate_model(each.merged, base=each.base, experts=each.experts, batches=each.batches)
    for name, value in plain.merged.named_parameters():
        assert torch.equal(job.merged.get_parameter(name), value), name


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_report_says_how_many_tokens_each_group_was_given(kind: str) -> None:
    job = pico.job(kind, 2)
    report = ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)
    own = sum(int(batch["attention_mask"].sum()) for batches in job.batches.values() for batch in batches)
    targets = sum(
        int((batch["labels"] != -100).sum()) for each in job.batches.values() for batch in each if kind == "t5"
    )
    for layer in report.layers:
        for group in layer.groups:
            cross = any(name.endswith(("EncDecAttention.k", "EncDecAttention.v")) for name in group.modules)
            assert group.tokens == (own if kind == "llama" or layer.index < 2 or cross else targets)
            assert group.raised == 0
