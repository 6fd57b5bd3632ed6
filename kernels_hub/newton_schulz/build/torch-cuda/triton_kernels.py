"""Triton kernels: symmetric products that compute the upper triangle and mirror it, and the normalising copy.

Shapes: N matrices in the batch, S rows (the shorter side), L columns (the longer side), K depth of a product.

A symmetric product is cut into blocks of `BLOCK` rows and columns. With `WIDE = 2 * BLOCK`, a tile is one block row by
two block columns; tiles in block column pair j hold the block rows 0 .. 2j, so j^2 tiles precede them and tile t lies
in pair floor(sqrt(t)). That covers the upper triangle but for the diagonal blocks of odd index, which are half a tile
each: two of them make one unit of work. A matrix of S = 4096 is then 256 tiles and 8 such units, exactly two for each
of 132 multiprocessors. With `WIDE = BLOCK` the tiles are the blocks of the triangle and nothing is left over.

Each program takes every P-th unit (P programs). Which program computes a block never changes how it is computed: every
element is summed over K in one order, so a matrix's result does not depend on the batch it came in.
"""

import triton
import triton.language as tl


@triton.jit
def _own_mirror(value, BLOCK: tl.constexpr):
    """A diagonal block with its lower half replaced by the mirrored upper half."""
    upper = tl.arange(0, BLOCK)[:, None] <= tl.arange(0, BLOCK)[None, :]
    return tl.where(upper, value, value.T)


