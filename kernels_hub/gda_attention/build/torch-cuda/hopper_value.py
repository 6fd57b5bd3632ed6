"""Gluon kernel of dV on Hopper: every program takes 128 keys and goes through the queries of all heads that see them.

Roles of warps, shapes, and what the compiler needs, as in `hopper_query.py`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper_tiles import (
    allocate_barriers,
    allocate_tiles,
    head_of_all,
    left_layout,
    load_query,
    mma_layout,
    seen_from,
    start_scores,
    tile_of,
    wait_filled,
    wait_room,
)


@gluon.jit
def _value_lse(lse_ptr, i, start, steps, T, group, num_groups, RATIO: gl.constexpr, BLOCK_M: gl.constexpr):
    lse_ptr += head_of_all(group, i // steps, num_groups, RATIO) * T
    queries = start + i % steps * BLOCK_M + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.load(lse_ptr + queries, mask=queries < T, other=float("inf"))


@gluon.jit
def _value_bounds(first_ptr, last_ptr, i, start, steps, T, BLOCK_M: gl.constexpr, HAS_INTERVALS: gl.constexpr):
    """First and last key of each query of a step; outside the row none."""
    queries = start + i % steps * BLOCK_M + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    first, last = queries, queries
    if HAS_INTERVALS:
        first = gl.load(first_ptr + queries, mask=queries < T, other=T)
        last = gl.load(last_ptr + queries, mask=queries < T, other=-1)
    return first, last


@gluon.jit
def _value_load(
    signal, noise, key, dout, lse_ptr, first_ptr, last_ptr, queries, douts, lses, bounds, keys, ready, empty,
    keys_ready, row, group, num_groups, tile, start, steps, T,
    signal_group, signal_head, noise_group, key_group, key_half,
    RATIO: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(keys_ready, 4 * key.block_type.nbytes)
    for half in gl.static_range(2):
        for part in gl.static_range(2):
            place = [row, tile * 128 + part * 64, group * key_group + half * key_half]
            tma.async_copy_global_to_shared(key, place, keys_ready, keys.index(half * 2 + part))
    last = steps * (RATIO + 1) - 1
    lse = _value_lse(lse_ptr, 0, start, steps, T, group, num_groups, RATIO, BLOCK_M)
    first, end = _value_bounds(first_ptr, last_ptr, 0, start, steps, T, BLOCK_M, HAS_INTERVALS)
    for i in range(last + 1):
        head = i // steps
        begin = start + i % steps * BLOCK_M
        stage = i % STAGES
        barrier = ready.index(stage)
        wait_room(empty, i, STAGES)
        mbarrier.expect(barrier, signal.block_type.nbytes + dout.block_type.nbytes)
        load_query(signal, noise, row, begin, group, head, signal_group, signal_head, noise_group, barrier,
                    queries.index(stage), RATIO)  # fmt: skip
        place = [row, begin, head_of_all(group, head, num_groups, RATIO) * 256]
        tma.async_copy_global_to_shared(dout, place, barrier, douts.index(stage))
        lses.index(stage).store(lse)
        if HAS_INTERVALS:
            bounds.index(stage * 2).store(first)
            bounds.index(stage * 2 + 1).store(end)
        mbarrier.arrive(barrier, count=1)
        following = gl.minimum(i + 1, last)
        lse = _value_lse(lse_ptr, following, start, steps, T, group, num_groups, RATIO, BLOCK_M)
        first, end = _value_bounds(first_ptr, last_ptr, following, start, steps, T, BLOCK_M, HAS_INTERVALS)


@gluon.jit
def _value_maps(
    logits, lse, bounds, stage, begin, first_key, log2_scale, dtype: gl.constexpr, BLOCK_M: gl.constexpr,
    HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    """The maps (64, M), transposed, as the left operand of the next product."""
    exponents = logits * log2_scale - lse[None, :]
    if HAS_INTERVALS:
        keys = first_key + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(BLOCK_M)))
        first = bounds.index(stage * 2).load(gl.SliceLayout(0, mma_layout(BLOCK_M)))
        last = bounds.index(stage * 2 + 1).load(gl.SliceLayout(0, mma_layout(BLOCK_M)))
        seen = (keys[:, None] >= first[None, :]) & (keys[:, None] <= last[None, :])
        exponents = gl.where(seen, exponents, -float("inf"))
    elif begin < first_key + 63:
        keys = first_key + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(BLOCK_M)))
        queries = begin + gl.arange(0, BLOCK_M, gl.SliceLayout(0, mma_layout(BLOCK_M)))
        exponents = gl.where(keys[:, None] <= queries[None, :], exponents, -float("inf"))
    return gl.convert_layout(gl.exp2(exponents).to(dtype), left_layout(256))


@gluon.jit
def _value_scores(keys, queries, i, head, PART: gl.constexpr, RATIO: gl.constexpr, BLOCK_M: gl.constexpr,
                  STAGES: gl.constexpr):  # fmt: skip
    key = tile_of(keys, head // RATIO * 2 + PART, 64, 128)
    return start_scores(key, tile_of(queries, i % STAGES, BLOCK_M, 128), BLOCK_M)


@gluon.jit
def _value_sum(
    queries, douts, lses, bounds, keys, ready, empty, keys_ready, out_ptr, out_token, tile, start, steps, T,
    log2_scale, PART: gl.constexpr, RATIO: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = queries.dtype
    first_key = tile * 128 + PART * 64
    stop = start + steps * BLOCK_M
    last = steps * (RATIO + 1) - 1
    total = gl.zeros([64, 256], gl.float32, mma_layout(256))
    mbarrier.wait(keys_ready, 0)
    wait_filled(ready, 0, STAGES)
    head, begin = 0, start
    lse = lses.index(0).load(gl.SliceLayout(0, mma_layout(BLOCK_M)))
    logits = _value_scores(keys, queries, 0, head, PART, RATIO, BLOCK_M, STAGES)
    logits = warpgroup_mma_wait(0, deps=[logits])
    maps = _value_maps(logits, lse, bounds, 0, begin, first_key, log2_scale, dtype, BLOCK_M, HAS_INTERVALS)
    wait_filled(ready, gl.minimum(1, last), STAGES)
    for i in range(last):
        begin += BLOCK_M
        head = gl.where(begin >= stop, head + 1, head)
        begin = gl.where(begin >= stop, start, begin)
        logits = _value_scores(keys, queries, i + 1, head, PART, RATIO, BLOCK_M, STAGES)
        total = warpgroup_mma(maps, tile_of(douts, i % STAGES, BLOCK_M, 256), total, is_async=True)
        lse = lses.index((i + 1) % STAGES).load(gl.SliceLayout(0, mma_layout(BLOCK_M)))
        logits = warpgroup_mma_wait(1, deps=[logits])
        next_maps = _value_maps(
            logits, lse, bounds, (i + 1) % STAGES, begin, first_key, log2_scale, dtype, BLOCK_M, HAS_INTERVALS
        )  # fmt: skip
        wait_filled(ready, gl.minimum(i + 2, last), STAGES)  # here, so that the exponentials stay before the next wait
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index(i % STAGES), count=1)
        maps = next_maps
    total = warpgroup_mma(maps, tile_of(douts, last % STAGES, BLOCK_M, 256), total, is_async=True)
    total = warpgroup_mma_wait(0, deps=[total])
    rows = first_key + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(256)))
    columns = gl.arange(0, 256, gl.SliceLayout(0, mma_layout(256)))
    gl.store(out_ptr + rows[:, None] * out_token + columns[None, :], total.to(dtype), mask=(rows < T)[:, None])


@gluon.jit(do_not_specialize=["T", "num_groups", "rows_and_groups", "interval_stride"])
def value_kernel(
    signal, noise, key, dout, lse_ptr, first_ptr, last_ptr, runs_ptr, dvalue_ptr,
    interval_stride, T, num_groups, rows_and_groups, log2_scale,
    signal_group, signal_head, noise_group, key_group, key_half,
    RATIO: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    """dvalue (B, T, G, 2, D). Grid: (tiles of 128 keys * B * G,), the longest first."""
    dtype: gl.constexpr = signal.dtype
    tile = gl.program_id(0) // rows_and_groups
    row_and_group = gl.program_id(0) % rows_and_groups
    row, group = row_and_group // num_groups, row_and_group % num_groups
    start, end = seen_from(runs_ptr, row, tile, (T + 127) // 128, T, interval_stride, HAS_INTERVALS)
    steps = gl.maximum((end - start + BLOCK_M - 1) // BLOCK_M, 1)  # one even where no query sees a key: it adds zeros
    first_ptr += row * interval_stride
    last_ptr += row * interval_stride
    bounds = gl.allocate_shared_memory(gl.int32, [2 * STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    queries = allocate_tiles(dtype, STAGES, BLOCK_M, 128)
    douts = allocate_tiles(dtype, STAGES, BLOCK_M, 256)
    keys = allocate_tiles(dtype, 4, 64, 128)
    lses = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    ready, empty = allocate_barriers(STAGES, 2), allocate_barriers(STAGES, 2)
    keys_ready = allocate_barriers(1, 1).index(0)
    out_token = num_groups * 256
    lse_ptr += row.to(gl.int64) * num_groups * (RATIO + 1) * T
    dvalue_ptr += row.to(gl.int64) * T * out_token + group * 256
    gl.warp_specialize(
        [
            (_value_sum, (queries, douts, lses, bounds, keys, ready, empty, keys_ready, dvalue_ptr, out_token, tile,
                          start, steps, T, log2_scale, 0, RATIO, BLOCK_M, STAGES, HAS_INTERVALS)),
            (_value_sum, (queries, douts, lses, bounds, keys, ready, empty, keys_ready, dvalue_ptr, out_token, tile,
                          start, steps, T, log2_scale, 1, RATIO, BLOCK_M, STAGES, HAS_INTERVALS)),
            (_value_load, (signal, noise, key, dout, lse_ptr, first_ptr, last_ptr, queries, douts, lses, bounds, keys,
                           ready, empty, keys_ready, row, group, num_groups, tile, start, steps, T, signal_group,
                           signal_head, noise_group, key_group, key_half, RATIO, BLOCK_M, STAGES, HAS_INTERVALS)),
        ],
        worker_num_warps=[4, 4], worker_num_regs=[232, 40],
    )  # fmt: skip
