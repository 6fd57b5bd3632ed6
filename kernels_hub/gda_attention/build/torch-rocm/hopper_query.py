"""Gluon kernel of dQ and dS on Hopper: as many queries as keys, heads of 128, 16-bit elements.

The same passes and the same scratch as `backward_kernels.py`, with their roles given to warps by hand: one group of
warps loads tiles through the copy engine into a ring in shared memory, two groups of four warps multiply, each its own
64 rows, and the exponentials of one product run while the next is on the tensor cores. Here every program takes 128
queries of one head and goes through the keys that they see.

A block of dS keeps its 64 x 64 quarters' columns in the order in which a thread holds them (`spread`), so that a
thread stores 16 bytes at once; `hopper_key.py` puts the rows of dK, which come out in that order, back.

Inputs are seen as (B, T, everything else) by descriptors. Shapes: B rows, T queries and keys, G groups, r signal heads
a group, D = 128, H = G * (r + 1) heads, the signal heads of all groups and then the noise heads.

What the compiler needs (looked up in its output, Triton 3.6.0 and 3.7.1): a product that takes its left operand from
registers must be waited for in the iteration that starts it, or all products are serialised; exponentials that shall
run beside a product must be used in another basic block than the wait for it, or they are moved behind the wait.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper_tiles import (
    OF_A_PART,
    allocate_barriers,
    allocate_tiles,
    bounds_of,
    head_of_all,
    keys_of,
    left_layout,
    load_query,
    mma_layout,
    spread,
    spread_layout,
    start_scores,
    tile_of,
    wait_filled,
    wait_room,
)


@gluon.jit
def _query_load(
    signal, noise, key, value, dout, queries, douts, keys, values,
    queries_ready, keys_ready, keys_empty, values_ready, values_empty, row, group, num_groups, head, tile,
    start, steps, signal_group, signal_head, noise_group, key_group, key_half, value_group,
    RATIO: gl.constexpr, BLOCK_N: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(queries_ready, 2 * (signal.block_type.nbytes + dout.block_type.nbytes))
    for part in gl.static_range(2):
        begin = tile * 128 + part * 64
        load_query(signal, noise, row, begin, group, head, signal_group, signal_head, noise_group, queries_ready,
                    queries.index(part), RATIO)  # fmt: skip
        place = [row, begin, head_of_all(group, head, num_groups, RATIO) * 256]
        tma.async_copy_global_to_shared(dout, place, queries_ready, douts.index(part))
    key_column = group * key_group + head // RATIO * key_half
    for j in range(steps):
        barrier = keys_ready.index(j % KEY_STAGES)
        wait_room(keys_empty, j, KEY_STAGES)
        mbarrier.expect(barrier, key.block_type.nbytes)
        place = [row, start + j * BLOCK_N, key_column]
        tma.async_copy_global_to_shared(key, place, barrier, keys.index(j % KEY_STAGES))
        barrier = values_ready.index(j % VALUE_STAGES)
        wait_room(values_empty, j, VALUE_STAGES)
        mbarrier.expect(barrier, value.block_type.nbytes)
        place = [row, start + j * BLOCK_N, group * value_group]
        tma.async_copy_global_to_shared(value, place, barrier, values.index(j % VALUE_STAGES))


@gluon.jit
def _query_maps(
    logits, lse, first, last, begin, all_from, all_to, log2_scale, BLOCK_N: gl.constexpr, HAS_INTERVALS: gl.constexpr
):  # fmt: skip
    """The maps (64, N); every query here sees the keys from `all_from` to `all_to`."""
    exponents = logits * log2_scale - lse[:, None]
    if (begin < all_from) | (begin + BLOCK_N - 1 > all_to):
        keys = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma_layout(BLOCK_N)))
        seen = keys[None, :] <= last[:, None]
        if HAS_INTERVALS:
            seen &= keys[None, :] >= first[:, None]
        exponents = gl.where(seen, exponents, -float("inf"))
    return gl.exp2(exponents)


@gluon.jit
def _store_dmap(dmap_ptr, dlogits, j):
    """`dmap_ptr`: this group of warps' first row of the first block (128, 128) of the row of blocks."""
    rows = gl.arange(0, 64, gl.SliceLayout(1, spread_layout()))
    columns = gl.arange(0, 64, gl.SliceLayout(0, spread_layout()))
    place = dmap_ptr + j // 2 * 16384 + j % 2 * 64
    gl.store(gl.multiple_of(place + rows[:, None] * 128 + columns[None, :], [16, 16]), spread(dlogits))


