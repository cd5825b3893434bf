"""A baseline in FusionEval's schedule for language models: `python -m bench.workers.fusioneval FOLDER OUT`.

Written from a description of github Baicaihaochi/FusionEval_Benchmark (`methods/featcal`), not copied: the student is
whole on the device, an expert comes one layer at a time from safetensors; forward in bfloat16, one text at a time in
chunks of 256 tokens; features in float32, modules of one input together; S and C of every expert wait on the CPU until
all are there, then each group is solved by `torch.linalg.solve` in float32; hidden states wait on the CPU. RMSNorm,
embeddings and head keep their values.

Where ours differs: it folds a task's sums into one system and so keeps those of one task only; computes a triangle of
S; takes C in the cheaper of two forms; stops the student's forward at the last input; runs many texts at once.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

import featcal_fast as ff
from bench.workers import Measured, options
from bench.workers.common import load_batches, load_model, save, tasks_of
from featcal_fast.forward.calls import BatchCalls, move, stage_inputs
from featcal_fast.layer.features import ActivationHooks
from featcal_fast.models import find_structure

GROUPS = (
    tuple(f"self_attn.{name}_proj" for name in "qkv"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
CHUNK = 256  # tokens; the workloads' texts are no longer, so a text is one chunk and needs no cache
CPU = torch.device("cpu")
Sums = dict[tuple[str, ...], tuple[Tensor, Tensor]]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, arguments)
    root, device = args.folder, args.device
    settings = ff.Settings.from_dict(json.loads((root / "recipe.json").read_text())["settings"])
    student = load_model(root / "merged", torch.bfloat16).to(device)
    with Measured(args) as measured:
        _calibrate(student, root, settings, device)
    save(student, args.out)
    measured.say()


def _calibrate(student: nn.Module, root: Path, settings: ff.Settings, device: torch.device) -> None:
    tasks, base, blocks = tasks_of(root), root / "base", find_structure(student, "merged").blocks
    texts = {task: [_unpadded(batch) for batch in load_batches(root, task, 1, torch.bfloat16)] for task in tasks}
    own = {task: [_enter(student, text, device) for text in texts[task]] for task in tasks}
    theirs = {}
    for task in tasks:  # only for its embeddings
        expert = load_model(root / task, torch.bfloat16).to(device)
        theirs[task] = [_enter(expert, text, device) for text in texts[task]]
        del expert

    for index, block in enumerate(blocks):
        sums: dict[str, Sums] = {}
        weights: dict[str, dict[str, Tensor]] = {}
        for task in tasks:
            expert_block = _layer(block, root / task, index)
            sums[task] = _statistics(index, block, expert_block, own[task], theirs[task], settings, device)
            weights[task] = {name: value.cpu() for name, value in expert_block.named_parameters()}
        base_block = _layer(block, base, index)
        for group in GROUPS:
            _solve(
                block,
                base_block,
                group,
                [sums[task][group] for task in tasks],
                [weights[task] for task in tasks],
                settings,
            )
        del expert_block, base_block  # before the next layer's are read
        for task in tasks:
            own[task] = [(_run(index, block, hidden, calls, device), calls) for hidden, calls in own[task]]


def _statistics(
    index: int,
    block: nn.Module,
    expert: nn.Module,
    own: list[tuple[Tensor, BatchCalls]],
    theirs: list[tuple[Tensor, BatchCalls]],
    settings: ff.Settings,
    device: torch.device,
) -> Sums:
    """S and C of each group, on the CPU; `theirs` goes on to the next layer."""
    sums: Sums = {}
    leaders, alpha, tokens = [group[0] for group in GROUPS], settings.teacher_alpha, 0
    for number, ((hidden, calls), (expert_hidden, expert_calls)) in enumerate(zip(own, theirs, strict=True)):
        xs: dict[str, Tensor] = {}
        xe: dict[str, Tensor] = {}
        with ActivationHooks(block, leaders, xs.__setitem__):
            _run(index, block, hidden, calls, device)
        with ActivationHooks(expert, leaders, xe.__setitem__):
            theirs[number] = _run(index, expert, expert_hidden, expert_calls, device), expert_calls
        tokens += hidden.shape[1]
        for group in GROUPS:
            s, e = (x[group[0]].flatten(0, -2).float() for x in (xs, xe))
            products = s.T @ s, s.T @ (alpha * e + (1 - alpha) * s)
            if group in sums:
                for total, product in zip(sums[group], products, strict=True):
                    total += product
            else:
                sums[group] = products
    return {group: (s.div_(tokens).cpu(), c.div_(tokens).cpu()) for group, (s, c) in sums.items()}


def _solve(
    block: nn.Module,
    base: nn.Module,
    group: tuple[str, ...],
    sums: list[tuple[Tensor, Tensor]],
    experts: list[dict[str, Tensor]],
    settings: ff.Settings,
) -> None:
    names = [f"{name}.weight" for name in group]
    device = block.get_parameter(names[0]).device
    merged, origin = (torch.cat([m.get_parameter(name).float() for name in names]).to(device) for m in (block, base))
    anchor = settings.anchor_rho * merged + (1 - settings.anchor_rho) * origin
    ridge, eps = settings.ridge_lambda, settings.covariance_eps
    left = (ridge + eps) * torch.eye(anchor.shape[1], device=device)
    right = ridge * anchor.T
    for (s, c), weights in zip(sums, experts, strict=True):
        s, c = s.to(device), c.to(device)
        norm = s.norm().clamp_min(eps)
        left += s / norm
        right += (c / norm) @ torch.cat([weights[name].float() for name in names]).to(device).T
    solved = torch.linalg.solve(left, right).T
    for name, rows in zip(names, solved.split([len(block.get_parameter(name)) for name in names]), strict=True):
        block.get_parameter(name).copy_(rows)


def _layer(like: nn.Module, folder: Path, index: int) -> nn.Module:
    block = copy.deepcopy(like)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        prefix = f"model.layers.{index}."
        block.load_state_dict({name: file.get_tensor(prefix + name) for name in block.state_dict()})
    return block


def _enter(model: nn.Module, text: dict[str, Tensor], device: torch.device) -> tuple[Tensor, BatchCalls]:
    hidden, calls = stage_inputs(find_structure(model, "model"), move(text, device))
    return hidden.cpu(), move(calls, CPU)


def _run(index: int, block: nn.Module, hidden: Tensor, calls: BatchCalls, device: torch.device) -> Tensor:
    return move(calls, device).run(index, block, hidden.to(device)).cpu()


def _unpadded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = batch["input_ids"][batch["attention_mask"].bool()][None]
    if ids.shape[1] > CHUNK:
        raise SystemExit(f"found a text of {ids.shape[1]} tokens, expected at most {CHUNK}")
    return {"input_ids": ids}


if __name__ == "__main__":
    main()
