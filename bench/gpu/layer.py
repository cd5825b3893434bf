"""A whole Llama-3.1-8B-shaped layer, five tasks of 32k tokens: the engine, and the reference schedules.

The engine calibrates a model of two such layers as it would any other, and is timed in the first. Where the reference
schedules (`bench.baselines`) differ from their originals, they are the faster for it:

- official: float32 forward and moments and an LU solve for every linear module on its own, as there; its statistics
  stay on the device here, go to the host there. Once more with a bfloat16 forward.
- FusionEval: bfloat16 forward in chunks of 256 tokens, batch 1, float32 moments a group of modules with one input, one
  solve a group, as there; chunks attend to themselves only here, to all tokens before them there, and the statistics
  stay on the device here, go to the host there.

A reference schedule is run for one task, and what it does for each is counted for all.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

import featcal_fast as ff
from bench import baselines
from bench.gpu.sections import Row, Section
from bench.gpu.timing import Run
from bench.harness.results import Results, Rows
from bench.phases import Clock, clocked
from featcal_fast.forward import compiled as forwards
from featcal_fast.reporting.progress import Progress
from featcal_fast.reporting.report import LayerReport

ENGINE, COMPILED = "engine, blocks as they are", "engine, blocks compiled"
OFFICIAL, FUSIONEVAL = "official, as published", "FusionEval, as published"
PHASES = ("forward", "moments", "fold", "solve", "advance")
ONE_TASK = ("forward", "moments", "advance")  # phases of a reference schedule that each task has
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TOY = {"hidden_size": 64, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 1}
SETTINGS = ff.Settings(ridge_lambda=0.1, anchor_rho=1.5, teacher_alpha=0.25)


class Workload:
    """Merged, base and expert model, and `batches` batches of token ids that all tasks share, in bfloat16."""

    def __init__(self, run: Run) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.device = run.device
        self.tasks, self.batches, self.samples, self.length = (2, 2, 2, 64) if run.dry else (5, 2, 32, 512)
        self.config = LlamaConfig(num_hidden_layers=2, vocab_size=1024, **(TOY if run.dry else SHAPE))
        torch.manual_seed(0)
        self.merged = LlamaForCausalLM(self.config).to(run.device, torch.bfloat16).eval().requires_grad_(False)
        self.base, self.expert = copy.deepcopy(self.merged), copy.deepcopy(self.merged)
        for model in (self.base, self.expert):
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.002)
        self.ids = torch.randint(0, 1024, (self.batches, self.samples, self.length), device=run.device)

    @property
    def tokens(self) -> int:
        """Of a task."""
        return self.batches * self.samples * self.length


def rows(run: Run, results: Results) -> Iterator[Row]:
    @cache
    def work() -> Workload:
        return Workload(run)

    def row(name: str, measure: Callable[[Workload], dict[str, Any]], seconds: float) -> Row:
        return Row(name, lambda left: measure(work()), seconds)

    yield row(ENGINE, partial(engine, run=run), 12.0)
    yield row(COMPILED, partial(engine, run=run, compiled=True), 60.0)
    yield row(OFFICIAL, partial(baseline, groups=baselines.ALONE, dtype=torch.float32), 15.0)
    yield row(FUSIONEVAL, partial(baseline, groups=baselines.GROUPS, chunk=256), 12.0)
    yield row("official, bfloat16 forward", partial(baseline, groups=baselines.ALONE), 12.0)


class FirstLayer(Progress):
    """The seconds of a model's first layer, by phase."""

    def __init__(self, phases: Callable[[], dict[str, float]]) -> None:
        self.seconds: dict[str, float] = {}
        self.report: LayerReport | None = None
        self._phases = phases

    def stage(self, layers: int, tokens: int) -> None:
        self._before, self._began = self._phases(), time.perf_counter()

    def layer(self, report: LayerReport) -> None:
        if self.report is not None:
            return
        phases = self._phases()  # waits for the device
        self.report, whole = report, time.perf_counter() - self._began
        phases = {name: seconds - self._before.get(name, 0.0) for name, seconds in phases.items()}
        phases["forward"] = phases.pop("experts' forward") + phases.pop("student's forward")
        self.seconds = {name: phases[name] for name in PHASES}
        self.seconds["other"] = max(0.0, whole - sum(self.seconds.values()))


def engine(work: Workload, run: Run, compiled: bool = False) -> dict[str, Any]:
    """The engine's phases, and what each needs to compute."""
    settings = replace(SETTINGS, compile_blocks=compiled)
    experts = {f"task{i}": work.expert for i in range(work.tasks)}
    batches = {task: [{"input_ids": ids} for ids in work.ids] for task in experts}
    found: list[FirstLayer] = []

    def calibrate() -> None:
        merged = copy.deepcopy(work.merged)
        with clocked(work.device) as phases:
            found.append(FirstLayer(phases))
            others = {"base": work.base, "experts": experts, "batches": batches}
            ff.calibrate_model(merged, **others, settings=settings, progress=found[-1])

    with really_compiling(run) if compiled else nullcontext():
        for _ in range(2):  # the first warms up
            calibrate()
    last = found[-1]
    assert last.report is not None
    ms = {phase: seconds * 1e3 for phase, seconds in last.seconds.items()}
    return {"tasks": work.tasks, "tokens": work.tokens, "flops": flops(work, last.report), "ms": ms}


