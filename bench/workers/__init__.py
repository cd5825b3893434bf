"""What is run in a process of its own: `python -m bench.workers.NAME FOLDER OUT [--device ...]`.

`FOLDER` holds a workload: `base`, a folder an expert, `<task>.safetensors`, `recipe.json`, and for comparisons also
`merged`. A worker writes the calibrated weights to `OUT` and prints what it took (`Measured.found`) as JSON. With
`--check` it only imports what it needs, and says with what it would run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import process
from bench.harness.results import versions

aten = torch.ops.aten


def options(
    doc: str | None,
    arguments: list[str] | None = None,
    imports: Callable[[argparse.Namespace], object] = lambda _: None,
) -> argparse.Namespace:
    """A worker's command line; each takes what it can use. `imports` does what is not imported before."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true", help="only say with what it would run")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--settings", type=json.loads, default={}, help="JSON, on top of the recipe's")
    parser.add_argument("--merge", type=json.loads, help="JSON, in place of the recipe's")
    parser.add_argument("--checkout", type=Path, help="of the official code")
    parser.add_argument("--merged", action="store_true", help="take FOLDER/merged instead of merging on the fly")
    parser.add_argument("--plan", action="store_true", help="first plan the job, and say what it will need")
    parser.add_argument("--so-far", type=Path, help="file that says after each layer what was done and what it took")
    parser.add_argument("--scratch", help="folder for hidden states; without it they wait in memory")
    parser.add_argument("--read-rate", type=float, help="bytes a second that tensors are read at, at most")
    parser.add_argument("--plain-ops", action="store_true", help="no Triton")
    parser.add_argument("--count", action="store_true", help="count FLOPs too, which takes longer")
    args = parser.parse_args(arguments)
    process.end_with_parent()
    imports(args)
    if args.check:
        torch.zeros(1, device=args.device)
        print(json.dumps({**versions(), "device": str(args.device)}))
        raise SystemExit
    return args


class Measured:
    """Seconds and peak memory of a worker, and the FLOPs of what it does within the context.

    `found`: `seconds`, `peak_gib` of host memory, on a GPU `peak_device_gib`; `tflop` if asked for, of products,
    attention and solves as PyTorch sees them (it does not see into Triton kernels).
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.found: dict[str, float] = {}
        self._device = args.device
        self._counter: Any = FlopCounterMode(display=False, custom_mapping=FORMULAS) if args.count else nullcontext()

    def __enter__(self) -> Measured:
        self._counter.__enter__()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.found["seconds"] = time.perf_counter() - self._started
        self._counter.__exit__(*error)
        self.found["peak_gib"] = _peak_gib()
        if self._device.type == "cuda":
            self.found["peak_device_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        if isinstance(self._counter, FlopCounterMode):
            self.found["tflop"] = self._counter.get_total_flops() / 1e12

    def say(self, **more: Any) -> None:
        print(json.dumps({**self.found, **more}))


def _peak_gib() -> float:
    """The most memory this process held. Not `ru_maxrss`: a child takes over its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**20


def _product(_: torch.Size, a: torch.Size, b: torch.Size, *__: Any, **___: Any) -> float:
    return 2 * a[0] * a[1] * b[1]


def _attention(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> float:
    return 2 * q[:-1].numel() * k[-2] * (k[-1] + v[-1])


def _solve(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> float:
    return 2 / 3 * a[-1] ** 3 + 2 * a[-1] ** 2 * b[-1]


def _cholesky(a: torch.Size, *_: Any, **__: Any) -> float:
    return a[:-2].numel() * a[-1] ** 3 / 3


def _triangular(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> float:
    return a[-1] ** 2 * b[-1]


# What torch's counter leaves out.
FORMULAS: dict[Any, Callable[..., float]] = {
    aten.addmm_: _product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._linalg_solve_ex: _solve,
    aten.linalg_cholesky_ex: _cholesky,
    aten.linalg_solve_triangular: _triangular,
}
