"""Tile shapes and paths per GPU architecture.

Fixed, so that a run never tunes and its bits never depend on timing. `python -m bench.gpu --sections
tiles,moments` times candidates on the device at hand and prints the row to put here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

ROW_PAD = 128  # rows of copied operands: a multiple of any tile's tokens
WORKSPACE_BYTES = 192 * 2**20  # of partial tiles, at most: `schedule.MAX_WAVES` of the largest on 148 multiprocessors
PANEL_BYTES = 512 * 2**20  # of operands that are copied to be multiplied, at a time


@dataclass(frozen=True)
class Tile:
    """What one program computes: `m` x `n` outputs, `k` tokens a step.

    Attributes:
        halves: write the tile back in two halves, which takes fewer registers.
        group: tile rows of a band of the schedule.
        promote: steps after which what a matrix unit summed up is added to a sum in float32; 0 for at the end.
        triple: multiply all parts of split operands in one step, instead of running over the tokens again for each.
        step: what one product of a step takes, in steps of the architecture's `half` tile.
        options: compile options of the backend.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    halves: bool = False
    group: int = 8
    promote: int = 0
    triple: bool = False
    step: float = 1.0
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Arch:
    """How one GPU architecture runs the ops.

    Attributes:
        half: tile for 16-bit operands.
        split: tile for float32 operands that are split in two float16 ones, and for weighted 16-bit ones.
        single: tile for float32 operands that are multiplied as such.
        small: tile for 16-bit operands of sums that too few tiles of `half` would cover; None for none.
        descriptors: 16-bit operands take the descriptor kernel.
        blas_rectangles: `cross_` of 16-bit features takes cuBLAS, which has no triangle to miss there.
        blas_flops: work on 16-bit features below which cuBLAS wins, its launches being shorter.
        blas_columns: columns of 16-bit features from which cuBLAS wins; None for never.
        blas_grams: columns up to which cuBLAS takes a Gram matrix alone: a tenth or more of a triangle of tiles lies
            below so short a diagonal.
    """

    half: Tile
    split: Tile
    single: Tile
    small: Tile | None = None
    descriptors: bool = False
    blas_rectangles: bool = True
    blas_flops: float = 0
    blas_columns: int | None = None
    blas_grams: int = 0


AMD = (("matrix_instr_nonkdim", 16), ("kpack", 2))

# Every row is compiled by the tests: no spills on triton 3.6, 3.7 and 3.9. "Not timed" rows are the largest tile that
# compiles so, and take cuBLAS for less than about 30 us of work, the time that the launches of a Triton kernel take.
# Split operands are promoted every 64 tokens.
TABLE = {
    # Not timed. 184 registers, split 232; 64 KiB of shared memory.
    "sm_80": Arch(
        half=Tile(128, 128, 64, 8, 3),
        split=Tile(128, 128, 64, 8, 3, promote=1),
        single=Tile(128, 128, 16, 8, 3),
        blas_flops=8e9,
    ),
    # Not timed. 178 registers, split 242; 48 KiB of the 99 KiB there are.
    "sm_89": Arch(
        half=Tile(128, 128, 32, 8, 4),
        split=Tile(128, 128, 32, 8, 4, promote=2),
        single=Tile(128, 128, 16, 8, 3),
        blas_flops=4e9,
    ),
    # Timed on an H200. 211 registers, 192 KiB; 255 and spills without `halves`. Split 148, 192 KiB; small 186, 128 KiB.
    # half: 1.31 ms at 4,096 columns, 8.25 at 14,336; no other tile is faster by more than noise. split: 5.16 ms; in
    # runs 5.35, at 1,024 columns and fewer up to a quarter less, but without promotion: the compiler had taken it out.
    # small: a step takes 0.57 of one of `half`, but 0.55 chooses better (2,048 columns, 65,536 tokens: 1.34 ms for
    # 1.54). blas_flops: up to 1,024 columns and 5.2e10 FLOP cuBLAS takes 0.3 to 1.1 of Triton's time; beyond, with
    # 16,384 tokens and 3,072 columns or more, the two are within a tenth of each other. blas_grams: at 1,024 columns
    # cuBLAS takes 0.85 of it, at 2,048 1.4. In all of these 0.1 to 0.3 ms of the host's are counted.
    "sm_90": Arch(
        half=Tile(128, 256, 64, 8, 4, halves=True),
        split=Tile(128, 128, 64, 8, 3, halves=True, promote=1, triple=True, step=0.55),
        single=Tile(128, 128, 16, 8, 3),
        small=Tile(128, 128, 64, 8, 4, step=0.55),
        descriptors=True,
        blas_flops=5.2e10,
        blas_grams=1024,
    ),
    # Not timed. 124 registers, 32 KiB; hipBLASLt through torch has no 16-bit product with float32 output.
    "gfx942": Arch(
        half=Tile(128, 128, 64, 8, 2, options=AMD),
        split=Tile(128, 128, 64, 8, 2, options=AMD),  # whose matrix units add up in float32
        single=Tile(128, 128, 16, 8, 2, options=AMD[:1]),
        blas_rectangles=False,
    ),
}


@cache
def arch_of(device: torch.device) -> Arch | None:
    """The row of a CUDA or ROCm device; None if the kernels do not support it."""
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return TABLE["gfx942"] if name.startswith("gfx9") else None
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return TABLE["sm_80" if minor == 0 else "sm_89"]
    # sm_100 has the shared memory and the bulk copies of sm_90; sm_120 the shared memory of sm_89.
    return {9: TABLE["sm_90"], 10: TABLE["sm_90"], 12: TABLE["sm_89"]}.get(major)
