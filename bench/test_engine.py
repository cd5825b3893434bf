"""The engine's parts on this machine against plain torch: `python -m pytest bench/test_engine.py`.

Save a run with `--benchmark-save=NAME`, hold a later one against it with `--benchmark-compare`.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import featcal_fast as ff
from bench.workloads import VISION, Workload, random_model
from featcal_fast.checkpoints import find_checkpoint
from featcal_fast.layer.layout import InputGroup, Layout
from featcal_fast.layer.moments import TaskMoments
from featcal_fast.layer.solve import solve_layer
from featcal_fast.layer.systems import Anchor, LayerSystem
from featcal_fast.layer.tokens import TokenCounts
from featcal_fast.reference import LinearStats, solve_weight
from featcal_fast.streaming.sources import CheckpointSource

CPU, SETTINGS, TOKENS = torch.device("cpu"), ff.Settings(), 3200
SHAPES = [
    (768, 3072),
    (3072, 768),
]  # of a weight: input space is the cheaper one for the first, output space for the other
B32_LAYER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1, "num_attention_heads": 12}
ONE_LAYER = Workload(VISION, {**B32_LAYER, "image_size": 224, "patch_size": 32}, tasks=2)


class Task:
    """One linear module's features and weights for one task."""

    def __init__(self, size: int, out: int) -> None:
        torch.manual_seed(0)
        self.layout = Layout((InputGroup(("fc",), size, (out,), None),), {}, "fc")
        self.block, self.base, self.expert = (nn.ModuleDict({"fc": nn.Linear(size, out, bias=False)}) for _ in range(3))
        self.xs, self.xe = torch.randn(2, TOKENS, size)
        self.ye = self.expert.fc(self.xe).detach()  # the forward makes it anyway
        counts = TokenCounts(TOKENS, 8 * TOKENS, 8)
        self.moments = TaskMoments(self.layout, self.block, counts, SETTINGS, CPU)
        self.system = LayerSystem(
            self.layout, Anchor(self.block, self.base, SETTINGS.anchor_rho), SETTINGS, CPU, counts
        )

    @torch.no_grad()
    def add(self) -> None:
        group = self.moments.groups["fc"]
        group.reset()
        group.add(self.xs, self.xe, [self.ye], None, TOKENS, lambda _, addition: addition())

    @torch.no_grad()
    def fold(self) -> None:
        self.system.fold(self.moments, self.expert, "task")

    def statistics(self) -> LinearStats:
        target = SETTINGS.teacher_alpha * self.xe + (1 - SETTINGS.teacher_alpha) * self.xs
        s, c = self.xs.T @ self.xs / TOKENS, self.xs.T @ target / TOKENS
        return LinearStats(s, c, self.xs.mean(0), target.mean(0))


@pytest.mark.parametrize(("size", "out"), SHAPES)
@pytest.mark.parametrize("how", ["torch", "featcal_fast"])
def test_moments(benchmark, how: str, size: int, out: int) -> None:
    benchmark.group = f"moments of {TOKENS} tokens, {size} -> {out}"
    task = Task(size, out)
    benchmark(task.statistics if how == "torch" else task.add)


@pytest.mark.parametrize(("size", "out"), SHAPES)
@pytest.mark.parametrize("how", ["torch", "featcal_fast"])
def test_fold(benchmark, how: str, size: int, out: int) -> None:
    benchmark.group = f"fold of a task, {size} -> {out}"
    task = Task(size, out)
    task.add()
    stats = task.statistics()
    a, r, weight = torch.zeros(size, size), torch.zeros(size, out), task.expert.fc.weight.detach()

    def plain() -> None:
        w = 1 / stats.s.norm()
        a.add_(w * stats.s)
        r.add_(w * stats.c @ weight.T)

    benchmark(plain if how == "torch" else task.fold)


@pytest.mark.parametrize(("size", "out"), SHAPES)
@pytest.mark.parametrize("how", ["torch", "featcal_fast"])
def test_solve(benchmark, how: str, size: int, out: int) -> None:
    benchmark.group = f"solve, {size} -> {out}"
    task = Task(size, out)
    task.add()
    stats, weights = task.statistics(), [m.fc.weight.detach() for m in (task.expert, task.block, task.base)]
    task.fold()

    def ours() -> None:
        system = copy.deepcopy(task.system)  # it is used up
        with torch.no_grad():
            solve_layer(system, task.moments, 1)

    benchmark(ours if how == "featcal_fast" else lambda: solve_weight([stats], weights[:1], *weights[1:], SETTINGS))


@pytest.mark.parametrize("how", ["safetensors", "featcal_fast"])
def test_reader(benchmark, how: str, tmp_path: Path) -> None:
    benchmark.group = "a block of ViT-B/32 from disk, warm"
    random_model(ONE_LAYER).save_pretrained(tmp_path)
    source = CheckpointSource(find_checkpoint(str(tmp_path), tmp_path, "model"), CPU)

    def plain() -> None:
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            for name in source.block_tensors(0):
                file.get_tensor(name).clone()  # mapped, until it is used

    benchmark(plain if how == "safetensors" else lambda: source.block(0))


@pytest.mark.parametrize("how", ["reference", "featcal_fast"])
def test_layer(benchmark, how: str) -> None:
    benchmark.group = "a layer of ViT-B/32, 2 tasks of 32 images"
    base = random_model(ONE_LAYER)
    experts = {"a": random_model(ONE_LAYER), "b": random_model(ONE_LAYER)}
    batches = {task: [{"pixel_values": torch.randn(32, 3, 224, 224)}] for task in experts}
    run = ff.reference.calibrate_model if how == "reference" else ff.calibrate_model
    merged = copy.deepcopy(base)
    benchmark.pedantic(
        run, (merged,), {"base": base, "experts": experts, "batches": batches}, rounds=3, warmup_rounds=1
    )
