"""Gluon kernel of the forward on Hopper: as many queries as keys, heads of 128, 16-bit elements.

Like `forward_kernels.py` it runs for the noise heads and then for the signal heads, whose epilogue reads the noise's
outputs. Roles of warps, and what the compiler needs, as in `hopper_query.py`. Logits are in base 2. Shapes: B rows,
T queries and keys, G groups, r signal heads a group, D = 128, H = G * (r + 1) heads, the signal heads of all groups
and then the noise heads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from .hopper_tiles import (
    allocate_barriers,
    allocate_tiles,
    bounds_of,
    head_of_all,
    keys_of,
    left_layout,
    mma_layout,
    start_scores,
    tile_of,
    wait_filled,
    wait_room,
)


@gluon.constexpr_function
def _lines():
    """(64, 256) with 8 adjacent columns a thread, 64 bytes a row and instruction: for loads and stores."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [0, 64], [0, 128], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )


@gluon.jit
def _places(pointer, first_row, token):
    """Addresses of rows of 256 from `first_row` on, `token` elements apart, and the rows."""
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, _lines()))
    columns = gl.arange(0, 256, gl.SliceLayout(0, _lines()))
    return gl.multiple_of(pointer + rows[:, None] * token + columns[None, :], [16, 16]), rows


@gluon.jit
def _store_lines(pointer, tile, first_row, token, T):
    places, rows = _places(pointer, first_row, token)
    gl.store(places, gl.convert_layout(tile, _lines()), mask=(rows < T)[:, None])


