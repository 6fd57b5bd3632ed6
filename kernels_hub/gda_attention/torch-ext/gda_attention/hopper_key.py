"""Gluon kernel of dK on Hopper: products of dS. Every program takes a pair of blocks of keys, one a group of warps.

Roles of warps, shapes, and the order of dS's columns as in `hopper_query.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper_tiles import (
    OF_A_PART,
    allocate_barriers,
    allocate_tiles,
    load_query,
    mma_layout,
    seen_from,
    tile_of,
    wait_filled,
    wait_room,
)


@gluon.jit
def _key_load(
    signal, noise, dmap, queries, dmaps, ready, empty, row, group, group_here, half, block, start, steps, low_end,
    high_start, high_end, blocks, base, size, signal_group, signal_head, noise_group,
    RATIO: gl.constexpr, STAGES: gl.constexpr, HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    """Rows of blocks from `start` on; the first block's end at `low_end`, the second's are from `high_start` on."""
    for i in range(gl.where(half == 1, 1, RATIO) * steps):
        head = half * RATIO + i // steps
        begin = start * 2 + i % steps
        line = begin // 2
        place = line * (line + 1) // 2
        if HAS_INTERVALS:
            place = line * blocks
        place += (group_here * (RATIO + 1) + head) * size + block - base
        stage = i % STAGES
        barrier = ready.index(stage)
        first = line < low_end
        second = (line >= high_start) & (line < high_end)
        wait_room(empty, i, STAGES)
        if first & second:
            mbarrier.expect(barrier, signal.block_type.nbytes + 2 * dmap.block_type.nbytes)
        elif first | second:
            mbarrier.expect(barrier, signal.block_type.nbytes + dmap.block_type.nbytes)
        else:
            mbarrier.expect(barrier, signal.block_type.nbytes)
        load_query(signal, noise, row, begin * 64, group, head, signal_group, signal_head, noise_group, barrier,
                    queries.index(stage), RATIO)  # fmt: skip
        row_of_block = begin % 2 * 64
        if first:
            tma.async_copy_global_to_shared(dmap, [place, row_of_block, 0], barrier, dmaps.index(stage * 2))
        if second:
            tma.async_copy_global_to_shared(dmap, [place + 1, row_of_block, 0], barrier, dmaps.index(stage * 2 + 1))


@gluon.jit
def _key_sum(
    queries, dmaps, ready, empty, out_ptr, out_token, heads, block, steps, before, until, T, scale,
    PART: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """This group of warps' keys are seen from step `before` of a head to step `until`."""
    i = 0
    total = gl.zeros([128, 128], gl.float32, mma_layout(128))
    for _head in range(heads):
        for _step in range(before):
            wait_filled(ready, i, STAGES)
            mbarrier.arrive(empty.index(i % STAGES), count=1)
            i += 1
        for _step in range(before, until):
            wait_filled(ready, i, STAGES)
            dmap = tile_of(dmaps, i % STAGES * 2 + PART, 64, 128)
            total = warpgroup_mma(dmap.permute((1, 0)), tile_of(queries, i % STAGES, 64, 128), total, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
            mbarrier.arrive(empty.index(i % STAGES), count=1)
            i += 1
        for _step in range(until, steps):
            wait_filled(ready, i, STAGES)
            mbarrier.arrive(empty.index(i % STAGES), count=1)
            i += 1
    rows = gl.arange(0, 128, gl.SliceLayout(1, mma_layout(128)))
    rows = rows // 32 * 32 + rows % 8 // 2 * 8 + rows % 32 // 8 * 2 + rows % 2  # undoes `spread`
    rows += (block + PART) * 128
    columns = gl.arange(0, 128, gl.SliceLayout(0, mma_layout(128)))
    places = out_ptr + rows[:, None] * out_token + columns[None, :]
    total *= scale
    if ADD:
        total += gl.load(places, mask=(rows < T)[:, None], other=0.0)
    gl.store(places, total.to(out_ptr.dtype.element_ty), mask=(rows < T)[:, None])


@gluon.jit
def _lines_from(runs_ptr, row, block, blocks, first_block, end_block, T, interval_stride, HAS_INTERVALS: gl.constexpr):
    """Rows of blocks here in which a block of keys is seen: the first, and the one after the last."""
    start, end = block, blocks
    if HAS_INTERVALS:
        known = gl.minimum(block, blocks - 1)
        seen, unseen = seen_from(runs_ptr, row, known, blocks, T, interval_stride, HAS_INTERVALS)
        start, end = seen // 128, (unseen + 127) // 128
        end = gl.where((unseen > seen) & (block < blocks), end, start)
    start = gl.minimum(gl.maximum(start, first_block), end_block)
    end = gl.maximum(gl.minimum(end, end_block), start)
    return start, end


@gluon.jit(do_not_specialize=OF_A_PART)
def key_kernel(
    signal, noise, dmap, runs_ptr, dkey_ptr, interval_stride, T, num_groups, first_group, groups_here, first_block,
    blocks_here, base, size, scale, signal_group, signal_head, noise_group,
    RATIO: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr, HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    """dkey (B, T, G, 2, D): sums of dS^T Q over the rows of blocks here, added to what is there if `ADD`.

    Grid: (2 * pairs of blocks of keys * groups_here,), the signal heads' keys first, then the noise heads'.
    """
    dtype: gl.constexpr = signal.dtype
    blocks = (T + 127) // 128
    pairs = (blocks + 1) // 2
    half = gl.program_id(0) // (pairs * groups_here)
    block = gl.program_id(0) // groups_here % pairs * 2
    group_here = gl.program_id(0) % groups_here
    row_and_group = first_group + group_here
    row, group = row_and_group // num_groups, row_and_group % num_groups
    end_block = first_block + blocks_here
    low_start, low_end = _lines_from(
        runs_ptr, row, block, blocks, first_block, end_block, T, interval_stride, HAS_INTERVALS
    )  # fmt: skip
    high_start, high_end = _lines_from(
        runs_ptr, row, block + 1, blocks, first_block, end_block, T, interval_stride, HAS_INTERVALS
    )  # fmt: skip
    has_low, has_high = low_end > low_start, high_end > high_start
    start = gl.where(has_low, low_start, high_start)  # a later block is never seen earlier
    low_end = gl.where(has_low, low_end, start)
    high_start, high_end = gl.where(has_high, high_start, low_end), gl.where(has_high, high_end, low_end)
    steps = (gl.maximum(low_end, high_end) - start) * 2
    heads = gl.where(half == 1, 1, RATIO)
    queries, dmaps = allocate_tiles(dtype, STAGES, 64, 128), allocate_tiles(dtype, 2 * STAGES, 64, 128)
    ready, empty = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    out_token = num_groups * 256
    out_ptr = dkey_ptr + row.to(gl.int64) * T * out_token + group * 256 + half * 128
    gl.warp_specialize(
        [
            (_key_sum, (queries, dmaps, ready, empty, out_ptr, out_token, heads, block, steps,
                        0, (low_end - start) * 2, T, scale, 0, ADD, STAGES)),
            (_key_sum, (queries, dmaps, ready, empty, out_ptr, out_token, heads, block, steps,
                        (high_start - start) * 2, (high_end - start) * 2, T, scale, 1, ADD, STAGES)),
            (_key_load, (signal, noise, dmap, queries, dmaps, ready, empty, row, group, group_here, half, block,
                         start, steps, low_end, high_start, high_end, blocks, base, size, signal_group, signal_head,
                         noise_group, RATIO, STAGES, HAS_INTERVALS)),
        ],
        worker_num_warps=[4, 4], worker_num_regs=[240, 24],
    )  # fmt: skip
