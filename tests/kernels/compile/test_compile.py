"""Every kernel in every configuration of the table, compiled for its GPU: no spills, and the right instructions."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from ahead import SHARED_LIMIT, Compiled, compile_kernel
from featcal_kernels.configs import ROW_PAD, TABLE, Arch, Tile
from featcal_kernels.launch import REDUCE_ROWS
from featcal_kernels.moments_triton import descriptor_kernel, pointer_kernel, reduce_kernel
from featcal_kernels.operands_triton import pack_kernel
from featcal_kernels.triangle_triton import frobenius_kernel, symmetrize_kernel

from bench.gpu.tiles import neighbours, other_way

ARCHS = tuple(SHARED_LIMIT)
MATRIX_INSTRUCTION = {
    "sm_80": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "sm_89": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
    "sm_90": r"wgmma\.mma_async\.sync\.aligned\.m64n(256|128)k16\.f32\.bf16\.bf16",
    "gfx942": r"v_mfma_f32_\w+_bf16",
}
PTX = {"bf16": "bf16", "fp16": "f16"}
WIDE_COPY = {
    "sm_80": r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 0x10",
    "sm_89": r"cp\.async\.cg\.shared\.global \[[^]]+\], \[[^]]+\], 0x10",
    "sm_90": r"cp\.async\.bulk\.tensor",
    "gfx942": r"(global|buffer)_load_dwordx4",
}
OUTPUTS = {"gram": "*fp32", "cross": "*fp32", "workspace": "*fp32", "table": "*i32", "m": "i32", "d": "i32"}
OUTPUTS["cross_ld"] = "i32"
SMALL = [arch for arch in ARCHS if TABLE[arch].small is not None]
NVIDIA = [arch for arch in ARCHS if arch.startswith("sm_")]  # whose matrix units cut their sums off
# The tile, and the parts of the left and the right operand.
KINDS = [
    *((arch, kind) for arch in ARCHS for kind in ("half", "split", "split, left in one part")),
    *((arch, "small") for arch in SMALL),
]


def moments(
    arch: str, dtype: str, kind: str, unaligned: tuple[str, ...] = (), tile: Tile | None = None, **constants
) -> Compiled:
    split = kind.startswith("split")
    tile = tile or getattr(TABLE[arch], kind.partition(",")[0])
    kernel = descriptor_kernel if TABLE[arch].descriptors and dtype != "fp32" else pointer_kernel
    arguments: dict[str, Any] = {**OUTPUTS, "n": "i32", "rows": "i32"}
    for name in ("x", "y", "b"):
        arguments |= {name: f"*{dtype}", f"{name}_low": "*i32", f"{name}_bound": "*fp32"}
        arguments |= {f"{name}_ld": "i32", f"{name}_n": "i32"}
    if not constants["PARTIAL"]:
        arguments["workspace"] = None
    arguments["scale"] = "*fp32" if split else None
    arguments |= {"SCALED": split, "A_LOW": kind == "split", "B_LOW": split, "TRIPLE": tile.triple}
    arguments |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "HALVES": tile.halves, "UPCAST": False}
    arguments["PROMOTE"] = tile.promote
    arguments |= constants
    options = {"num_warps": tile.warps, "num_stages": tile.stages, **dict(tile.options)}
    return compile_kernel(kernel, arch, arguments, unaligned=unaligned, **options)


def tiles(arch: Arch) -> list[Tile]:
    return [tile for tile in (arch.half, arch.split, arch.single, arch.small) if tile is not None]


def assert_fits(compiled: Compiled, arch: str) -> None:
    print(f"{compiled.registers} registers, {compiled.shared} bytes of shared memory")  # seen with pytest -rP
    assert compiled.spilled == 0, f"{compiled.registers} registers, {compiled.spilled} spilled"
    assert compiled.shared <= SHARED_LIMIT[arch]


@pytest.mark.parametrize(
    ("workspace", "unaligned"), [(False, ()), (True, ()), (True, ("d",))], ids=["add", "workspace", "odd"]
)
@pytest.mark.parametrize(("arch", "kind"), KINDS)
def test_16_bit_moments(arch: str, kind: str, workspace: bool, unaligned: tuple[str, ...]):
    dtype = "fp16" if kind.startswith("split") else "bf16"
    compiled = moments(arch, dtype, kind, unaligned, PARTIAL=workspace)
    assert_fits(compiled, arch)
    assert re.search(MATRIX_INSTRUCTION[arch].replace("bf16", PTX[dtype]), compiled.code)
    assert re.search(WIDE_COPY[arch], compiled.code)


@pytest.mark.parametrize("way", ["the table's", "the other"])
@pytest.mark.parametrize("arch", NVIDIA)
def test_sums_of_split_operands_leave_the_matrix_units(arch: str, way: str):
    """The compiler may make `acc + dot(a, b, 0)` one `dot(a, b, acc)`; then nothing is added up in float32."""
    tile = TABLE[arch].split
    tile = replace(tile, **other_way(tile)) if way == "the other" else tile
    for kind in ("split", "split, left in one part"):
        loop = steps(moments(arch, "fp16", kind, tile=tile, PARTIAL=False).ir)
        assert re.search(rf"arith\.addf .*tensor<{tile.m}x{tile.n}xf32", loop)
        loop = steps(moments(arch, "fp16", kind, tile=replace(tile, promote=0), PARTIAL=False).ir)
        assert not re.search(r"arith\.addf .*tensor<", loop), "left there to the end"


def steps(ir: str) -> str:
    """What a program does for every step of its tokens."""
    found = re.search(r"\n( +)[^\n]*scf\.for .*?\n\1}", ir, re.DOTALL)
    assert found
    return found[0]


def test_no_tile_leaves_split_sums_to_matrix_units_for_long():
    for arch in NVIDIA:
        for tile in neighbours(TABLE[arch], "split").values():
            assert 0 < tile.promote * tile.k <= 128


@pytest.mark.parametrize(
    ("workspace", "unaligned"), [(False, ()), (True, ()), (True, ("d",))], ids=["add", "workspace", "odd"]
)
@pytest.mark.parametrize("arch", ARCHS)
def test_float32_moments(arch: str, workspace: bool, unaligned: tuple[str, ...]):
    compiled = moments(arch, "fp32", "single", unaligned, PARTIAL=workspace)
    assert_fits(compiled, arch)
    assert not re.search("[tx]f32", compiled.code)
    assert re.search(r"fma\.rn\.f32|v_mfma_f32_\w+_?f32", compiled.code)


@pytest.mark.parametrize("arch", ARCHS)
def test_other_16_bit_type_and_single_column(arch: str):
    compiled = moments(arch, "fp16", "half", PARTIAL=True, d=1)  # Triton makes a constant of a 1
    assert_fits(compiled, arch)
    assert re.search(MATRIX_INSTRUCTION[arch].replace("bf16", PTX["fp16"]), compiled.code)


@pytest.mark.parametrize("unaligned", [(), ("d",)], ids=["aligned", "odd"])
@pytest.mark.parametrize("arch", ARCHS)
def test_reduce(arch: str, unaligned: tuple[str, ...]):
    for tile in tiles(TABLE[arch]):
        constants = {"splits": "i32", "BLOCK_M": tile.m, "BLOCK_N": tile.n, "ROWS": REDUCE_ROWS}
        compiled = compile_kernel(reduce_kernel, arch, OUTPUTS | constants, unaligned=unaligned)
        assert_fits(compiled, arch)


@pytest.mark.parametrize("strides", [("i32", 1), (1, "i32"), ("i32", "i32")], ids=["rows", "transposed", "any"])
@pytest.mark.parametrize(
    "types",
    [("fp32", "fp16"), ("bf16", "fp16"), ("fp16", "fp16"), ("fp64", "fp16"), ("bf16", "bf16"), ("fp32", "fp32")],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_pack(arch: str, types: tuple[str, str], strides: tuple):
    arguments = {
        "x": f"*{types[0]}", "weights": "*fp32", "bound": "*fp32", "out": f"*{types[1]}", "low": "*i32", "n": "i32",
        "d": "i32", "row_stride": strides[0], "column_stride": strides[1], "rows": "i32", "out_stride": "i32",
        "WEIGHTS": True, "SCALE": types[1] == "fp16", "SPLIT": types[1] == "fp16", "BLOCK": 64,
    }  # fmt: skip
    unaligned = ("d", "row_stride", "column_stride")
    assert_fits(compile_kernel(pack_kernel, arch, arguments, unaligned=unaligned, num_warps=8), arch)


@pytest.mark.parametrize("arch", ARCHS)
def test_triangle(arch: str):
    assert_fits(compile_kernel(frobenius_kernel, arch, {"s": "*fp32", "sums": "*fp64", "d": "i32", "BLOCK": 64}), arch)
    assert_fits(compile_kernel(symmetrize_kernel, arch, {"s": "*fp32", "d": "i32", "BLOCK": 64}), arch)


def test_tiles_divide_the_padding():
    for arch in TABLE.values():
        for tile in tiles(arch):
            assert ROW_PAD % tile.k == 0
            assert tile.m % REDUCE_ROWS == 0
