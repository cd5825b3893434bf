"""Compiling a Triton kernel for a GPU that is not there, and reading what it needs off the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_89": 101_376, "sm_90": 232_448, "gfx942": 65_536}


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel needs of its GPU."""

    code: str  # PTX or AMD assembly
    registers: int
    spilled: int  # bytes of stack a thread, or registers spilled
    shared: int  # bytes


def compile_kernel(
    kernel: Any, arch: str, arguments: dict[str, Any], *, unaligned: tuple[str, ...] = (), **options: int
) -> Compiled:
    """Compiles `kernel` for `arch`.

    Args:
        arguments: for each parameter its type ("*bf16", "i32") or, if it is a compile-time constant, its value.
        unaligned: parameters that are not known to be multiples of 16.
        options: warps, stages and what else the backend takes.
    """
    names = kernel.arg_names
    assert set(arguments) == set(names), set(arguments) ^ set(names)
    plain = {parameter.name for parameter in kernel.params if parameter.do_not_specialize} | set(unaligned)
    types = {name: value for name, value in arguments.items() if isinstance(value, str)}
    source = ASTSource(
        kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in arguments.items() if name not in types},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in types if name not in plain},
    )
    return needs(triton.compile(source, target=TARGETS[arch], options=options))


def needs(result: Any) -> Compiled:
    """Reads what a kernel compiled by Triton needs."""
    if "amdgcn" in result.asm:
        code = result.asm["amdgcn"]
        spilled = _number(r"\.vgpr_spill_count: +(\d+)", code) + _number(r"\.private_segment_fixed_size: (\d+)", code)
        return Compiled(code, _number(r"\.vgpr_count: +(\d+)", code), spilled, result.metadata.shared)
    usage = _resource_usage(result.asm["cubin"])
    return Compiled(
        result.asm["ptx"], _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage), result.metadata.shared
    )


class AbsentDevice:
    """A driver for a GPU that is not there: enough for Triton to compile what is launched on it."""

    def __init__(self, arch: str) -> None:
        self.target = TARGETS[arch]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def _resource_usage(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the compiler's output"
    return int(found.group(1))
