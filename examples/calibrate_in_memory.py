"""Models in memory, no files: two small Llamas learn a task each, are averaged, and the average is calibrated.

    python examples/calibrate_in_memory.py [--out FOLDER]

Offline, in seconds on a CPU. The base counts on by 2 or 3, one expert learns to count by 1, the other by -1. Printed is
how many numbers each model continues rightly. With your own models, replace what is above `calibrate_model`.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import featcal_fast as ff

NUMBERS, LENGTH = 61, 12
TASKS = {"up": [1], "down": [-1]}


def sequences(steps: list[int], count: int, seed: int) -> Tensor:
    """`[count, LENGTH]` numbers modulo `NUMBERS`, each row from a random start by one of `steps`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(NUMBERS, (count, 1), generator=generator)
    step = torch.tensor(steps)[torch.randint(len(steps), (count, 1), generator=generator)]
    return (starts + step * torch.arange(LENGTH)) % NUMBERS


def trained(model: LlamaForCausalLM, steps: list[int], updates: int) -> LlamaForCausalLM:
    """A copy that has learned to count by `steps`."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for update in range(updates):
        ids = sequences(steps, 32, seed=update)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def average(models: list[LlamaForCausalLM]) -> LlamaForCausalLM:
    """A model whose parameters are the mean of theirs."""
    merged = copy.deepcopy(models[0])
    with torch.no_grad():
        for parameter, *others in zip(merged.parameters(), *(model.parameters() for model in models[1:]), strict=True):
            parameter.copy_(torch.stack([parameter, *others]).mean(0))
    return merged


@torch.no_grad()
def right(model: LlamaForCausalLM, task: str) -> float:
    """The share of numbers continued rightly, once two have shown the step."""
    ids = sequences(TASKS[task], 256, seed=10**6)
    return float((model(input_ids=ids).logits.argmax(-1)[:, 1:-1] == ids[:, 2:]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to save the calibrated model in")
    out = parser.parse_args().out

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUMBERS, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    base = trained(LlamaForCausalLM(config), [2, 3], updates=150)
    experts = {task: trained(base, steps, updates=80) for task, steps in TASKS.items()}
    merged = average(list(experts.values()))
    calibrated = copy.deepcopy(merged)

    # Unlabelled samples of each task, in batches of the model's keyword arguments.
    batches = {task: [{"input_ids": sequences(steps, 64, seed=2 * 10**6)}] for task, steps in TASKS.items()}
    report = ff.calibrate_model(calibrated, base=base, experts=experts, batches=batches, settings=ff.Settings())

    print(report.summary())
    models = {"base": base, "experts' average": merged, "calibrated": calibrated}
    for name, found in [*models.items(), *((f"expert {task}", expert) for task, expert in experts.items())]:
        print(f"{name:18}" + "".join(f"  {task}: {right(found, task):6.1%}" for task in TASKS))
    if out:
        calibrated.save_pretrained(out)


if __name__ == "__main__":
    main()