@gluon.jit
def _query_sum(
    queries, douts, keys, values, queries_ready, keys_ready, keys_empty, values_ready, values_empty,
    lse_ptr, delta_ptr, first_ptr, last_ptr, dmap_ptr, out_ptr, out_token, tile, start, steps, T,
    log2_scale, scale, PART: gl.constexpr, BLOCK_N: gl.constexpr, KEY_STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr, HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = queries.dtype
    first_row = tile * 128 + PART * 64
    final = steps - 1
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(BLOCK_N)))
    lse = gl.load(lse_ptr + rows, mask=rows < T, other=float("inf"))
    delta = gl.load(delta_ptr + rows, mask=rows < T, other=0.0)
    first, last, all_from, all_to = bounds_of(first_ptr, last_ptr, rows, first_row, T, HAS_INTERVALS)
    dmap_ptr += PART * 8192
    query, dout = tile_of(queries, PART, 64, 128), tile_of(douts, PART, 64, 256)
    total = gl.zeros([64, 128], gl.float32, mma_layout(128))
    mbarrier.wait(queries_ready, 0)
    wait_filled(keys_ready, 0, KEY_STAGES)
    wait_filled(values_ready, 0, VALUE_STAGES)
    logits = start_scores(query, tile_of(keys, 0, BLOCK_N, 128), BLOCK_N)
    dmaps = start_scores(dout, tile_of(values, 0, BLOCK_N, 256), BLOCK_N)
    logits = warpgroup_mma_wait(1, deps=[logits])
    maps = _query_maps(logits, lse, first, last, start, all_from, all_to, log2_scale, BLOCK_N, HAS_INTERVALS)
    wait_filled(keys_ready, gl.minimum(1, final), KEY_STAGES)
    for j in range(final):
        key = tile_of(keys, j % KEY_STAGES, BLOCK_N, 128)
        dmaps = warpgroup_mma_wait(0, deps=[dmaps])
        dlogits = (maps * (dmaps - delta[:, None])).to(dtype)
        logits = start_scores(query, tile_of(keys, (j + 1) % KEY_STAGES, BLOCK_N, 128), BLOCK_N)
        total = warpgroup_mma(gl.convert_layout(dlogits, left_layout(128)), key, total, is_async=True)
        mbarrier.arrive(values_empty.index(j % VALUE_STAGES), count=1)
        wait_filled(values_ready, j + 1, VALUE_STAGES)
        dmaps = start_scores(dout, tile_of(values, (j + 1) % VALUE_STAGES, BLOCK_N, 256), BLOCK_N)
        _store_dmap(dmap_ptr, dlogits, j)
        logits, total = warpgroup_mma_wait(1, deps=[logits, total])
        mbarrier.arrive(keys_empty.index(j % KEY_STAGES), count=1)
        begin = start + (j + 1) * BLOCK_N
        maps = _query_maps(logits, lse, first, last, begin, all_from, all_to, log2_scale, BLOCK_N, HAS_INTERVALS)
        wait_filled(
            keys_ready, gl.minimum(j + 2, final), KEY_STAGES
        )  # here, so that the exponentials stay before the wait
    dmaps = warpgroup_mma_wait(0, deps=[dmaps])
    dlogits = (maps * (dmaps - delta[:, None])).to(dtype)
    key = tile_of(keys, final % KEY_STAGES, BLOCK_N, 128)
    total = warpgroup_mma(gl.convert_layout(dlogits, left_layout(128)), key, total, is_async=True)
    _store_dmap(dmap_ptr, dlogits, final)
    total = warpgroup_mma_wait(0, deps=[total])
    out_rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(128)))
    columns = gl.arange(0, 128, gl.SliceLayout(0, mma_layout(128)))
    gl.store(
        out_ptr + out_rows[:, None] * out_token + columns[None, :], (total * scale).to(dtype),
        mask=(out_rows < T)[:, None],
    )  # fmt: skip


