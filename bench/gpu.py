"""What the kernels reach on the GPU at hand: `PYTHONPATH=.:kernels python -m bench.gpu`.

Each section measures one thing, prints a table and adds its numbers to one JSON file with the versions of
everything that matters, before the next one begins. Variants of a measurement take turns, so that a drifting clock
meets all of them; times are medians. `--dry-run` goes through the same motions on the CPU, at toy sizes, and writes
nothing unless `--out` says where.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from featcal_kernels import add_scaled_, addmm_, frobenius, gram_cross_, symmetrize_
from torch import Tensor

from bench import layer
from featcal_fast.solve import factor_, solve_

RESULTS = Path(__file__).parent / "results"
CALLS_MS = 2.0  # short calls are timed in groups of this length
ROUNDS = (3, 25)
BYTES = {torch.bfloat16: 2, torch.float32: 4}


@dataclass(frozen=True)
class Run:
    """What the sections share."""

    device: torch.device
    dry: bool
    peak: float = 0.0  # TFLOP/s of a large bfloat16 product


@dataclass(frozen=True)
class Table:
    """A section's result."""

    title: str
    rows: Sequence[dict[str, Any]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        names = list(self.rows[0])
        cells = [names, *([_text(row[name]) for name in names] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([self.title, *lines, *self.notes])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def measure(variants: dict[str, Callable[[], object]], run: Run, budget_s: float = 0.5) -> dict[str, float]:
    """Median milliseconds of a call of each variant; the variants take turns."""
    calls = {}
    for name, call in variants.items():
        call()
        once = _milliseconds(call, 1, run.device)
        calls[name] = (max(1, min(50, int(CALLS_MS / max(once, 1e-3)))), once)
    round_ms = sum(count * once for count, once in calls.values())
    rounds = 1 if run.dry else int(max(ROUNDS[0], min(ROUNDS[1], budget_s * 1e3 / round_ms)))
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(_milliseconds(call, calls[name][0], run.device))
    return {name: median(values) for name, values in times.items()}


def _milliseconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(count):
            call()
        return (time.perf_counter() - start) * 1e3 / count
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    for _ in range(count):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / count


def measure_peak(run: Run) -> float:
    """TFLOP/s of large square bfloat16 products of random values."""
    best = 0.0
    for size in (64,) if run.dry else (8192, 12288):
        a, b = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: Tensor = a, b: Tensor = b, out: Tensor = out) -> None:
            torch.mm(a, b, out=out)

        best = max(best, 2 * size**3 / measure({"product": product}, run, 2.0)["product"] * 1e-9)
    return best


@dataclass(frozen=True)
class Shape:
    """One Gram matrix `[d, d]` and one cross moment `[m, d]` of `n` tokens."""

    d: int
    m: int
    n: int
    dtype: torch.dtype

    @property
    def products(self) -> int:
        """Tensor core products for each of the sum's: float32 features are split in two."""
        return 3 if self.dtype == torch.float32 else 1

    @property
    def needed(self) -> float:
        """FLOPs of the triangle and the rectangle."""
        return self.n * self.d * (self.d + 1 + 2 * self.m) * self.products

    def features(self, device: torch.device) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.n, self.d, device=device, dtype=self.dtype)
        return x, torch.randn(self.n, self.m, device=device, dtype=self.dtype)


def moments(run: Run) -> Table:
    """Gram matrix and cross moment, by each path there is and as torch does it."""
    if run.dry:
        shapes = [Shape(d, m, 100, dtype) for dtype in BYTES for d, m in ((48, 48), (64, 24))]
    else:
        sizes = [(768, 768), (1024, 1024), (3072, 3072), (4096, 4096), (14336, 4096)]
        shapes = [Shape(d, m, n * 1024, dtype) for dtype in BYTES for d, m in sizes for n in (2, 16, 64)]
    rows = [_moments_row(shape, run) for shape in shapes]
    ratios = [row["other/taken"] for row in rows if row["other/taken"] is not None]
    slower = sum(ratio < 0.97 for ratio in ratios)
    notes = [
        "ms: path taken, Triton, cuBLAS block triangle; x.T @ x and y.T @ x by torch in the same type, in float32.",
        f"TFLOP/s: of the triangle and the rectangle alone; peak: share of the measured {run.peak:.0f} TFLOP/s.",
        "perfect: times faster than both full products at that peak. fp32 features take 3 tensor core products each.",
        "errors: relative Frobenius, against float64 on the device; the Gram matrix's of its upper triangle.",
        "other/taken: the other path's time by that of the one that the dispatch takes, where there are two.",
        f"slower path taken, by more than 3%: {slower} of {len(ratios)} shapes.",
    ]
    return Table("Gram matrix [d, d] and cross moment [m, d] of n tokens", rows, notes)


def _moments_row(shape: Shape, run: Run) -> dict[str, Any]:
    x, y = shape.features(run.device)
    s, h = torch.zeros(shape.d, shape.d, device=run.device), torch.zeros(shape.m, shape.d, device=run.device)
    x32, y32 = x.float(), y.float()
    variants: dict[str, Callable[[], object]] = {
        "taken": lambda: gram_cross_(s, h, x, y),
        "torch": lambda: (x.mT @ x, y.mT @ x),
        "fp32": lambda: (x32.mT @ x32, y32.mT @ x32),
    }
    paths = [] if run.dry else _paths(shape.dtype, run.device)
    for path in paths:
        variants[path] = _by_path(path, s, h, x, y)
    ms = measure(variants, run)
    chosen = _chosen(s, h, x) if len(paths) > 1 else None
    tflops = shape.needed / ms["taken"] * 1e-9
    perfect = 2 * shape.n * shape.d * (shape.d + shape.m) * shape.products / run.peak * 1e-9 if run.peak else None
    row = {
        "in": str(shape.dtype).removeprefix("torch."),
        "d": shape.d,
        "m": shape.m,
        "n": shape.n,
        **{name: ms.get(name) for name in ("taken", "triton", "blas", "torch", "fp32")},
        "TFLOP/s": tflops,
        "peak": tflops / run.peak,
        "torch/taken": ms["torch"] / ms["taken"],
        "fp32/taken": ms["fp32"] / ms["taken"],
        "perfect": perfect and perfect / ms["taken"],
        "other/taken": chosen and min(ms[path] for path in paths if path != chosen) / ms[chosen],
        **dict.fromkeys(("gram error", "cross error")),
    }
    if shape.n * shape.d * (shape.d + shape.m) <= 2**40:  # float64 is slow on many GPUs
        s.zero_(), h.zero_()
        gram_cross_(s, h, x, y)
        right = x.double()
        for name, found, left in (("gram error", s.triu(), right), ("cross error", h, y.double())):
            exact = left.mT @ right
            exact = exact.triu() if found is not h else exact
            row[name] = float((found - exact).norm() / exact.norm())
    return row


def _paths(dtype: torch.dtype, device: torch.device) -> list[str]:
    """cuBLAS takes no operands that are split."""
    from featcal_kernels import blas

    return ["triton", "blas"] if dtype != torch.float32 and blas.available(device) else ["triton"]


def _chosen(s: Tensor, h: Tensor, x: Tensor) -> str:
    """The path that the dispatch takes."""
    from featcal_kernels import launch
    from featcal_kernels.configs import arch_of

    arch = arch_of(x.device)
    assert arch is not None
    return launch._path(s, h, x, arch)


def _by_path(path: str, s: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Callable[[], object]:
    from featcal_kernels import launch

    return lambda: launch.moments_(s, h, x, y, path=path)


def _fold_rows(d: int, m: int, run: Run) -> list[dict[str, Any]]:
    s, a, out = (torch.randn(size, d, device=run.device) for size in (d, d, m))
    weight, scale = torch.randn(m, d, device=run.device), torch.full((), 1e-3, device=run.device)
    weight16 = weight.bfloat16()
    gflop, megabyte = 2 * m * d * d * 1e-9, d * d * 4 * 1e-6
    ops: dict[str, tuple[Callable[[], object], Callable[[], object], float, str]] = {
        "addmm_ fp32": (
            lambda: addmm_(out, weight, s, scale),
            lambda: out.addcmul_(weight @ s, scale),
            gflop,
            "TFLOP/s",
        ),
        "addmm_ bf16": (
            lambda: addmm_(out, weight16, s, scale),
            lambda: out.addcmul_(weight16.float() @ s, scale),
            gflop,
            "TFLOP/s",
        ),
        "add_scaled_": (lambda: add_scaled_(a, s, scale), lambda: a.add_(s * scale), 3 * megabyte, "GB/s"),
        "frobenius": (lambda: frobenius(s), lambda: torch.linalg.norm(s), megabyte / 2, "GB/s"),
        "symmetrize_": (lambda: symmetrize_(s), lambda: s.triu() + s.triu(1).mT, megabyte, "GB/s"),
    }
    rows = []
    for name, (ours, plain, work, unit) in ops.items():
        ms = measure({"ours": ours, "torch": plain}, run, 0.2)
        times = {"ms": ms["ours"], "torch": ms["torch"], "torch/ours": ms["torch"] / ms["ours"]}
        rows.append({"op": name, "d": d, "m": m, **times, "rate": work / ms["ours"], "unit": unit})
    return rows


def fold(run: Run) -> Table:
    """What folds a task's moments into a layer's system: the ops on finished sums."""
    sizes = ((48, 32),) if run.dry else ((4096, 6144), (4096, 28672), (14336, 4096))
    rows = [row for d, m in sizes for row in _fold_rows(d, m, run)]
    notes = ["rate: FLOPs of the plain product (addmm_ takes 3 or 2 tensor core products), or bytes that must move."]
    return Table("Folding a task: sums [d, d], weights [m, d]", rows, notes)


def solve(run: Run) -> Table:
    """Ridge systems of equal size, by Cholesky in place, and by LU as the reference implementations solve them."""
    sizes = ((32, 48, 2),) if run.dry else ((768, 768, 3), (1024, 1024, 3), (4096, 4096, 3), (14336, 4096, 1))
    notes = [
        "ms, with a copy of each side: all factored in one call, in one call each; both triangular solves; LU of all.",
        "extra MiB: the most that factoring one by one and solving allocates.",
    ]
    return Table("Systems [d, d] with m right-hand sides", [_solve_row(*size, run) for size in sizes], notes)


def _solve_row(d: int, m: int, count: int, run: Run) -> dict[str, Any]:
    x = torch.randn(2 * d, d, device=run.device)
    systems = (x.mT @ x / len(x) + 0.1 * torch.eye(d, device=run.device)).expand(count, d, d).contiguous()
    rights = torch.randn(count, m, d, device=run.device)
    a, r, factors = torch.empty_like(systems), torch.empty_like(rights), systems.clone()
    for factor in factors:
        factor_(factor)

    def one_by_one() -> None:
        for each in a.copy_(systems):
            factor_(each)

    def solved() -> None:
        r.copy_(rights)
        for factor, right in zip(factors, r, strict=True):
            solve_(factor, right.mT)

    variants: dict[str, Callable[[], object]] = {
        "one call": lambda: factor_(a.copy_(systems)),
        "one by one": one_by_one,
        "solves": solved,
        "LU": lambda: torch.linalg.solve(systems, rights.mT),
    }
    ms = measure(variants, run, 0.3)
    extra = None
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_by_one(), solved()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    ours = min(ms["one call"], ms["one by one"]) + ms["solves"]
    return {"systems": count, "d": d, "m": m, **ms, "LU/ours": ms["LU"] / ours, "extra MiB": extra}


def llama_layer(run: Run) -> Table:
    """A whole Llama-3.1-8B-shaped layer, five tasks of 32k tokens: the engine, and two reference schedules.

    Of the official demo's, once as it is published, with a float32 forward, and once with a bfloat16 one.
    """
    work = layer.Workload(run.device, run.dry)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        need = layer.flops(work, layer.engine(work, layer.Clock(run.device)))
    memory = torch.cuda.max_memory_allocated() / 2**30 if run.device.type == "cuda" else None
    each_task = dict.fromkeys(("forward", "moments", "advance"), work.tasks)
    times = {
        "engine": layer.milliseconds(layer.engine, work, {}),
        "official, as published": layer.milliseconds(layer.official, work, each_task),
        "official, bfloat16 forward": layer.milliseconds(layer.official_bfloat16, work, each_task),
        "FusionEval, as published": layer.milliseconds(layer.fusioneval, work, each_task),
    }
    phases = ("forward", "moments", "fold", "solve", "advance")
    ideal = {phase: need[phase] / run.peak * 1e-9 for phase in phases}
    rows = []
    for name, ms in {**times, "ideal": ideal}.items():
        total = sum(ms.values())
        row = {"way": name, **{phase: ms.get(phase) for phase in phases}, "ms": total}
        rows.append(
            {**row, "share of ideal": sum(ideal.values()) / total, "engine's": total / sum(times["engine"].values())}
        )
    notes = [
        f"{work.tasks} tasks of {work.tokens} tokens; ideal: FLOPs needed at the measured {run.peak:.0f} TFLOP/s.",
        "engine's: times slower than the engine. The baselines' fold is in their solve.",
        "as published: but for what bench/layer.py names, which makes the baselines faster.",
    ]
    if memory is not None:
        notes.append(f"peak device memory of the engine, hidden states of one task included: {memory:.2f} GiB")
    return Table("One Llama-3.1-8B-shaped layer, milliseconds", rows, notes)


SECTIONS: dict[str, Callable[[Run], Table]] = {
    "moments": moments,
    "fold": fold,
    "solve": solve,
    "llama_layer": llama_layer,
}


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    found: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "device": "cpu",
    }
    for package in ("triton", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory_gib": round(properties.total_memory / 2**30)}
        found["multiprocessors"] = properties.multi_processor_count
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            found["driver, power limit, clock"] = answer.splitlines()[0].strip()
        except (OSError, subprocess.SubprocessError, IndexError):
            found["driver, power limit, clock"] = None
    return found


def _write(out: Path, found: dict[str, Any], peak: float, name: str, table: Table) -> None:
    """Put a section into the file. Others that were measured there with the same versions stay."""
    sections: dict[str, Any] = {}
    if out.exists():
        before = json.loads(out.read_text())
        if {**before["environment"], "time": found["time"]} == found:
            sections = before["sections"]
    content = {"environment": found, "peak_tflops": peak, "sections": {**sections, name: asdict(table)}}
    out.parent.mkdir(parents=True, exist_ok=True)
    whole = out.with_suffix(".part")
    whole.write_text(json.dumps(content, indent=1) + "\n")
    whole.replace(out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated; default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/gpu-DEVICE.json")
    options = parser.parse_args(arguments)
    names = options.sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU; --dry-run goes through the motions on the CPU")

    torch.set_float32_matmul_precision("highest")
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    found = environment(device)
    run = Run(device, options.dry_run)
    run = Run(device, options.dry_run, measure_peak(run))
    out = options.out
    if out is None and not run.dry:
        out = RESULTS / f"gpu-{found['device'].replace(' ', '-').lower()}.json"
    print(", ".join(f"{name} {value}" for name, value in found.items() if value is not None))
    print(f"peak of a bfloat16 product: {run.peak:.3g} TFLOP/s" + (f"; results go to {out}" if out else ""), flush=True)
    for name in names:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        table = SECTIONS[name](run)
        if out is not None:
            _write(out, found, run.peak, name, table)
        print(f"\n{table}", flush=True)


if __name__ == "__main__":
    main()