@gluon.jit
def _load(
    query, key, value, queries, keys, values, queries_ready, keys_ready, keys_empty, values_ready, values_empty,
    row, query_column, key_column, value_column, tile, start, steps,
    BLOCK_N: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(queries_ready, 2 * query.block_type.nbytes)
    for part in gl.static_range(2):
        place = [row, tile * 128 + part * 64, query_column]
        tma.async_copy_global_to_shared(query, place, queries_ready, queries.index(part))
    for j in range(steps):
        begin = start + j * BLOCK_N
        barrier = keys_ready.index(j % KEY_STAGES)
        wait_room(keys_empty, j, KEY_STAGES)
        mbarrier.expect(barrier, key.block_type.nbytes)
        tma.async_copy_global_to_shared(key, [row, begin, key_column], barrier, keys.index(j % KEY_STAGES))
        barrier = values_ready.index(j % VALUE_STAGES)
        wait_room(values_empty, j, VALUE_STAGES)
        mbarrier.expect(barrier, value.block_type.nbytes)
        tma.async_copy_global_to_shared(value, [row, begin, value_column], barrier, values.index(j % VALUE_STAGES))


@gluon.jit
def _softmax(
    logits, largest, first, last, begin, all_from, all_to, log2_scale,
    BLOCK_N: gl.constexpr, HAS_INTERVALS: gl.constexpr,
):  # fmt: skip
    """Weights (64, N), their sums, the decay of former ones, the new maxima.

    A query sees the keys from `first` to `last`, all queries here those from `all_from` to `all_to`.
    """
    if (begin < all_from) | (begin + BLOCK_N - 1 > all_to):
        keys = begin + gl.arange(0, BLOCK_N, gl.SliceLayout(0, mma_layout(BLOCK_N)))
        seen = keys[None, :] <= last[:, None]
        if HAS_INTERVALS:
            seen &= keys[None, :] >= first[:, None]
        logits = gl.where(seen, logits, -float("inf"))
    raised = gl.maximum(largest, gl.max(logits, 1) * log2_scale)
    shift = raised
    if HAS_INTERVALS:  # a query that has seen no key yet
        shift = gl.where(raised == -float("inf"), 0.0, raised)
    weights = gl.exp2(logits * log2_scale - shift[:, None])
    return weights, gl.sum(weights, 1), gl.exp2(largest - shift), raised


@gluon.jit
def _attend(
    queries, keys, values, queries_ready, keys_ready, keys_empty, values_ready, values_empty,
    noise_ptr, raw_ptr, raw_token, out_ptr, out_token, lse_ptr, largest_ptr, lambda_ptr, weight_ptr,
    first_ptr, last_ptr, tile, start, steps, T, log2_scale, eps, out_scale,
    PART: gl.constexpr, NOISE: gl.constexpr, SAVE_RAW: gl.constexpr, HAS_INTERVALS: gl.constexpr,
    BLOCK_N: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = queries.dtype
    LINE: gl.constexpr = gl.SliceLayout(1, mma_layout(256))
    first_row = tile * 128 + PART * 64
    final = steps - 1
    rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, mma_layout(BLOCK_N)))
    first, last, all_from, all_to = bounds_of(first_ptr, last_ptr, rows, first_row, T, HAS_INTERVALS)
    query = tile_of(queries, PART, 64, 128)
    out = gl.zeros([64, 256], gl.float32, mma_layout(256))
    largest = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, mma_layout(BLOCK_N)))
    mbarrier.wait(queries_ready, 0)
    wait_filled(keys_ready, 0, KEY_STAGES)
    logits = start_scores(query, tile_of(keys, 0, BLOCK_N, 128), BLOCK_N)
    logits = warpgroup_mma_wait(0, deps=[logits])
    mbarrier.arrive(keys_empty.index(0), count=1)
    weights, total, decay, largest = _softmax(
        logits, largest, first, last, start, all_from, all_to, log2_scale, BLOCK_N, HAS_INTERVALS
    )  # fmt: skip
    left = gl.convert_layout(weights.to(dtype), left_layout(256))
    wait_filled(keys_ready, gl.minimum(1, final), KEY_STAGES)
    wait_filled(values_ready, 0, VALUE_STAGES)
    for j in range(final):
        logits = start_scores(query, tile_of(keys, (j + 1) % KEY_STAGES, BLOCK_N, 128), BLOCK_N)
        out = warpgroup_mma(left, tile_of(values, j % VALUE_STAGES, BLOCK_N, 256), out, is_async=True)
        logits = warpgroup_mma_wait(1, deps=[logits])
        mbarrier.arrive(keys_empty.index((j + 1) % KEY_STAGES), count=1)
        weights, here, decay, largest = _softmax(
            logits, largest, first, last, start + (j + 1) * BLOCK_N, all_from, all_to, log2_scale,
            BLOCK_N, HAS_INTERVALS,
        )  # fmt: skip
        total = total * decay + here
        wait_filled(keys_ready, gl.minimum(j + 2, final), KEY_STAGES)
        wait_filled(values_ready, j + 1, VALUE_STAGES)  # here, so that the exponentials stay before the next wait
        out = warpgroup_mma_wait(0, deps=[out])
        mbarrier.arrive(values_empty.index(j % VALUE_STAGES), count=1)
        out = out * gl.convert_layout(decay, LINE)[:, None]
        left = gl.convert_layout(weights.to(dtype), left_layout(256))
    out = warpgroup_mma(left, tile_of(values, final % VALUE_STAGES, BLOCK_N, 256), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[out])

    gl.store(lse_ptr + rows, gl.where(total > 0, largest + gl.log2(total), float("inf")), mask=rows < T)
    gl.store(largest_ptr + tile * 2 + PART, gl.max(gl.where(rows < T, largest, -float("inf")), 0))
    out = out * gl.convert_layout(gl.where(total > 0, 1 / total, 0.0), LINE)[:, None]
    if NOISE:
        _store_lines(noise_ptr, out.to(dtype), first_row, raw_token, T)
    else:
        if SAVE_RAW:
            _store_lines(raw_ptr, out.to(dtype), first_row, raw_token, T)
        places, lines = _places(noise_ptr, first_row, raw_token)
        noise = gl.convert_layout(gl.load(places, mask=(lines < T)[:, None], other=0.0), mma_layout(256))
        out -= gl.load(lambda_ptr).to(gl.float32) * noise.to(gl.float32)
        inverse_rms = gl.rsqrt(gl.sum(out * out, 1) / 256 + eps) * out_scale
        columns = gl.arange(0, 256, gl.SliceLayout(0, mma_layout(256)))
        out = out * inverse_rms[:, None] * gl.load(weight_ptr + columns).to(gl.float32)[None, :]
        _store_lines(out_ptr, out.to(dtype), first_row, out_token, T)


