"""Gluon kernels of the backward on Hopper: causal order, as many queries as keys, heads of 128, 16-bit elements.

The same passes and the same scratch as `backward_kernels.py`, with their roles given to warps by hand: one group of
warps loads tiles through the copy engine into a ring in shared memory, two groups of four warps multiply, each its own
64 rows, and the exponentials of one product run while the next is on the tensor cores.

A block of dS keeps its 64 x 64 quarters' columns in the order in which a thread holds them (`spread`), so that a
thread stores 16 bytes at once; the rows of dK come out in that order and are put back where they are stored.

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
    allocate_barriers,
    allocate_tiles,
    head_of_all,
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

# dV: every program takes 128 keys and goes through the queries of all heads that see them.


@gluon.jit
def _value_lse(lse_ptr, i, tile, steps, T, group, num_groups, RATIO: gl.constexpr, BLOCK_M: gl.constexpr):
    lse_ptr += head_of_all(group, i // steps, num_groups, RATIO) * T
    queries = tile * 128 + i % steps * BLOCK_M + gl.arange(0, BLOCK_M, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.load(lse_ptr + queries, mask=queries < T, other=float("inf"))


@gluon.jit
def _value_load(
    signal, noise, key, dout, lse_ptr, queries, douts, lses, keys, ready, empty, keys_ready, row, group, num_groups,
    tile, steps, T, signal_group, signal_head, noise_group, key_group, key_half,
    RATIO: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(keys_ready, 4 * key.block_type.nbytes)
    for half in gl.static_range(2):
        for part in gl.static_range(2):
            place = [row, tile * 128 + part * 64, group * key_group + half * key_half]
            tma.async_copy_global_to_shared(key, place, keys_ready, keys.index(half * 2 + part))
    last = steps * (RATIO + 1) - 1
    lse = _value_lse(lse_ptr, 0, tile, steps, T, group, num_groups, RATIO, BLOCK_M)
    for i in range(last + 1):
        head = i // steps
        begin = tile * 128 + i % steps * BLOCK_M
        stage = i % STAGES
        barrier = ready.index(stage)
        wait_room(empty, i, STAGES)
        mbarrier.expect(barrier, signal.block_type.nbytes + dout.block_type.nbytes)
        load_query(signal, noise, row, begin, group, head, signal_group, signal_head, noise_group, barrier,
                    queries.index(stage), RATIO)  # fmt: skip
        place = [row, begin, head_of_all(group, head, num_groups, RATIO) * 256]
        tma.async_copy_global_to_shared(dout, place, barrier, douts.index(stage))
        lses.index(stage).store(lse)
        mbarrier.arrive(barrier, count=1)
        following = gl.minimum(i + 1, last)
        lse = _value_lse(lse_ptr, following, tile, steps, T, group, num_groups, RATIO, BLOCK_M)


@gluon.jit
def _value_maps(logits, lse, begin, first_key, log2_scale, dtype: gl.constexpr, BLOCK_M: gl.constexpr):
    """The maps (64, M), transposed, as the left operand of the next product."""
    exponents = logits * log2_scale - lse[None, :]
    if begin < first_key + 63:
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
    queries, douts, lses, keys, ready, empty, keys_ready, out_ptr, out_token, tile, steps, T, log2_scale,
    PART: gl.constexpr, RATIO: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = queries.dtype
    first_key = tile * 128 + PART * 64
    start = tile * 128
    last = steps * (RATIO + 1) - 1
    total = gl.zeros([64, 256], gl.float32, mma_layout(256))
    mbarrier.wait(keys_ready, 0)
    wait_filled(ready, 0, STAGES)
    head, begin = 0, start
    lse = lses.index(0).load(gl.SliceLayout(0, mma_layout(BLOCK_M)))
    logits = _value_scores(keys, queries, 0, head, PART, RATIO, BLOCK_M, STAGES)
    logits = warpgroup_mma_wait(0, deps=[logits])
    maps = _value_maps(logits, lse, begin, first_key, log2_scale, dtype, BLOCK_M)
    wait_filled(ready, gl.minimum(1, last), STAGES)
    for i in range(last):
        begin += BLOCK_M
        head = gl.where(begin >= T, head + 1, head)
        begin = gl.where(begin >= T, start, begin)
        logits = _value_scores(keys, queries, i + 1, head, PART, RATIO, BLOCK_M, STAGES)
        total = warpgroup_mma(maps, tile_of(douts, i % STAGES, BLOCK_M, 256), total, is_async=True)
        lse = lses.index((i + 1) % STAGES).load(gl.SliceLayout(0, mma_layout(BLOCK_M)))
        logits = warpgroup_mma_wait(1, deps=[logits])
        next_maps = _value_maps(logits, lse, begin, first_key, log2_scale, dtype, BLOCK_M)
        wait_filled(ready, gl.minimum(i + 2, last), STAGES)  # here, so that the exponentials stay before the next wait
        total = warpgroup_mma_wait(0, deps=[total])
        mbarrier.arrive(empty.index(i % STAGES), count=1)
        maps = next_maps
    total = warpgroup_mma(maps, tile_of(douts, last % STAGES, BLOCK_M, 256), total, is_async=True)
    total = warpgroup_mma_wait(0, deps=[total])
    rows = first_key + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(256)))
    columns = gl.arange(0, 256, gl.SliceLayout(0, mma_layout(256)))
    gl.store(out_ptr + rows[:, None] * out_token + columns[None, :], total.to(dtype), mask=(rows < T)[:, None])


@gluon.jit(do_not_specialize=["T", "num_groups", "rows_and_groups"])
def value_kernel(
    signal, noise, key, dout, lse_ptr, dvalue_ptr, T, num_groups, rows_and_groups, log2_scale,
    signal_group, signal_head, noise_group, key_group, key_half,
    RATIO: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dvalue (B, T, G, 2, D). Grid: (tiles of 128 keys * B * G,), the longest first."""
    dtype: gl.constexpr = signal.dtype
    tile = gl.program_id(0) // rows_and_groups
    row_and_group = gl.program_id(0) % rows_and_groups
    row, group = row_and_group // num_groups, row_and_group % num_groups
    steps = (T - tile * 128 + BLOCK_M - 1) // BLOCK_M
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
            (_value_sum, (queries, douts, lses, keys, ready, empty, keys_ready, dvalue_ptr, out_token, tile, steps, T,
                          log2_scale, 0, RATIO, BLOCK_M, STAGES)),
            (_value_sum, (queries, douts, lses, keys, ready, empty, keys_ready, dvalue_ptr, out_token, tile, steps, T,
                          log2_scale, 1, RATIO, BLOCK_M, STAGES)),
            (_value_load, (signal, noise, key, dout, lse_ptr, queries, douts, lses, keys, ready, empty, keys_ready,
                           row, group, num_groups, tile, steps, T, signal_group, signal_head, noise_group, key_group,
                           key_half, RATIO, BLOCK_M, STAGES)),
        ],
        worker_num_warps=[4, 4], worker_num_regs=[232, 40],
    )  # fmt: skip