@gluon.jit(do_not_specialize=OF_A_PART)
def query_kernel(
    signal, noise, key, value, dout, lse_ptr, delta_ptr, first_ptr, last_ptr, dmap_ptr, dsignal_ptr, dnoise_ptr,
    interval_stride, T, num_groups, first_group, groups_here, first_block, blocks_here, base, size, log2_scale, scale,
    signal_group, signal_head, noise_group, key_group, key_half, value_group,
    RATIO: gl.constexpr, BLOCK_N: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
    HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    """dsignal (B, T, G, r, D), dnoise (B, T, G, D) and the rows of blocks of dS from `first_block` on.

    Grid: (blocks_here * groups_here * (r + 1),), the last tile first. Groups count over all rows.
    """
    HEADS: gl.constexpr = RATIO + 1
    dtype: gl.constexpr = signal.dtype
    head = gl.program_id(0) % HEADS
    group_here = gl.program_id(0) // HEADS % groups_here
    tile = first_block + blocks_here - 1 - gl.program_id(0) // (HEADS * groups_here)
    row_and_group = first_group + group_here
    row, group = row_and_group // num_groups, row_and_group % num_groups
    queries, douts = allocate_tiles(dtype, 2, 64, 128), allocate_tiles(dtype, 2, 64, 256)
    keys, values = allocate_tiles(dtype, KEY_STAGES, BLOCK_N, 128), allocate_tiles(dtype, VALUE_STAGES, BLOCK_N, 256)
    queries_ready = allocate_barriers(1, 1).index(0)
    keys_ready, keys_empty = allocate_barriers(KEY_STAGES, 1), allocate_barriers(KEY_STAGES, 2)
    values_ready, values_empty = allocate_barriers(VALUE_STAGES, 1), allocate_barriers(VALUE_STAGES, 2)
    head_row = row.to(gl.int64) * num_groups * HEADS + head_of_all(group, head, num_groups, RATIO)
    lse_ptr += head_row * T
    delta_ptr += head_row * T
    start, end = 0, (tile + 1) * 128
    place = tile * (tile + 1) // 2
    if HAS_INTERVALS:
        first_ptr += row * interval_stride
        last_ptr += row * interval_stride
        start, end = keys_of(first_ptr, last_ptr, tile, T, 128)
        place = tile * ((T + 127) // 128) + start // 128
    steps = (end - start) // BLOCK_N
    block = (group_here * HEADS + head).to(gl.int64) * size + place - base
    dmap_ptr += block * 16384
    out_token = num_groups * RATIO * 128
    out_ptr = dsignal_ptr + row.to(gl.int64) * T * out_token + (group * RATIO + head) * 128
    if head == RATIO:
        out_token = num_groups * 128
        out_ptr = dnoise_ptr + row.to(gl.int64) * T * out_token + group * 128
    gl.warp_specialize(
        [
            (_query_sum, (queries, douts, keys, values, queries_ready, keys_ready, keys_empty, values_ready,
                          values_empty, lse_ptr, delta_ptr, first_ptr, last_ptr, dmap_ptr, out_ptr, out_token, tile,
                          start, steps, T, log2_scale, scale, 0, BLOCK_N, KEY_STAGES, VALUE_STAGES, HAS_INTERVALS)),
            (_query_sum, (queries, douts, keys, values, queries_ready, keys_ready, keys_empty, values_ready,
                          values_empty, lse_ptr, delta_ptr, first_ptr, last_ptr, dmap_ptr, out_ptr, out_token, tile,
                          start, steps, T, log2_scale, scale, 1, BLOCK_N, KEY_STAGES, VALUE_STAGES, HAS_INTERVALS)),
            (_query_load, (signal, noise, key, value, dout, queries, douts, keys, values, queries_ready, keys_ready,
                           keys_empty, values_ready, values_empty, row, group, num_groups, head, tile, start, steps,
                           signal_group, signal_head, noise_group, key_group, key_half, value_group, RATIO, BLOCK_N,
                           KEY_STAGES, VALUE_STAGES)),
        ],
        worker_num_warps=[4, 4], worker_num_regs=[240, 24],
    )  # fmt: skip
