"""Times the tile shapes and paths on the GPU at hand: `PYTHONPATH=.:kernels python -m bench.tune`.

Prints the times and, last, the row to put into `featcal_kernels.configs.TABLE`. Candidates that do not compile, do
not fit or spill registers are left out. `--dry-run` goes through the motions on the CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from math import exp, inf, log
from pathlib import Path
from typing import Any

import torch
from featcal_kernels import gram_cross_
from featcal_kernels.configs import TABLE, Arch, Tile, arch_of
from triton.runtime.jit import JITFunction

from bench.gpu import Run, Shape, Table, environment, measure, measure_peak

Times = dict[Tile, list[float]]

TILE_SIZES = ((128, 128), (128, 256), (256, 128), (64, 128), (64, 64))
GROUPS = (4, 8, 12, 16, 24)
TOLERANCE = 1.01  # a candidate replaces the table's only if it is faster by more


def half_tiles(arch: Arch) -> list[Tile]:
    """Candidates for 16-bit operands: the table's first."""
    shapes = product(TILE_SIZES, (32, 64, 128), (4, 8), (2, 3, 4, 5))
    options = arch.half.options
    tiles = [
        Tile(m, n, k, warps, stages, halves=m * n > 128 * 128, options=options)
        for (m, n), k, warps, stages in shapes
        if 2 * k * (m + n) * stages <= 228 * 1024 and m * n // (32 * warps) <= 128
    ]
    return [arch.half, *(tile for tile in tiles if tile != arch.half)]


