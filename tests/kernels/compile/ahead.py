"""Compiling a Triton kernel for a GPU that is not there, and reading what it needs off the result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.gpu import compiling

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
    ir: str  # of Triton, before it is lowered to instructions
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
    """What a kernel compiled by Triton needs, and its code."""
    return Compiled(result.asm.get("ptx") or result.asm["amdgcn"], result.asm["ttgir"], *compiling.needs(result))


class AbsentDevice(compiling.AbsentDevice):
    """A driver for a GPU that is not there: enough for Triton to compile what is launched on it."""

    def __init__(self, arch: str) -> None:
        super().__init__(TARGETS[arch], list(TARGETS).index(arch))
