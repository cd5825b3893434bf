"""The kernels that add `x' b` (upper triangle) to `gram` and `y' b` to `cross`, in one launch.

Two bodies, one schedule. `pointer_kernel` loads the left operand as a transposed tile of pointers, which keeps its
copies asynchronous and 16 bytes wide on sm_80, sm_89 and gfx942; `descriptor_kernel` uses the bulk tensor copies of
sm_90. A program looks its tile up in `table` (see `schedule`), takes its left operand accordingly, and adds the
product to its tile of the sum by a plain load, add and store: a tile has one writer, so the bits never depend on
timing. With `PARTIAL` the tokens are split over `num_programs(1)` programs (split-K), each writes a partial tile to
a place of its own in `workspace`, and `reduce_kernel` adds them in order.

With `SCALED` the operands are float16 parts of values times a power of two (see `operands_triton`), which is taken
off the sum; with `A_LOW` and `B_LOW` there are low parts, `rows` rows below the high ones. With `TRIPLE` a step loads
them all and multiplies low * high, high * low, high * high: least loads, most shared memory. Without it a program runs
over its tokens up to three times, and leaves a run out where a side's `low` flag says that its low parts are zero.

NVIDIA's matrix units cut their sums off at 24 or 25 bits instead of rounding them, which over thousands of tokens is
more than what splitting keeps. With `PROMOTE` a sum is taken from them after so many steps, and added up in float32.

Operands are aligned and their columns padded to a multiple of 16. A sum with unaligned rows is written by way of
the workspace too: adding a whole tile element by element would spill registers.
"""

import triton
import triton.language as tl

from featcal_kernels.operands_triton import power_of_two


@triton.jit
def _tile(table):
    code = tl.load(table + tl.program_id(0))
    return (code >> 30) != 0, (code >> 15) & 0x7FFF, code & 0x7FFF


@triton.jit
def _step_range(
    n, x_low, y_low, b_low, is_cross,
    BLOCK_K: tl.constexpr, A_LOW: tl.constexpr, B_LOW: tl.constexpr, TRIPLE: tl.constexpr, PARTIAL: tl.constexpr,
):  # fmt: skip
    """Steps of one run over the tokens, the first and last of this program's over all runs, and the flag of `b`."""
    steps = tl.cdiv(n, BLOCK_K)
    total = steps
    b_has_low = 0
    if not TRIPLE:
        if B_LOW:
            b_has_low = tl.load(b_low)
            total += steps * b_has_low
        if A_LOW:
            total += steps * tl.load(tl.where(is_cross, y_low, x_low))
    first = 0
    last = total
    if PARTIAL:
        first = total * tl.program_id(1) // tl.num_programs(1)
        last = total * (tl.program_id(1) + 1) // tl.num_programs(1)
    return steps, first, last, b_has_low


@triton.jit
def _step(t, steps, rows, b_has_low, BLOCK_K: tl.constexpr, RUNS: tl.constexpr):
    """The first token of step `t`, and the rows at which the left and the right operand hold it."""
    k = t * BLOCK_K
    a_row = k
    b_row = k
    if RUNS:
        run = t // steps
        k = (t - run * steps) * BLOCK_K
        a_row = k + tl.where(run > b_has_low, rows, 0)
        b_row = k + tl.where((run == 1) & (b_has_low == 1), rows, 0)
    return k, a_row, b_row


@triton.jit
def _add_to_output(acc, out, row, col, out_rows, d, ld, is_cross):
    """`out[row, col] += acc`; of a square sum the entries below the diagonal keep their bits."""
    where = out + row[:, None].to(tl.int64) * ld + col[None, :]
    inside = (row < out_rows)[:, None] & (col < d)[None, :]
    old = tl.load(where, mask=inside, other=0.0)
    wanted = col[None, :] >= tl.where(is_cross, 0, row)[:, None]
    tl.store(where, tl.where(wanted, old + acc, old), mask=inside)


@triton.jit
def _store(
    acc, out, workspace, i, j, shift, out_rows, d, ld, is_cross,
    PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, BLOCK_M)
    c = shift + tl.arange(0, WIDTH)
    if PARTIAL:
        part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        workspace += part.to(tl.int64) * (BLOCK_M * BLOCK_N)
        tl.store(workspace + r[:, None] * BLOCK_N + c[None, :], acc)
    else:
        _add_to_output(acc, out, i * BLOCK_M + r, j * BLOCK_N + c, out_rows, d, ld, is_cross)