@contextmanager
def really_compiling(run: Run) -> Iterator[None]:
    """An error where blocks cannot be compiled, instead of blocks as they are; in a dry run, no compiler."""
    backend = forwards.BACKEND
    forwards.BACKEND = "eager" if run.dry else backend
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*compile_blocks: false does not try")
            yield
    finally:
        forwards.BACKEND = backend


def flops(work: Workload, report: LayerReport) -> dict[str, float]:
    """FLOPs that each phase of the engine needs, for all tasks; a float32 product counts once."""
    tokens = work.tasks * work.tokens
    weights = [group.in_features * group.out_features for group in report.groups]
    attention = 2 * 2 * work.length * work.config.hidden_size / 2  # causal scores and values
    whole = 2 * sum(weights) + attention
    need = {"forward": tokens * (2 * whole - 2 * weights[-1]), "advance": tokens * whole}  # no last product, once
    need |= {"moments": 0.0, "fold": 0.0, "solve": 0.0}
    for group in report.groups:
        d, out = group.in_features, group.out_features
        by_output = group.space == "output"
        need["moments"] += tokens * (d * d + 2 * d * (out if by_output else d))
        need["fold"] += work.tasks * 2 * out * d * d * (1 if by_output else 2)
        need["solve"] += d**3 / 3 + 2 * out * d * d
    return need


@torch.no_grad()
def baseline(
    work: Workload, groups: Sequence[baselines.Group], dtype: torch.dtype = torch.bfloat16, chunk: int | None = None
) -> dict[str, Any]:
    """A reference schedule's phases, of a warm run."""
    texts = work.ids.reshape(-1, 1, min(chunk, work.length)) if chunk else work.ids
    base, expert = (model.model.layers[0].to(dtype) for model in map(copy.deepcopy, (work.base, work.expert)))
    hidden = work.merged.model.embed_tokens(texts).to(dtype)
    positions = torch.arange(texts.shape[-1], device=work.device)[None]
    angles = work.merged.model.rotary_emb(hidden, positions)
    for _ in range(2):
        block, clock = copy.deepcopy(work.merged.model.layers[0]).to(dtype), Clock(work.device)
        sums: baselines.Sums = {}
        for states in hidden:
            with clock("forward"):
                own, _ = baselines.capture(block, groups, states, angles)
                theirs, _ = baselines.capture(expert, groups, states, angles)
            with clock("moments"):
                baselines.add(sums, own, theirs, SETTINGS.teacher_alpha)
        with clock("solve"):
            for group in groups:
                s, c = (total / work.tokens for total in sums.pop(group))
                weights = [dict(expert.named_parameters())] * work.tasks
                baselines.solve(block, base, group, [(s, c)] * work.tasks, weights, SETTINGS)
        with clock("advance"):
            for states in hidden:
                baselines.run_block(block, states, angles)
    return {"ms": {phase: ms * (work.tasks if phase in ONE_TASK else 1) for phase, ms in clock.read().items()}}


def ours(rows: Rows) -> dict[str, Any] | None:
    """The engine as it is on a GPU: with blocks compiled, if that was measured."""
    return rows.get(COMPILED, rows.get(ENGINE))


def total(row: dict[str, Any]) -> float:
    return sum(row["ms"].values())


def ideal(rows: Rows, peak: float) -> dict[str, float]:
    """Milliseconds of each phase if all that it needs were computed at the peak."""
    row = ours(rows)
    return {phase: row["flops"][phase] / peak * 1e-9 for phase in PHASES} if row else {}


def lines(rows: Rows, peak: float) -> list[dict[str, Any]]:
    """A way a line, and the ideal."""
    best, engine = ideal(rows, peak), ours(rows)
    ways = {**rows, "ideal": {"ms": best}} if best else rows
    return [
        {"way": name}
        | {phase: row["ms"].get(phase) for phase in (*PHASES, "other")}
        | {
            "ms": total(row),
            "share of ideal": sum(best.values()) / total(row) if best else None,
            "engine's": total(row) / total(engine) if engine else None,
        }
        for name, row in ways.items()
    ]


def notes(rows: Rows, peak: float) -> list[str]:
    found = [
        f"ideal: FLOPs needed at the measured {peak:.3g} TFLOP/s. engine's: times slower than the engine, with blocks "
        "compiled if they were.",
        "other: waiting for blocks, drift, what the host does meanwhile. The baselines' fold is in their solve. As "
        "published: but for what bench/gpu/layer.py names, which makes them faster.",
    ]
    if row := ours(rows):
        found.insert(0, f"{row['tasks']} tasks of {row['tokens']} tokens.")
    return found


LAYER = Section("layer", 0.18, rows, "One Llama-3.1-8B-shaped layer, milliseconds", lines, notes)
