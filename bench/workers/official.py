"""The official demo's own code (github egangu/featcal) on a workload's folder, in a process and environment of its own.

    OFFICIAL_PYTHON -m bench.workers.official FOLDER OUT --checkout CHECKOUT

It runs `CLIPFeatCalibrator.calibrate` as it is; only its data loader is replaced, to serve the workload's tensors in
batches of 16, as is its default. With `--dtype float64` it computes in float64 from models and images to the solve, for
which the `torch.float32` that its solver names is read as float64. Needs a transformers whose CLIPVisionModel has
`.vision_model` (5.5 or older).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from bench.workers import Measured, options


class _As(ModuleType):
    """torch, but for what it calls float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__("torch")
        self.float32 = dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def main(arguments: list[str] | None = None) -> None:
    args = options(__doc__, arguments, _official)
    official, solver = _official(args)
    solver.torch = _As(args.dtype)
    tasks = sorted(path.stem for path in args.folder.glob("*.safetensors"))
    base, merged = _load(args.folder / "base", args.dtype), _load(args.folder / "merged", args.dtype)
    experts = {task: _load(args.folder / task, args.dtype) for task in tasks}

    official.load_task_dataset = lambda task, *_args, **_kwargs: task
    official.make_clip_loader = lambda task, *_args, **_kwargs: task
    official.iter_limited_image_batches = lambda task, _count: iter(
        load_file(args.folder / f"{task}.safetensors")["pixel_values"].to(args.dtype).split(16)
    )
    config = official.FeatCalConfig(lambda_ratio=0.05, anchor_blend_rho=2.0, teacher_interp_alpha=0.3)
    calibrator = official.CLIPFeatCalibrator(config, processor=None, device=args.device)
    with Measured(args) as measured:
        calibrator.calibrate(merged_model=merged, base_model=base, expert_models=experts, tasks=tasks)
    save_file({name: value.cpu().contiguous() for name, value in merged.state_dict().items()}, args.out)
    measured.say()


def _official(args: argparse.Namespace) -> tuple[Any, Any]:
    sys.path.insert(0, str(args.checkout.resolve() / "src"))
    from featcal import featcal, solver

    return featcal, solver


def _load(folder: Path, dtype: torch.dtype) -> Any:
    model = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder)).eval()
    weights = load_file(folder / "model.safetensors")
    weights = {name if name.startswith("vision_model.") else f"vision_model.{name}": w for name, w in weights.items()}
    model.load_state_dict(weights)
    return model.to(dtype)


if __name__ == "__main__":
    main()
