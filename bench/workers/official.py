"""The official demo's own code (github egangu/featcal) on a workload's folder, in a process and environment of its own.

    OFFICIAL_PYTHON -m bench.workers.official FOLDER OUT CHECKOUT

It runs `CLIPFeatCalibrator.calibrate` as it is; only its data loader is replaced, to serve the workload's tensors in
batches of 16, as is its default. Needs a transformers whose CLIPVisionModel has `.vision_model` (5.5 or older).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bench.workers import peak_gib


def main(folder: str, out: str, checkout: str) -> None:
    sys.path.insert(0, str(Path(checkout) / "src"))
    from featcal import featcal as official

    tasks = sorted(path.stem for path in Path(folder).glob("*.safetensors"))
    base, merged = _load(Path(folder) / "base"), _load(Path(folder) / "merged")
    experts = {task: _load(Path(folder) / task) for task in tasks}

    official.load_task_dataset = lambda task, *_args, **_kwargs: task
    official.make_clip_loader = lambda task, *_args, **_kwargs: task
    official.iter_limited_image_batches = lambda task, _count: iter(
        load_file(Path(folder) / f"{task}.safetensors")["pixel_values"].split(16)
    )
    config = official.FeatCalConfig(lambda_ratio=0.05, anchor_blend_rho=2.0, teacher_interp_alpha=0.3)
    calibrator = official.CLIPFeatCalibrator(config, processor=None, device=torch.device("cpu"))
    started = time.perf_counter()
    calibrator.calibrate(merged_model=merged, base_model=base, expert_models=experts, tasks=tasks)
    seconds = time.perf_counter() - started
    save_file({name: value.contiguous() for name, value in merged.state_dict().items()}, out)
    print(json.dumps({"seconds": seconds, "peak_gib": peak_gib()}))


def _load(folder: Path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig.from_pretrained(folder)).eval()
    weights = load_file(folder / "model.safetensors")
    weights = {name if name.startswith("vision_model.") else f"vision_model.{name}": w for name, w in weights.items()}
    model.load_state_dict(weights)
    return model


if __name__ == "__main__":
    main(*sys.argv[1:])
