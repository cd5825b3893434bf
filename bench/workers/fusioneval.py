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
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

import featcal_fast as ff
from bench.baselines import GROUPS, Sums, add, capture, run_block, solve
from bench.workers import Measured, options
from bench.workers.common import load_batches, load_model, save, tasks_of

CHUNK = 256  # tokens; the workloads' texts are no longer, so a text is one chunk and needs no cache
Angles = tuple[Tensor, Tensor]


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, arguments)
    settings = ff.Settings.from_dict(json.loads((args.folder / "recipe.json").read_text())["settings"])
    student = load_model(args.folder / "merged", torch.bfloat16).to(args.device)
    with Measured(args) as measured:
        _calibrate(student, args.folder, settings, args.device)
    save(student, args.out)
    measured.say()


def _calibrate(student: Any, root: Path, settings: ff.Settings, device: torch.device) -> None:
    tasks = tasks_of(root)
    texts = {task: [_unpadded(batch) for batch in load_batches(root, task, 1, torch.bfloat16)] for task in tasks}
    angles = {task: [_angles(student, ids, device) for ids in texts[task]] for task in tasks}
    own = {task: [_embedded(student, ids, device) for ids in texts[task]] for task in tasks}
    theirs = {}
    for task in tasks:  # only for its embeddings
        expert = load_model(root / task, torch.bfloat16).to(device)
        theirs[task] = [_embedded(expert, ids, device) for ids in texts[task]]
        del expert

    for index, block in enumerate(student.model.layers):
        sums: dict[str, Sums] = {}
        weights: dict[str, dict[str, Tensor]] = {}
        for task in tasks:
            expert_block = _layer(block, root / task, index)
            sums[task] = _statistics(block, expert_block, own[task], theirs[task], angles[task], settings, device)
            weights[task] = {name: value.cpu() for name, value in expert_block.named_parameters()}
        base_block = _layer(block, root / "base", index)
        for group in GROUPS:
            solve(block, base_block, group, [sums[task][group] for task in tasks], list(weights.values()), settings)
        del expert_block, base_block  # before the next layer's are read
        for task in tasks:
            own[task] = [
                run_block(block, hidden.to(device), each).cpu()
                for hidden, each in zip(own[task], angles[task], strict=True)
            ]


def _statistics(
    block: nn.Module,
    expert: nn.Module,
    own: list[Tensor],
    theirs: list[Tensor],
    angles: list[Angles],
    settings: ff.Settings,
    device: torch.device,
) -> Sums:
    """S and C of each group, on the CPU; `theirs` goes on to the next layer."""
    sums: Sums = {}
    for number, each in enumerate(angles):
        xs, _ = capture(block, GROUPS, own[number].to(device), each)
        xe, out = capture(expert, GROUPS, theirs[number].to(device), each)
        theirs[number] = out.cpu()
        add(sums, xs, xe, settings.teacher_alpha)
    tokens = sum(hidden.shape[1] for hidden in own)
    return {group: (s.div_(tokens).cpu(), c.div_(tokens).cpu()) for group, (s, c) in sums.items()}


def _layer(like: nn.Module, folder: Path, index: int) -> nn.Module:
    block = copy.deepcopy(like)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        prefix = f"model.layers.{index}."
        block.load_state_dict({name: file.get_tensor(prefix + name) for name in block.state_dict()})
    return block


def _embedded(model: Any, ids: Tensor, device: torch.device) -> Tensor:
    return model.model.embed_tokens(ids.to(device)).cpu()


def _angles(model: Any, ids: Tensor, device: torch.device) -> Angles:
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    return model.model.rotary_emb(like, torch.arange(ids.shape[1], device=device)[None])


def _unpadded(batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        ids = ids[batch["attention_mask"].bool()][None]
    if ids.shape[1] > CHUNK:
        raise SystemExit(f"found a text of {ids.shape[1]} tokens, expected at most {CHUNK}")
    return ids


if __name__ == "__main__":
    main()