def split_tiles(arch: Arch) -> list[Tile]:
    """Candidates for split operands, whose sums are promoted after as many tokens as the table's are."""
    tokens = arch.split.promote * arch.split.k
    tiles = [
        replace(tile, promote=max(1, tokens // tile.k) if tokens else 0, halves=tile.halves or arch.split.halves)
        for tile in half_tiles(arch)
    ]
    return [arch.split, *(tile for tile in dict.fromkeys(tiles) if tile != arch.split)]


def single_tiles(arch: Arch) -> list[Tile]:
    """Candidates for float32 operands multiplied as such."""
    shapes = product(((128, 128), (64, 128), (64, 64)), (16, 32), (4, 8), (2, 3))
    tiles = [Tile(m, n, k, warps, stages, options=arch.single.options) for (m, n), k, warps, stages in shapes]
    return [arch.single, *(tile for tile in tiles if tile != arch.single)]


def time_tiles(tiles: Sequence[Tile], kind: str, arch: Arch, shapes: Sequence[Shape], run: Run) -> Times:
    """Milliseconds of each tile on each shape; candidates that fail have none."""
    times: Times = {tile: [] for tile in tiles}
    for shape in shapes:
        s, h, x, y = _problem(shape, run)
        calls: dict[str, Callable[[], object]] = {}
        for i, tile in enumerate(tiles):
            call = _call(
                s, h, x, y, replace(arch, **{kind: tile}), "triton", run, "ieee" if kind == "single" else "fp16x3"
            )
            if _works(call):
                calls[str(i)] = call
        measured = measure(calls, run, 0.02 * len(calls))
        for i, tile in enumerate(tiles):
            times[tile].append(measured.get(str(i), inf))
    return {tile: values for tile, values in times.items() if max(values) < inf}


def best(times: Times) -> Tile:
    """The tile whose times are smallest on (geometric) average; the first one if none is clearly better."""
    mean = {tile: exp(sum(map(log, values)) / len(values)) for tile, values in times.items()}
    first = next(iter(mean))
    fastest = min(mean, key=lambda tile: mean[tile])
    return fastest if mean[fastest] * TOLERANCE < mean[first] else first


def time_paths(arch: Arch, shapes: Sequence[Shape], run: Run) -> list[dict[str, Any]]:
    """Triton against the cuBLAS block triangle, shape by shape."""
    rows = []
    for shape in shapes:
        s, h, x, y = _problem(shape, run)
        ms = measure({path: _call(s, h, x, y, arch, path, run) for path in ("triton", "blas")}, run, 0.2)
        flops = shape.n * shape.d * (shape.d + 2 * shape.m)
        rows.append({"d": shape.d, "m": shape.m, "n": shape.n, "GFLOP": flops * 1e-9, **ms})
    return rows


def crossovers(rows: Sequence[dict[str, Any]]) -> tuple[float, int | None]:
    """`blas_flops` and `blas_columns`: the thresholds that lose the least time, relative to the faster path."""

    def loss(flops: float, columns: float) -> float:
        def taken(row: dict[str, Any]) -> str:
            return "blas" if row["GFLOP"] * 1e9 < flops or row["d"] >= columns else "triton"

        return sum(row[taken(row)] / min(row["triton"], row["blas"]) for row in rows)

    flops = [0.0, *sorted(row["GFLOP"] * 1.01e9 for row in rows)]
    columns = [inf, *sorted({row["d"] for row in rows}, reverse=True)]
    least = min(product(flops, columns), key=lambda pair: (round(loss(*pair), 3), pair[0], -pair[1]))
    return least[0], None if least[1] == inf else int(least[1])


def _problem(shape: Shape, run: Run) -> tuple[torch.Tensor, ...]:
    s = torch.zeros(shape.d, shape.d, device=run.device)
    h = torch.zeros(shape.m, shape.d, device=run.device)
    return s, h, *shape.features(run.device)


def _call(s, h, x, y, arch: Arch, path: str, run: Run, precision: str = "fp16x3") -> Callable[[], object]:
    if run.dry:
        return lambda: gram_cross_(s, h, x, y)
    from featcal_kernels import launch

    return lambda: launch.moments_(s, h, x, y, arch=arch, path=path, precision=precision)


def _works(call: Callable[[], object]) -> bool:
    """Whether a candidate compiles, fits, runs, and spills no registers."""
    launched: list[Any] = []
    run = JITFunction.run

    def noted(kernel: JITFunction, *args: Any, **options: Any) -> Any:
        launched.append(run(kernel, *args, **options))
        return launched[-1]

    JITFunction.run = noted
    try:
        call()
    except Exception as error:  # the compiler has many ways to refuse a tile
        print(f"  left out: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}")
        return False
    finally:
        JITFunction.run = run
    if any(getattr(kernel, "n_spills", None) for kernel in launched):
        print("  left out: spills")
        return False
    return True


def _table(title: str, times: Times, shapes: Sequence[Shape]) -> Table:
    rows = []
    for tile, values in sorted(times.items(), key=lambda item: sum(item[1])):
        name = f"{tile.m}x{tile.n}x{tile.k}"
        row = {"tile": name, "warps": tile.warps, "stages": tile.stages, "group": tile.group}
        row |= {f"d={shape.d}": value for shape, value in zip(shapes, values, strict=True)}
        rows.append(row)
    return Table(title, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at toy sizes")
    parser.add_argument("--out", type=Path, help="JSON file for all times")
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no GPU; --dry-run goes through the motions on the CPU")
    device = torch.device("cpu") if options.dry_run else torch.device("cuda", torch.cuda.current_device())
    run = Run(device, options.dry_run)
    arch = TABLE["sm_90"] if run.dry else arch_of(device)
    if arch is None:
        parser.error(f"the kernels do not support {torch.cuda.get_device_name(device)}")

    if run.dry:
        half_shapes = split_shapes = single_shapes = path_shapes = [Shape(48, 32, 100, torch.bfloat16)]
    else:
        half_shapes = [Shape(d, m, 16384, torch.bfloat16) for d, m in ((1024, 1024), (4096, 4096), (14336, 4096))]
        split_shapes = [Shape(d, d, 16384, torch.float32) for d in (1024, 4096)]
        single_shapes = [Shape(2048, 2048, 4096, torch.float32)]
        path_shapes = [
            Shape(d, min(d, 4096), n * 1024, torch.bfloat16)
            for d in (512, 768, 1024, 2048, 3072, 4096, 8192, 14336)
            for n in (2, 16, 64)
        ]
    limit = 3 if run.dry else None
    peak = measure_peak(run)

    tile_times = time_tiles(half_tiles(arch)[:limit], "half", arch, half_shapes, run)
    half = best(tile_times)
    bands = [replace(half, group=group) for group in dict.fromkeys((half.group, *GROUPS))]
    band_times = time_tiles(bands, "half", arch, half_shapes, run)
    split_times = time_tiles(split_tiles(arch)[:limit], "split", arch, split_shapes, run)
    single_times = time_tiles(single_tiles(arch)[:limit], "single", arch, single_shapes, run)
    arch = replace(arch, half=best(band_times), split=best(split_times), single=best(single_times))
    paths = time_paths(arch, path_shapes, run) if run.dry or _blas(device) else []
    if paths:
        blas_flops, blas_columns = crossovers(paths)
        arch = replace(arch, blas_flops=round(blas_flops, -8), blas_columns=blas_columns)

    tables = [
        _table("16-bit tiles, ms", tile_times, half_shapes),
        _table("16-bit bands, ms", band_times, half_shapes),
        _table("split tiles, ms", split_times, split_shapes),
        _table("float32 tiles, ms", single_times, single_shapes),
    ]
    if paths:
        tables.append(Table("paths, ms", paths))
    found = environment(device)
    for table in tables:
        print(f"\n{table}")
    if options.out:
        content = {"environment": found, "arch": asdict(arch), "tables": [asdict(table) for table in tables]}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n# {found['device']}, torch {found['torch']}, triton {found['triton']}; peak {peak:.0f} TFLOP/s\n{arch}")


def _blas(device: torch.device) -> bool:
    from featcal_kernels import blas

    return blas.available(device)


if __name__ == "__main__":
    main()