# dQ and dS: every program takes 128 queries of one head and goes through the keys that they see.


@gluon.jit
def _query_load(
    signal, noise, key, value, dout, queries, douts, keys, values,
    queries_ready, keys_ready, keys_empty, values_ready, values_empty, row, group, num_groups, head, tile,
    signal_group, signal_head, noise_group, key_group, key_half, value_group,
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
    for j in range((tile + 1) * (128 // BLOCK_N)):
        barrier = keys_ready.index(j % KEY_STAGES)
        wait_room(keys_empty, j, KEY_STAGES)
        mbarrier.expect(barrier, key.block_type.nbytes)
        tma.async_copy_global_to_shared(key, [row, j * BLOCK_N, key_column], barrier, keys.index(j % KEY_STAGES))
        barrier = values_ready.index(j % VALUE_STAGES)
        wait_room(values_empty, j, VALUE_STAGES)
        mbarrier.expect(barrier, value.block_type.nbytes)
        place = [row, j * BLOCK_N, group * value_group]
        tma.async_copy_global_to_shared(value, place, barrier, values.index(j % VALUE_STAGES))


@gluon.jit
def _query_maps(logits, lse, begin, first_row, log2_scale, BLOCK_N: gl.constexpr):
    exponents = logits * log2_scale - lse[:, None]
    if begin + BLOCK_N - 1 > first_row:
        keys = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma_layout(BLOCK_N)))
        rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(BLOCK_N)))
        exponents = gl.where(keys[None, :] <= rows[:, None], exponents, -float("inf"))
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
    lse_ptr, delta_ptr, dmap_ptr, out_ptr, out_token, tile, T, log2_scale, scale,
    PART: gl.constexpr, BLOCK_N: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = queries.dtype
    first_row = tile * 128 + PART * 64
    last = (tile + 1) * (128 // BLOCK_N) - 1
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(BLOCK_N)))
    lse = gl.load(lse_ptr + rows, mask=rows < T, other=float("inf"))
    delta = gl.load(delta_ptr + rows, mask=rows < T, other=0.0)
    dmap_ptr += PART * 8192
    query, dout = tile_of(queries, PART, 64, 128), tile_of(douts, PART, 64, 256)
    total = gl.zeros([64, 128], gl.float32, mma_layout(128))
    mbarrier.wait(queries_ready, 0)
    wait_filled(keys_ready, 0, KEY_STAGES)
    wait_filled(values_ready, 0, VALUE_STAGES)
    logits = start_scores(query, tile_of(keys, 0, BLOCK_N, 128), BLOCK_N)
    dmaps = start_scores(dout, tile_of(values, 0, BLOCK_N, 256), BLOCK_N)
    logits = warpgroup_mma_wait(1, deps=[logits])
    maps = _query_maps(logits, lse, 0, first_row, log2_scale, BLOCK_N)
    wait_filled(keys_ready, gl.minimum(1, last), KEY_STAGES)
    for j in range(last):
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
        maps = _query_maps(logits, lse, (j + 1) * BLOCK_N, first_row, log2_scale, BLOCK_N)
        wait_filled(
            keys_ready, gl.minimum(j + 2, last), KEY_STAGES
        )  # here, so that the exponentials stay before the wait
    dmaps = warpgroup_mma_wait(0, deps=[dmaps])
    dlogits = (maps * (dmaps - delta[:, None])).to(dtype)
    key = tile_of(keys, last % KEY_STAGES, BLOCK_N, 128)
    total = warpgroup_mma(gl.convert_layout(dlogits, left_layout(128)), key, total, is_async=True)
    _store_dmap(dmap_ptr, dlogits, last)
    total = warpgroup_mma_wait(0, deps=[total])
    out_rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(128)))
    columns = gl.arange(0, 128, gl.SliceLayout(0, mma_layout(128)))
    gl.store(
        out_ptr + out_rows[:, None] * out_token + columns[None, :], (total * scale).to(dtype),
        mask=(out_rows < T)[:, None],
    )  # fmt: skip


