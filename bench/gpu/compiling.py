"""Tiles compiled for the GPU by processes that do not touch it, while something else runs there.

Triton keeps what it compiles in a folder, named by source, types, constants, options and target, none of which tell
whether there is a device: each process here launches an op as the host does, on operands that are never read, with
a driver that only names the target. Who launches it on the device later finds it compiled. `python -m
bench.gpu.compiling JOB` is one such process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from featcal_kernels.configs import TABLE, Arch, Tile

from bench.harness import process

TIMEOUT = 180.0  # seconds a tile


@dataclass(frozen=True)
class Target:
    """What is compiled for: Triton's target, its row of the table, multiprocessors, bytes of shared memory."""

    backend: str
    arch: int | str
    warp_size: int
    row: str
    slots: int
    shared: int

    @classmethod
    def here(cls, device: torch.device, arch: Arch) -> Target:
        from triton.runtime import driver

        found, properties = driver.active.get_current_target(), torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 2**30)  # older ones do not say
        row = next(name for name, each in TABLE.items() if each == arch)
        slots = properties.multi_processor_count
        return cls(found.backend, found.arch, found.warp_size, row, slots, shared)


class Compiling:
    """Candidates on their way; each is usable, or says why not.

    Attributes:
        candidates: by kind (a field of `Arch`), then by name.

    Args:
        shapes: columns d and m and rows n of each kind's operands.
    """

    def __init__(
        self, target: Target, shapes: dict[str, list[tuple[int, int, int]]], candidates: dict[str, dict[str, Tile]]
    ) -> None:
        self.candidates = candidates
        self._pool = ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2))
        self._futures: dict[tuple[str, str], Future[dict[str, str]]] = {}
        for kind, tiles in candidates.items():
            for name, tile in tiles.items():
                job = {"target": asdict(target), "kind": kind, "tile": asdict(tile)}
                job["shapes"] = shapes[kind]
                command = [sys.executable, "-m", "bench.gpu.compiling", json.dumps(job)]
                self._futures[kind, name] = self._pool.submit(process.last_json, command, TIMEOUT)

    def usable(self, kind: str, timeout: float) -> tuple[dict[str, Tile], dict[str, str]]:
        """Tiles that compiled within `timeout` and need no more than there is, and why the others are not used."""
        wait([future for (each, _), future in self._futures.items() if each == kind], min(timeout, 2 * TIMEOUT))
        usable, refused = {}, {}
        for name, tile in self.candidates[kind].items():
            future = self._futures[kind, name]
            if not future.done():
                refused[name] = "not compiled in time"
            elif future.exception() is not None:
                refused[name] = f"does not compile: {future.exception()}"
            elif why := future.result()["refused"]:
                refused[name] = why
            else:
                usable[name] = tile
        return usable, refused

    def close(self) -> None:
        """Compile no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        process.end_all()


@dataclass(frozen=True)
class AbsentDevice:
    """A driver that only names its target: enough to compile what is launched."""

    target: Any
    number: int = 0

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_tile(job: dict[str, Any]) -> dict[str, str]:
    """Compile what an op on each shape launches with this tile; says what stands against using it."""
    from featcal_kernels import launch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = Target(**job["target"])
    options = tuple(tuple(option) for option in job["tile"].pop("options"))
    arch = with_tile(TABLE[target.row], job["kind"], Tile(**job["tile"], options=options))
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))

    driver._active = AbsentDevice(GPUTarget(target.backend, target.arch, target.warp_size))
    launch._slots = lambda device: target.slots
    JITFunction.run = compile_only
    dtype = torch.float32 if job["kind"] == "split" else torch.bfloat16
    for d, m, n in job["shapes"]:
        x, y = torch.empty(n, d, dtype=dtype), torch.empty(n, m, dtype=dtype)
        launch.moments_(torch.empty(d, d), torch.empty(m, d), x, y, arch=arch, path="triton")
    _, spilled, shared = (max(each) for each in zip(*map(needs, compiled), strict=True))
    refused = f"spills {spilled}" if spilled else f"takes {shared} bytes of shared memory of {target.shared}"
    return {"refused": refused if spilled or shared > target.shared else ""}


def with_tile(arch: Arch, kind: str, tile: Tile) -> Arch:
    """The row with another tile of a kind, which is then the one that is taken."""
    return replace(arch, split=tile) if kind == "split" else replace(arch, half=tile, small=None)


def needs(compiled: Any) -> tuple[int, int, int]:
    """Of a compiled kernel: registers, bytes of stack a thread or registers spilled, bytes of shared memory."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        spilled = _number(r"\.vgpr_spill_count: +(\d+)", code) + _number(r"\.private_segment_fixed_size: (\d+)", code)
        return _number(r"\.vgpr_count: +(\d+)", code), spilled, shared
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), shared


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the compiler's output"
    return int(found[1])


if __name__ == "__main__":
    print(json.dumps(compile_tile(json.loads(sys.argv[1]))))
