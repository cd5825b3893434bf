"""A forward that draws random numbers is refused: the same sample twice must give the same hidden states."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pico
import pytest
import torch
import transformers
from torch import Tensor, nn

import featcal_fast as ff
from featcal_fast.errors import UnsupportedModelError


def run(job: pico.Job) -> ff.Report:
    return ff.calibrate_model(job.merged, base=job.base, experts=job.experts, batches=job.batches)


def dropout(rate: float) -> Any:
    return lambda _module, _args, out: nn.functional.dropout(out, rate, training=True)


def with_hook(where: str, module: str, hook: Any, kind: str = "llama", dtype: torch.dtype = torch.float32) -> pico.Job:
    job = pico.job(kind, 2)
    models = {"base": job.base, "merged": job.merged, **job.experts}
    for model in models.values():
        model.to(dtype)
    models[where].get_submodule(module).register_forward_hook(hook)
    return job


def test_a_masked_autoencoder_is_refused() -> None:
    """It is a ViT but for the patches that it leaves out, which others each time."""
    config = transformers.ViTMAEConfig(**pico.IMAGE)
    models = [transformers.ViTMAEModel(config).eval() for _ in range(3)]
    job = pico.Job(models[0], {"task0": models[1]}, models[2], {"task0": pico.images(8, 0)})
    with pytest.raises(UnsupportedModelError, match=r"merged model, task task0, batch 0, .*draws random numbers"):
        run(job)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["merged", "task1"])
def test_dropout_on_the_way_to_the_layers(where: str, dtype: torch.dtype) -> None:
    job = with_hook(where, "model.embed_tokens", dropout(0.1), dtype=dtype)
    label = {"merged": "merged model, task task0", "task1": "expert task1, task task1"}[where]
    with pytest.raises(
        UnsupportedModelError, match=f"^{label}, batch 0, what enters the layers: the same sample gives"
    ):
        run(job)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("where", "layer", "rate"), [("merged", 0, 0.1), ("merged", 1, 0.01), ("merged", 2, 0.1), ("task1", 0, 0.1)]
)
def test_dropout_in_a_layer(where: str, layer: int, rate: float, dtype: torch.dtype) -> None:
    job = with_hook(where, f"model.layers.{layer}.mlp.down_proj", dropout(rate), dtype=dtype)
    label = "merged model" if where == "merged" else "expert task1"
    with pytest.raises(
        UnsupportedModelError, match=rf"^{label}, model\.layers\.{layer}: the same sample gives other hid"
    ):
        run(job)


def test_a_layer_that_is_left_out_at_random() -> None:
    def skip(_module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return out if next(draws) else 0 * out

    draws = cycle([True, False])
    with pytest.raises(UnsupportedModelError, match="draws random numbers"):
        run(with_hook("merged", "model.layers.1.mlp", skip))


def test_a_rate_that_grows_with_depth() -> None:
    """All layers run the same code, and the first ones draw nothing."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.plain(x), self.rate, training=self.rate > 0)

    job = pico.job("llama", 1)
    for model in (job.base, job.merged, *job.experts.values()):
        for number, layer in enumerate(model.model.layers):
            owner = type(layer.mlp)
            layer.mlp.__class__ = type(owner.__name__, (owner,), {"forward": forward, "plain": owner.forward})
            layer.mlp.rate = [0.0, 0.0, 0.1][number]
    with pytest.raises(UnsupportedModelError, match=r"^merged model, model\.layers\.2: the same sample gives other"):
        run(job)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_gpu_adds_up_in_any_order_is_no_random_number(dtype: torch.dtype) -> None:
    """Every value a rounding off, either way, in every run."""

    def unsteady(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out * (1 + torch.finfo(dtype).eps * torch.randint_like(out, -1, 2))

    job = pico.job("llama", 2)
    for model in (job.base, job.merged, *job.experts.values()):
        model.to(dtype)
        for name, module in model.named_modules():
            if name.endswith(("embed_tokens", "proj")):
                module.register_forward_hook(unsteady)
    run(job)


@pytest.mark.parametrize("kind", ["llama", "clip"])
def test_no_random_number_is_drawn(kind: str) -> None:
    job = pico.job(kind, 2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(job)
    assert torch.equal(torch.get_rng_state(), before)