@gluon.jit(
    do_not_specialize=["T", "num_groups", "first_group", "groups_here", "first_block", "blocks_here", "base", "size"]
)
def query_kernel(
    signal, noise, key, value, dout, lse_ptr, delta_ptr, dmap_ptr, dsignal_ptr, dnoise_ptr,
    T, num_groups, first_group, groups_here, first_block, blocks_here, base, size, log2_scale, scale,
    signal_group, signal_head, noise_group, key_group, key_half, value_group,
    RATIO: gl.constexpr, BLOCK_N: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
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
    block = (group_here * HEADS + head).to(gl.int64) * size + tile * (tile + 1) // 2 - base
    dmap_ptr += block * 16384
    out_token = num_groups * RATIO * 128
    out_ptr = dsignal_ptr + row.to(gl.int64) * T * out_token + (group * RATIO + head) * 128
    if head == RATIO:
        out_token = num_groups * 128
        out_ptr = dnoise_ptr + row.to(gl.int64) * T * out_token + group * 128
    gl.warp_specialize(
        [
            (_query_sum, (queries, douts, keys, values, queries_ready, keys_ready, keys_empty, values_ready,
                          values_empty, lse_ptr, delta_ptr, dmap_ptr, out_ptr, out_token, tile, T, log2_scale, scale,
                          0, BLOCK_N, KEY_STAGES, VALUE_STAGES)),
            (_query_sum, (queries, douts, keys, values, queries_ready, keys_ready, keys_empty, values_ready,
                          values_empty, lse_ptr, delta_ptr, dmap_ptr, out_ptr, out_token, tile, T, log2_scale, scale,
                          1, BLOCK_N, KEY_STAGES, VALUE_STAGES)),
            (_query_load, (signal, noise, key, value, dout, queries, douts, keys, values, queries_ready, keys_ready,
                           keys_empty, values_ready, values_empty, row, group, num_groups, head, tile, signal_group,
                           signal_head, noise_group, key_group, key_half, value_group, RATIO, BLOCK_N, KEY_STAGES,
                           VALUE_STAGES)),
        ],
        worker_num_warps=[4, 4], worker_num_regs=[240, 24],
    )  # fmt: skip


# dK: products of dS. Every program takes a pair of blocks of keys, a block for each group of warps.


@gluon.jit
def _key_load(
    signal, noise, dmap, queries, dmaps, ready, empty, row, group, group_here, half, block, start, steps, base, size,
    signal_group, signal_head, noise_group, RATIO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for i in range(gl.where(half == 1, 1, RATIO) * steps):
        head = half * RATIO + i // steps
        begin = start * 2 + i % steps
        line = begin // 2
        place = (group_here * (RATIO + 1) + head) * size + line * (line + 1) // 2 + block - base
        stage = i % STAGES
        barrier = ready.index(stage)
        second = line > block
        wait_room(empty, i, STAGES)
        if second:
            mbarrier.expect(barrier, signal.block_type.nbytes + 2 * dmap.block_type.nbytes)
        else:
            mbarrier.expect(barrier, signal.block_type.nbytes + dmap.block_type.nbytes)
        load_query(signal, noise, row, begin * 64, group, head, signal_group, signal_head, noise_group, barrier,
                    queries.index(stage), RATIO)  # fmt: skip
        row_of_block = begin % 2 * 64
        tma.async_copy_global_to_shared(dmap, [place, row_of_block, 0], barrier, dmaps.index(stage * 2))
        if second:
            tma.async_copy_global_to_shared(dmap, [place + 1, row_of_block, 0], barrier, dmaps.index(stage * 2 + 1))


@gluon.jit
def _key_sum(
    queries, dmaps, ready, empty, out_ptr, out_token, heads, block, steps, unseen, T, scale,
    PART: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`unseen`: the first steps of a head, in which no query sees this group of warps' keys."""
    i = 0
    total = gl.zeros([128, 128], gl.float32, mma_layout(128))
    for _head in range(heads):
        for _step in range(unseen * PART):
            wait_filled(ready, i, STAGES)
            mbarrier.arrive(empty.index(i % STAGES), count=1)
            i += 1
        for _step in range(unseen * PART, steps):
            wait_filled(ready, i, STAGES)
            dmap = tile_of(dmaps, i % STAGES * 2 + PART, 64, 128)
            total = warpgroup_mma(dmap.permute((1, 0)), tile_of(queries, i % STAGES, 64, 128), total, is_async=True)
            total = warpgroup_mma_wait(0, deps=[total])
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


@gluon.jit(
    do_not_specialize=["T", "num_groups", "first_group", "groups_here", "first_block", "blocks_here", "base", "size"]
)
def key_kernel(
    signal, noise, dmap, dkey_ptr, T, num_groups, first_group, groups_here, first_block, blocks_here, base, size,
    scale, signal_group, signal_head, noise_group, RATIO: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dkey (B, T, G, 2, D): sums of dS^T Q over the rows of blocks here, added to what is there if `ADD`.

    Grid: (2 * pairs of blocks of keys * groups_here,), the signal heads' keys first, then the noise heads'.
    """
    dtype: gl.constexpr = signal.dtype
    pairs = ((T + 127) // 128 + 1) // 2
    half = gl.program_id(0) // (pairs * groups_here)
    block = gl.program_id(0) // groups_here % pairs * 2
    group_here = gl.program_id(0) % groups_here
    row_and_group = first_group + group_here
    row, group = row_and_group // num_groups, row_and_group % num_groups
    start = gl.maximum(block, first_block)
    steps = gl.maximum(first_block + blocks_here - start, 0) * 2
    unseen = gl.minimum((gl.maximum(block + 1, first_block) - start) * 2, steps)
    heads = gl.where(half == 1, 1, RATIO)
    queries, dmaps = allocate_tiles(dtype, STAGES, 64, 128), allocate_tiles(dtype, 2 * STAGES, 64, 128)
    ready, empty = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    out_token = num_groups * 256
    out_ptr = dkey_ptr + row.to(gl.int64) * T * out_token + group * 256 + half * 128
    gl.warp_specialize(
        [
            (_key_sum, (queries, dmaps, ready, empty, out_ptr, out_token, heads, block, steps, unseen, T, scale,
                        0, ADD, STAGES)),
            (_key_sum, (queries, dmaps, ready, empty, out_ptr, out_token, heads, block, steps, unseen, T, scale,
                        1, ADD, STAGES)),
            (_key_load, (signal, noise, dmap, queries, dmaps, ready, empty, row, group, group_here, half, block,
                         start, steps, base, size, signal_group, signal_head, noise_group, RATIO, STAGES)),
        ],
        worker_num_warps=[4, 4], worker_num_regs=[240, 24],
    )  # fmt: skip