@triton.jit
def _epilogue(
    acc, out, workspace, i, j, out_rows, d, ld, is_cross,
    PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    if HALVES:  # a large tile, half after half: fewer live registers
        HALF: tl.constexpr = BLOCK_N // 2
        pair = tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
        left, right = tl.split(pair)
        _store(left, out, workspace, i, j, 0, out_rows, d, ld, is_cross, PARTIAL, BLOCK_M, BLOCK_N, HALF)
        _store(right, out, workspace, i, j, HALF, out_rows, d, ld, is_cross, PARTIAL, BLOCK_M, BLOCK_N, HALF)
    else:
        _store(acc, out, workspace, i, j, 0, out_rows, d, ld, is_cross, PARTIAL, BLOCK_M, BLOCK_N, BLOCK_N)


@triton.jit
def _scaled(acc, a_bound, b_bound, scale, SCALED: tl.constexpr):
    """Times `scale`, if there is one, without the powers of two of the operands."""
    if SCALED:
        acc *= 1.0 / (power_of_two(tl.load(a_bound)) * power_of_two(tl.load(b_bound)))
    if scale is not None:
        acc *= tl.load(scale)
    return acc


@triton.jit
def _dot(a, b, acc, PROMOTE: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter cannot multiply bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    # Where a sum is taken from the matrix unit after one product, Triton would make `acc + dot(a, b, 0)` one
    # `dot(a, b, acc)` again, which leaves it there. It does not where a dot bounds its inexact sums: a bound that is
    # made for 8 bits, and for 16 changes nothing else.
    INEXACT: tl.constexpr = 2**30 if PROMOTE else None
    return tl.dot(a, b, acc, input_precision="ieee", max_num_imprecise_acc=INEXACT)


@triton.jit
def _promoted(acc, part, step, PROMOTE: tl.constexpr):
    """The sum, and the part of it that is still in the matrix unit's hands, after a step."""
    if PROMOTE:  # noqa: SIM102 (a constant first: 0 must not divide)
        if step % PROMOTE == PROMOTE - 1:
            acc += part
            part = tl.zeros_like(part)
    return acc, part


@triton.jit(do_not_specialize=["x_n", "y_n", "b_n", "n", "rows", "m"])
def pointer_kernel(
    gram, cross, workspace, table,
    x, x_low, x_bound, x_ld, x_n, y, y_low, y_bound, y_ld, y_n, b, b_low, b_bound, b_ld, b_n,
    scale, n, rows, m, d, cross_ld,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr, PROMOTE: tl.constexpr, SCALED: tl.constexpr, A_LOW: tl.constexpr, B_LOW: tl.constexpr,
    TRIPLE: tl.constexpr, PARTIAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    is_cross, i, j = _tile(table)
    steps, first, last, b_has_low = _step_range(
        n, x_low, y_low, b_low, is_cross, BLOCK_K, A_LOW, B_LOW, TRIPLE, PARTIAL
    )
    RUNS: tl.constexpr = (A_LOW or B_LOW) and not TRIPLE
    a = tl.where(is_cross, y, x)
    a_ld = tl.where(is_cross, y_ld, x_ld)
    out_rows = tl.where(is_cross, m, d)

    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_K)
    a_offset = token[None, :] * a_ld + row[:, None]
    b_offset = token[:, None] * b_ld + col[None, :]
    a_inside = (row < tl.cdiv(out_rows, 16) * 16)[:, None]
    b_inside = (col < tl.cdiv(d, 16) * 16)[None, :]
    a_ld = a_ld.to(tl.int64)
    b_ld = b_ld.to(tl.int64)

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part = acc
    for t in tl.range(first, last):
        k, a_row, b_row = _step(t, steps, rows, b_has_low, BLOCK_K, RUNS)
        inside = k + token < n
        a_mask = inside[None, :] & a_inside
        b_mask = inside[:, None] & b_inside
        a_tile = tl.load(a + a_row * a_ld + a_offset, mask=a_mask, other=0.0)
        b_tile = tl.load(b + b_row * b_ld + b_offset, mask=b_mask, other=0.0)
        if TRIPLE and A_LOW:
            part = _dot(
                tl.load(a + (k + rows) * a_ld + a_offset, mask=a_mask, other=0.0), b_tile, part, PROMOTE, UPCAST
            )
        if TRIPLE and B_LOW:
            part = _dot(
                a_tile, tl.load(b + (k + rows) * b_ld + b_offset, mask=b_mask, other=0.0), part, PROMOTE, UPCAST
            )
        part = _dot(a_tile, b_tile, part, PROMOTE, UPCAST)
        acc, part = _promoted(acc, part, t - first, PROMOTE)
    acc = acc + part if PROMOTE else part
    acc = _scaled(acc, tl.where(is_cross, y_bound, x_bound), b_bound, scale, SCALED)
    out = tl.where(is_cross, cross, gram)
    ld = tl.where(is_cross, cross_ld, d)
    _epilogue(acc, out, workspace, i, j, out_rows, d, ld, is_cross, PARTIAL, BLOCK_M, BLOCK_N, HALVES)


@triton.jit(do_not_specialize=["x_n", "y_n", "b_n", "n", "rows", "m"])
def descriptor_kernel(
    gram, cross, workspace, table,
    x, x_low, x_bound, x_ld, x_n, y, y_low, y_bound, y_ld, y_n, b, b_low, b_bound, b_ld, b_n,
    scale, n, rows, m, d, cross_ld,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr, PROMOTE: tl.constexpr, SCALED: tl.constexpr, A_LOW: tl.constexpr, B_LOW: tl.constexpr,
    TRIPLE: tl.constexpr, PARTIAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    is_cross, i, j = _tile(table)
    steps, first, last, b_has_low = _step_range(
        n, x_low, y_low, b_low, is_cross, BLOCK_K, A_LOW, B_LOW, TRIPLE, PARTIAL
    )
    RUNS: tl.constexpr = (A_LOW or B_LOW) and not TRIPLE
    out_rows = tl.where(is_cross, m, d)
    a = tl.make_tensor_descriptor(
        tl.where(is_cross, y, x),
        shape=[tl.where(is_cross, y_n, x_n), tl.cdiv(out_rows, 16) * 16],
        strides=[tl.where(is_cross, y_ld, x_ld).to(tl.int64), 1],
        block_shape=[BLOCK_K, BLOCK_M],
    )
    right = tl.make_tensor_descriptor(
        b,
        shape=[b_n, tl.cdiv(d, 16) * 16],
        strides=[b_ld.to(tl.int64), 1],
        block_shape=[BLOCK_K, BLOCK_N],
    )

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    part = acc
    for t in tl.range(first, last):
        k, a_row, b_row = _step(t, steps, rows, b_has_low, BLOCK_K, RUNS)
        a_tile = a.load([a_row, i * BLOCK_M])
        b_tile = right.load([b_row, j * BLOCK_N])
        if TRIPLE and A_LOW:
            part = _dot(a.load([k + rows, i * BLOCK_M]).T, b_tile, part, PROMOTE, UPCAST)
        if TRIPLE and B_LOW:
            part = _dot(a_tile.T, right.load([k + rows, j * BLOCK_N]), part, PROMOTE, UPCAST)
        part = _dot(a_tile.T, b_tile, part, PROMOTE, UPCAST)
        acc, part = _promoted(acc, part, t - first, PROMOTE)
    acc = acc + part if PROMOTE else part
    acc = _scaled(acc, tl.where(is_cross, y_bound, x_bound), b_bound, scale, SCALED)
    out = tl.where(is_cross, cross, gram)
    ld = tl.where(is_cross, cross_ld, d)
    _epilogue(acc, out, workspace, i, j, out_rows, d, ld, is_cross, PARTIAL, BLOCK_M, BLOCK_N, HALVES)


@triton.jit(do_not_specialize=["splits", "m"])
def reduce_kernel(
    gram, cross, workspace, table, splits, m, d, cross_ld,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds a tile's partial tiles in order, and the sum to the output; a program does `ROWS` rows of a tile."""
    is_cross, i, j = _tile(table)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK_N)
    workspace += (tl.program_id(0) * splits).to(tl.int64) * (BLOCK_M * BLOCK_N)
    offset = r[:, None] * BLOCK_N + c[None, :]
    acc = tl.load(workspace + offset)
    for s in tl.range(1, splits, num_stages=1):
        acc += tl.load(workspace + s * (BLOCK_M * BLOCK_N) + offset)
    out = tl.where(is_cross, cross, gram)
    ld = tl.where(is_cross, cross_ld, d)
    _add_to_output(acc, out, i * BLOCK_M + r, j * BLOCK_N + c, tl.where(is_cross, m, d), d, ld, is_cross)