@gluon.jit(do_not_specialize=["T", "num_groups", "rows_and_groups", "raw_signals", "interval_stride"])
def forward_kernel(
    query, key, value, lambda_ptr, weight_ptr, first_ptr, last_ptr, raw_ptr, out_ptr, lse_ptr, largest_ptr,
    query_group, query_head, key_group, key_half, value_group,
    T, num_groups, rows_and_groups, interval_stride, raw_signals, log2_scale, eps, out_scale,
    RATIO: gl.constexpr, NOISE: gl.constexpr, SAVE_RAW: gl.constexpr, HAS_INTERVALS: gl.constexpr,
    BLOCK_N: gl.constexpr, KEY_STAGES: gl.constexpr, VALUE_STAGES: gl.constexpr,
):  # fmt: skip
    """raw (B, T, raw_signals + G, 2D), lse (B, H, T), largest (B, H, 2 * tiles) and out (B, T, G, r, 2D).

    Grid: (B * G * tiles * heads,), the longest tiles first.
    """
    HEADS: gl.constexpr = 1 if NOISE else RATIO
    dtype: gl.constexpr = query.dtype
    tiles = (T + 127) // 128
    head = gl.program_id(0) % HEADS
    row_and_group = gl.program_id(0) // HEADS % rows_and_groups
    tile = tiles - 1 - gl.program_id(0) // (HEADS * rows_and_groups)
    row, group = row_and_group // num_groups, row_and_group % num_groups
    start, steps = 0, (tile + 1) * (128 // BLOCK_N)
    if HAS_INTERVALS:
        first_ptr += row * interval_stride
        last_ptr += row * interval_stride
        start, end = keys_of(first_ptr, last_ptr, tile, T, BLOCK_N)
        steps = (end - start) // BLOCK_N
    queries, keys = allocate_tiles(dtype, 2, 64, 128), allocate_tiles(dtype, KEY_STAGES, BLOCK_N, 128)
    values = allocate_tiles(dtype, VALUE_STAGES, BLOCK_N, 256)
    queries_ready = allocate_barriers(1, 1).index(0)
    keys_ready, keys_empty = allocate_barriers(KEY_STAGES, 1), allocate_barriers(KEY_STAGES, 2)
    values_ready, values_empty = allocate_barriers(VALUE_STAGES, 1), allocate_barriers(VALUE_STAGES, 2)
    place = head_of_all(group, RATIO if NOISE else head, num_groups, RATIO)
    head_row = row.to(gl.int64) * num_groups * (RATIO + 1) + place
    lse_ptr += head_row * T
    largest_ptr += head_row * tiles * 2
    raw_token = (raw_signals + num_groups) * 256
    raw_ptr += row.to(gl.int64) * T * raw_token
    noise_ptr = raw_ptr + (raw_signals + group) * 256
    raw_ptr += place * 256
    out_token = num_groups * RATIO * 256
    out_ptr += row.to(gl.int64) * T * out_token + (group * RATIO + head) * 256
    query_column = group * query_group + head * query_head
    key_column = group * key_group + (key_half if NOISE else 0)
    gl.warp_specialize(
        [
            (_attend, (queries, keys, values, queries_ready, keys_ready, keys_empty, values_ready, values_empty,
                       noise_ptr, raw_ptr, raw_token, out_ptr, out_token, lse_ptr, largest_ptr, lambda_ptr, weight_ptr,
                       first_ptr, last_ptr, tile, start, steps, T, log2_scale, eps, out_scale,
                       0, NOISE, SAVE_RAW, HAS_INTERVALS, BLOCK_N, KEY_STAGES, VALUE_STAGES)),
            (_attend, (queries, keys, values, queries_ready, keys_ready, keys_empty, values_ready, values_empty,
                       noise_ptr, raw_ptr, raw_token, out_ptr, out_token, lse_ptr, largest_ptr, lambda_ptr, weight_ptr,
                       first_ptr, last_ptr, tile, start, steps, T, log2_scale, eps, out_scale,
                       1, NOISE, SAVE_RAW, HAS_INTERVALS, BLOCK_N, KEY_STAGES, VALUE_STAGES)),
            (_load, (query, key, value, queries, keys, values, queries_ready, keys_ready, keys_empty, values_ready,
                     values_empty, row, query_column, key_column, group * value_group, tile, start, steps, BLOCK_N,
                     KEY_STAGES, VALUE_STAGES)),
        ],
        worker_num_warps=[4, 4], worker_num_regs=[240, 24],
    )  # fmt: skip