@triton.jit
def _finish_block(
    accumulator,  # (BLOCK, BLOCK) float32
    addend,
    output,
    matrix,
    row,
    column,
    alpha,
    beta,
    gamma,
    BLOCK: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """Store alpha * accumulator + beta * addend + gamma * I at block (row, column), row <= column, and its mirror.

    `DIAGONAL` is "never", "always" or "maybe". A block on the diagonal is its own mirror image and is made exactly
    symmetric: the kernels read B' for B, and what B lacks in symmetry would grow from product to product.
    """
    value = accumulator * alpha
    if HAS_ADDEND:
        value += beta * addend.load([matrix, row * BLOCK, column * BLOCK]).reshape(BLOCK, BLOCK).to(tl.float32)
    if HAS_GAMMA and DIAGONAL != "never":
        offset = (row - column) * BLOCK
        on_diagonal = tl.arange(0, BLOCK)[:, None] + offset == tl.arange(0, BLOCK)[None, :]
        value += tl.where(on_diagonal, gamma, 0.0)
    value = value.to(output.dtype)
    # The unconditional store comes last: Triton 3.6 cannot flatten a loop whose body ends in a branch.
    if DIAGONAL == "always":
        value = _own_mirror(value, BLOCK)
    elif DIAGONAL == "never":  # noqa: SIM114 -- decided while compiling, the next one while running
        output.store([matrix, column * BLOCK, row * BLOCK], value.T.reshape(1, BLOCK, BLOCK))
    elif row < column:
        output.store([matrix, column * BLOCK, row * BLOCK], value.T.reshape(1, BLOCK, BLOCK))
    else:
        value = _own_mirror(value, BLOCK)
    output.store([matrix, row * BLOCK, column * BLOCK], value.reshape(1, BLOCK, BLOCK))


@triton.jit
def _tile_position(tile, RATIO: tl.constexpr):
    """Block row and wide column of a tile; half a step under the root keeps rounding away from whole numbers."""
    if RATIO == 2:
        column = tl.floor(tl.sqrt(tile.to(tl.float32) + 0.5)).to(tl.int32)
        return tile - column * column, column
    else:
        column = tl.floor(tl.sqrt(2.0 * tile.to(tl.float32) + 0.75) - 0.5).to(tl.int32)
        return tile - column * (column + 1) // 2, column


@triton.jit(do_not_specialize=["depth", "tiles_each", "odd_diagonals_each", "batch"])
def symmetric_product_kernel(
    left,  # descriptor over (N, S, K), block (1, BLOCK, BLOCK_K)
    right,  # descriptor over (N, S, K), block (1, WIDE, BLOCK_K)
    right_narrow,  # the same with block (1, BLOCK, BLOCK_K)
    addend,  # descriptor over (N, S, S), block (1, BLOCK, BLOCK)
    output,  # descriptor over (N, S, S), block (1, BLOCK, BLOCK)
    alpha,
    beta,
    gamma,
    depth,
    tiles_each,
    odd_diagonals_each,
    batch,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """output = alpha * left @ right' + beta * addend + gamma * I, for a symmetric left @ right'."""
    RATIO: tl.constexpr = WIDE // BLOCK
    program = tl.program_id(0)
    num_tiles = tiles_each * batch
    for unit in tl.range(program, num_tiles, PROGRAMS, flatten=FLATTEN):
        matrix = unit // tiles_each
        row, column = _tile_position(unit % tiles_each, RATIO)
        accumulator = tl.zeros((BLOCK, WIDE), dtype=tl.float32)
        for k in tl.range(0, depth, BLOCK_K):
            a = left.load([matrix, row * BLOCK, k]).reshape(BLOCK, BLOCK_K)
            b = right.load([matrix, column * WIDE, k]).reshape(WIDE, BLOCK_K)
            accumulator = tl.dot(a, b.T, accumulator)
        if RATIO == 2:
            halves = tl.permute(tl.reshape(accumulator, (BLOCK, 2, BLOCK)), (0, 2, 1))
            first, second = tl.split(halves)
            _finish_block(first, addend, output, matrix, row, 2 * column, alpha, beta, gamma,
                          BLOCK, HAS_ADDEND, HAS_GAMMA, "maybe")  # fmt: skip
            _finish_block(second, addend, output, matrix, row, 2 * column + 1, alpha, beta, gamma,
                          BLOCK, HAS_ADDEND, HAS_GAMMA, "never")  # fmt: skip
        else:
            _finish_block(accumulator, addend, output, matrix, row, column, alpha, beta, gamma,
                          BLOCK, HAS_ADDEND, HAS_GAMMA, "maybe")  # fmt: skip

    if RATIO == 2:
        num_couples = tl.cdiv(odd_diagonals_each * batch, 2)
        first_couple = (program + PROGRAMS - num_tiles % PROGRAMS) % PROGRAMS
        couples = tl.cdiv(tl.maximum(num_couples - first_couple, 0), PROGRAMS)
        for turn in tl.range(0, 2 * couples):
            # Past the last matrix the loads give zeros and the store is dropped.
            diagonal = 2 * (first_couple + (turn // 2) * PROGRAMS) + turn % 2
            matrix = diagonal // odd_diagonals_each
            row = 2 * (diagonal % odd_diagonals_each) + 1
            narrow = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
            for k in tl.range(0, depth, BLOCK_K):
                a = left.load([matrix, row * BLOCK, k]).reshape(BLOCK, BLOCK_K)
                b = right_narrow.load([matrix, row * BLOCK, k]).reshape(BLOCK, BLOCK_K)
                narrow = tl.dot(a, b.T, narrow)
            _finish_block(narrow, addend, output, matrix, row, row, alpha, beta, gamma,
                          BLOCK, HAS_ADDEND, HAS_GAMMA, "always")  # fmt: skip


@triton.jit
def square_sums_kernel(source, partial_sums, rows, columns, batch_stride, row_stride, BLOCK: tl.constexpr):
    """Program (p, n) of P sums the squares of rows p, p + P, ... of matrix n in float32, always in this order."""
    part = tl.program_id(0)
    matrix = tl.program_id(1)
    source += matrix.to(tl.int64) * batch_stride
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for row in tl.range(part, rows, tl.num_programs(0)):
        for start in tl.range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(source + row * row_stride + column, mask=column < columns, other=0.0)
            value = value.to(tl.float32)
            total += value * value
    tl.store(partial_sums + matrix * tl.num_programs(0) + part, tl.sum(total))


@triton.jit
def normalise_kernel(
    source,  # (N, rows, columns), last dimension contiguous
    partial_sums,  # (N, PARTS) float32
    output,  # (N, rows, columns), or (N, columns, rows) where TRANSPOSE; last dimension contiguous
    rows,
    columns,
    source_batch_stride,
    source_row_stride,
    output_batch_stride,
    output_row_stride,
    eps,
    PARTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
):
    """output = source / (Frobenius norm + eps), in float32 before the cast to the output's type."""
    matrix = tl.program_id(1)
    tiles_across = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (tl.program_id(0) // tiles_across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (tl.program_id(0) % tiles_across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    total = tl.sum(tl.load(partial_sums + matrix * PARTS + tl.arange(0, PARTS)))
    source += matrix.to(tl.int64) * source_batch_stride
    output += matrix.to(tl.int64) * output_batch_stride
    value = tl.load(source + row * source_row_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = (value / (tl.sqrt(total) + eps)).to(output.dtype.element_ty)
    if TRANSPOSE:
        across = output + tl.trans(column) * output_row_stride + tl.trans(row)
        tl.store(across, tl.trans(value), mask=tl.trans(inside))
    else:
        tl.store(output + row * output_row_stride + column, value, mask=inside)
