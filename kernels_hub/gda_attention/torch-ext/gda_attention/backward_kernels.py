"""Triton kernels of the backward: through the epilogue; dQ by tiles of queries; dK and dV by tiles of keys.

Logits are computed again from the saved log-sum-exp, in base 2: once for dQ, which needs the logits' gradients dS, and
once for dV, which needs the maps alone. dS goes to a scratch in the type of the inputs, from where dK is a plain
product. So no pass holds more than one gradient in registers. Each gradient is summed by one program in a fixed order:
no atomics, results repeat bit for bit.

The scratch holds blocks of M queries and M keys, a head's after each other: row by row all of them, or with as many
queries as keys in causal order (TRIANGULAR) the `row + 1` that are seen. dS is made and used for a range of rows of
blocks of some groups at a time, so that the scratch stays small.

With DESCRIPTORS, what the inner loops of dQ's and dV's passes read, and where dQ's stores dS, are tensor descriptors
(of the copy engine, TMA), else pointers: descriptors need strides and addresses that are multiples of 16 bytes. Those
of queries, keys and values have five axes (row, token, group, head or half, D), those of the raw outputs' gradients
(row, token, head, half, D), the scratch's two.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension, M queries and keys of a block or
queries of a tile, N keys of a tile.
"""

import triton
import triton.language as tl

from .tiles import interval, key_runs, load_rows, load_tile, store_rows


@triton.jit(do_not_specialize=["num_queries"])
def epilogue_kernel(
    dout_ptr, raw_ptr, lambda_ptr, weight_ptr, draw_ptr, delta_ptr, dlambda_ptr, dweight_ptr,
    dout_row, dout_token, dout_group, dout_head, num_queries, num_groups, eps, out_scale,
    RATIO: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """draw (B, T, H, 2D) and delta (B, H, T); a program's shares of dlambda (P,) and dweight (P, 2D).

    Grid: (blocks of T, B * G). The H = G * (r + 1) heads are all groups' signal heads, then all groups' noise heads.
    The noise's gradient is minus lambda times the sum of the signals'.
    """
    WIDTH: tl.constexpr = 2 * DIM
    row = (tl.program_id(1) // num_groups).to(tl.int64)
    group = (tl.program_id(1) % num_groups).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = queries < num_queries
    token = num_groups * (RATIO + 1) * WIDTH
    raw_ptr += row * num_queries * token
    draw_ptr += row * num_queries * token
    dout_ptr += row * dout_row + group * dout_group
    delta_ptr += row * num_groups * (RATIO + 1) * num_queries
    first_signal, noise_head = group * RATIO, num_groups * RATIO + group
    noise_weight = tl.load(lambda_ptr).to(tl.float32)
    weight = (tl.load(weight_ptr + tl.arange(0, WIDTH)).to(tl.float32) * out_scale)[None, :]
    noise = load_rows(raw_ptr + noise_head * WIDTH, queries, token, num_queries, WIDTH, True).to(tl.float32)
    dsum = tl.zeros((BLOCK, WIDTH), tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    for head in tl.range(RATIO):
        signal_ptr = raw_ptr + (first_signal + head) * WIDTH
        signal = load_rows(signal_ptr, queries, token, num_queries, WIDTH, True).to(tl.float32)
        dout = load_rows(dout_ptr + head * dout_head, queries, dout_token, num_queries, WIDTH, True).to(tl.float32)
        difference = signal - noise_weight * noise
        inverse_rms = tl.rsqrt(tl.sum(difference * difference, 1) / WIDTH + eps)[:, None]
        normed = difference * inverse_rms
        dweight += tl.sum(dout * normed, 0)
        dnormed = dout * weight
        gradient = inverse_rms * (dnormed - normed * (tl.sum(dnormed * normed, 1) / WIDTH)[:, None])
        dsum += gradient
        rounded = gradient.to(draw_ptr.dtype.element_ty)
        store_rows(draw_ptr + (first_signal + head) * WIDTH, rounded, queries, token, num_queries, WIDTH)
        delta = tl.sum(rounded.to(tl.float32) * signal, 1)
        tl.store(delta_ptr + (first_signal + head) * num_queries + queries, delta, mask=inside)
    rounded = (-noise_weight * dsum).to(draw_ptr.dtype.element_ty)
    store_rows(draw_ptr + noise_head * WIDTH, rounded, queries, token, num_queries, WIDTH)
    delta = tl.sum(rounded.to(tl.float32) * noise, 1)
    tl.store(delta_ptr + noise_head * num_queries + queries, delta, mask=inside)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dlambda_ptr + program, -tl.sum(dsum * noise))
    tl.store(dweight_ptr + program * WIDTH + tl.arange(0, WIDTH), dweight * out_scale)


@triton.jit
def _block(i, j, base, blocks_of_keys, TRIANGULAR: tl.constexpr):
    """Number of the block of row `i` and column `j` in the scratch, which starts with number `base`."""
    if TRIANGULAR:
        return i * (i + 1) // 2 + j - base
    return i * blocks_of_keys + j - base


@triton.jit
def _descend(
    dquery, query, dlow_out, dhigh_out, lse, delta, key_source, low_source, high_source, dmap, block,
    row, group, half, key_stride, value_stride, start, end, first, last, num_keys, log2_scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `start` to `end` to the gradient of a tile of queries, and stores dS from `block` on."""
    inner = tl.arange(0, BLOCK_M)[:, None] * BLOCK_M + tl.arange(0, BLOCK_N)[None, :]  # (M, N)
    for begin in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        keys = begin + tl.arange(0, BLOCK_N)
        key = load_tile(
            key_source, row, begin, group, half, key_stride, num_keys, BLOCK_N, DIM, MASKED, DESCRIPTORS
        )  # (N, D)  # fmt: skip
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
        weights = tl.exp2(logits * log2_scale - lse[:, None])
        if MASKED:
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
            weights = tl.where(seen, weights, 0.0)
        low = load_tile(
            low_source, row, begin, group, 0, value_stride, num_keys, BLOCK_N, DIM, MASKED, DESCRIPTORS
        )  # fmt: skip
        dweights = tl.dot(dlow_out, tl.trans(low), input_precision=PRECISION)
        high = load_tile(
            high_source, row, begin, group, 1, value_stride, num_keys, BLOCK_N, DIM, MASKED, DESCRIPTORS
        )  # fmt: skip
        dweights = tl.dot(dhigh_out, tl.trans(high), dweights, input_precision=PRECISION)  # (M, N)
        dlogits = (weights * (dweights - delta[:, None])).to(query.dtype)
        dquery = tl.dot(dlogits, key, dquery, input_precision=PRECISION)
        if DESCRIPTORS:
            dmap.store([(block + begin // BLOCK_M) * BLOCK_M, begin % BLOCK_M], dlogits)
        else:
            place = (block + begin // BLOCK_M).to(tl.int64) * (BLOCK_M * BLOCK_M) + begin % BLOCK_M
            tl.store(dmap + place + inner, dlogits)
    return dquery


@triton.jit(do_not_specialize=["num_queries", "num_keys", "interval_stride", "first_group", "first_block", "base"])
def query_kernel(
    signal_ptr, noise_ptr, key_source, value_source, draw_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr,
    dmap, dsignal_ptr, dnoise_ptr,
    signal_row, signal_token, signal_group, signal_head, noise_row, noise_token, noise_group,
    key_row, key_token, key_group, key_half, value_row, value_token, value_group, value_half,
    num_queries, num_keys, num_groups, interval_stride, first_group, groups_here, first_block, blocks_here, base,
    blocks_a_head, log2_scale, scale,
    RATIO: tl.constexpr, HAS_INTERVALS: tl.constexpr, TRIANGULAR: tl.constexpr, DESCRIPTORS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dsignal (B, T, G, r, D), dnoise (B, T, G, D), and the blocks of dS that any of a tile's queries sees.

    Grid: (blocks_here * groups_here * (r + 1),), the last tile first. Groups count over all rows.
    """
    HEADS: tl.constexpr = RATIO + 1
    head = tl.program_id(0) % HEADS
    group_here = tl.program_id(0) // HEADS % groups_here
    tile = first_block + blocks_here - 1 - tl.program_id(0) // (HEADS * groups_here)
    row_and_group = first_group + group_here
    row = (row_and_group // num_groups).to(tl.int64)
    group = (row_and_group % num_groups).to(tl.int64)

    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = queries < num_queries
    first_ptr += row * interval_stride
    last_ptr += row * interval_stride
    first, last = interval(first_ptr, last_ptr, queries, num_queries, num_keys, HAS_INTERVALS)
    start, middle, middle_end, end = key_runs(first, last, num_keys, BLOCK_N)
    start = start // BLOCK_M * BLOCK_M  # whole blocks are stored
    end = (end + BLOCK_M - 1) // BLOCK_M * BLOCK_M

    query_ptr = signal_ptr + row * signal_row + group * signal_group + head * signal_head
    query_token = signal_token
    half, place = 0, group * RATIO + head
    if head == RATIO:
        query_ptr = noise_ptr + row * noise_row + group * noise_group
        query_token = noise_token
        half, place = 1, num_groups * RATIO + group
    query = load_rows(query_ptr, queries, query_token, num_queries, DIM, True)  # (M, D)
    draw_token = num_groups * HEADS * 2 * DIM
    draw_ptr += row * num_queries * draw_token + place * 2 * DIM
    dlow_out = load_rows(draw_ptr, queries, draw_token, num_queries, DIM, True)
    dhigh_out = load_rows(draw_ptr + DIM, queries, draw_token, num_queries, DIM, True)
    head_row = (row * num_groups * HEADS + place) * num_queries
    lse = tl.load(lse_ptr + head_row + queries, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + head_row + queries, mask=inside, other=0.0)
    low_source, high_source = value_source, value_source
    if not DESCRIPTORS:
        key_source += row * key_row + group * key_group + half * key_half
        low_source = value_source + row * value_row + group * value_group
        high_source = low_source + value_half
    block = (group_here * HEADS + head) * blocks_a_head + _block(tile, 0, base, tl.cdiv(num_keys, BLOCK_M), TRIANGULAR)
    row, group = row.to(tl.int32), group.to(tl.int32)
    dquery = tl.zeros((BLOCK_M, DIM), tl.float32)
    if HAS_INTERVALS:
        dquery = _descend(
            dquery, query, dlow_out, dhigh_out, lse, delta, key_source, low_source, high_source, dmap, block,
            row, group, half, key_token, value_token, start, tl.minimum(middle, end), first, last, num_keys,
            log2_scale, DIM, BLOCK_M, BLOCK_N, STAGES, PRECISION, DESCRIPTORS, True,
        )  # fmt: skip
    dquery = _descend(
        dquery, query, dlow_out, dhigh_out, lse, delta, key_source, low_source, high_source, dmap, block,
        row, group, half, key_token, value_token, middle, middle_end, first, last, num_keys,
        log2_scale, DIM, BLOCK_M, BLOCK_N, STAGES, PRECISION, DESCRIPTORS, False,
    )  # fmt: skip
    dquery = _descend(
        dquery, query, dlow_out, dhigh_out, lse, delta, key_source, low_source, high_source, dmap, block,
        row, group, half, key_token, value_token, middle_end, end, first, last, num_keys,
        log2_scale, DIM, BLOCK_M, BLOCK_N, STAGES, PRECISION, DESCRIPTORS, True,
    )  # fmt: skip
    out_row = row.to(tl.int64) * num_queries * num_groups * DIM
    out_ptr = dsignal_ptr + out_row * RATIO + (group * RATIO + head) * DIM
    out_token = num_groups * RATIO * DIM
    if head == RATIO:
        out_ptr = dnoise_ptr + out_row + group * DIM
        out_token = num_groups * DIM
    store_rows(out_ptr, dquery * scale, queries, out_token, num_queries, DIM)


@triton.jit
def _seen_from(
    tile, runs_ptr, row, tiles, num_queries, num_keys, interval_stride, EDGE: tl.constexpr, HAS_INTERVALS: tl.constexpr
):
    """The first query that sees any key of a tile, and the one after the last; equal where none does."""
    start, end = tl.maximum(tile * EDGE - (num_keys - num_queries), 0), num_queries
    if HAS_INTERVALS:
        runs_ptr += row * tl.where(interval_stride > 0, 2 * tiles, 0) + tile
        start = tl.load(runs_ptr)
        end = tl.load(runs_ptr + tiles)
    return start, tl.maximum(end, start)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "interval_stride", "first_group", "first_block", "base"])
def key_kernel(
    dmap_ptr, signal_ptr, noise_ptr, runs_ptr, dkey_ptr,
    signal_row, signal_token, signal_group, signal_head, noise_row, noise_token, noise_group,
    num_queries, num_keys, num_groups, interval_stride, first_group, groups_here, first_block, blocks_here, base,
    blocks_a_head, scale,
    RATIO: tl.constexpr, HAS_INTERVALS: tl.constexpr, TRIANGULAR: tl.constexpr, ADD: tl.constexpr,
    DIM: tl.constexpr, EDGE: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dkey (B, S, G, 2, D): sums of dS^T Q over the heads and queries here, added to what is there if `ADD`.

    Grid: (2 * blocks of keys * groups_here,), the signal heads' keys first, then the noise heads'. With intervals,
    `runs` (B or 1, 2, blocks of keys) tells which queries see a block of keys.
    """
    HEADS: tl.constexpr = RATIO + 1
    tiles = tl.cdiv(num_keys, EDGE)
    half = tl.program_id(0) // (tiles * groups_here)
    tile = tl.program_id(0) // groups_here % tiles
    group_here = tl.program_id(0) % groups_here
    row_and_group = first_group + group_here
    row = (row_and_group // num_groups).to(tl.int64)
    group = (row_and_group % num_groups).to(tl.int64)
    start, end = _seen_from(
        tile, runs_ptr, row, tiles, num_queries, num_keys, interval_stride, EDGE, HAS_INTERVALS
    )  # fmt: skip
    end = tl.where(end > start, tl.minimum(tl.cdiv(end, EDGE), first_block + blocks_here), 0)
    start = tl.maximum(start // EDGE, first_block)
    steps = tl.maximum(end - start, 0) * (EDGE // BLOCK_M)

    first_head = group_here * HEADS
    query_ptr = signal_ptr + row * signal_row + group * signal_group
    query_token, heads = signal_token, RATIO
    if half == 1:
        first_head += RATIO
        query_ptr = noise_ptr + row * noise_row + group * noise_group
        query_token, heads = noise_token, 1
    total = tl.zeros((EDGE, DIM), tl.float32)
    columns = tl.arange(0, EDGE)
    for step in tl.range(0, heads * steps, num_stages=STAGES):
        head = step // steps
        begin = start * EDGE + step % steps * BLOCK_M
        block = _block(begin // EDGE, tile, base, tiles, TRIANGULAR)
        rows = begin % EDGE + tl.arange(0, BLOCK_M)
        place = ((first_head + head) * blocks_a_head + block).to(tl.int64) * (EDGE * EDGE)
        dmap = tl.load(dmap_ptr + place + rows[:, None] * EDGE + columns[None, :])  # (M, EDGE)
        queries = begin + tl.arange(0, BLOCK_M)
        query = load_rows(query_ptr + head * signal_head, queries, query_token, num_queries, DIM, True)  # (M, D)
        total = tl.dot(tl.trans(dmap), query, total, input_precision=PRECISION)
    total *= scale
    keys = tile * EDGE + columns
    out_token = num_groups * 2 * DIM
    dkey_ptr += row * num_keys * out_token + group * 2 * DIM + half * DIM
    if ADD:
        total += load_rows(dkey_ptr, keys, out_token, num_keys, DIM, True)
    store_rows(dkey_ptr, total, keys, out_token, num_keys, DIM)


@triton.jit
def _collect(
    dlow, dhigh, key, keys, query_source, draw_source, lse_ptr, first_ptr, last_ptr, row, group, first_head,
    query_stride, query_head, draw_stride, start, steps, num_heads, num_queries, num_keys, log2_scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    HAS_INTERVALS: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds `steps` tiles of queries of each head, from `start` on, to the gradient of a tile of values."""
    for step in tl.range(0, num_heads * steps, num_stages=STAGES):
        head = step // steps
        begin = start + step % steps * BLOCK_M
        queries = begin + tl.arange(0, BLOCK_M)
        inside = queries < num_queries
        if DESCRIPTORS:
            query_here = query_source
            low_here, high_here = draw_source, draw_source
        else:
            query_here = query_source + head * query_head
            low_here = draw_source + (first_head + head) * 2 * DIM
            high_here = low_here + DIM
        query = load_tile(
            query_here, row, begin, group, head, query_stride, num_queries, BLOCK_M, DIM, True, DESCRIPTORS
        )  # (M, D)  # fmt: skip
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (N, M)
        lse = tl.load(lse_ptr + (first_head + head) * num_queries + queries, mask=inside, other=float("inf"))
        weights = tl.exp2(logits * log2_scale - lse[None, :])
        first, last = interval(first_ptr, last_ptr, queries, num_queries, num_keys, HAS_INTERVALS)
        seen = keys[:, None] <= last[None, :]
        if HAS_INTERVALS:
            seen = seen & (keys[:, None] >= first[None, :])
        weights = tl.where(seen, weights, 0.0).to(query.dtype)
        dlow_out = load_tile(
            low_here, row, begin, first_head + head, 0, draw_stride, num_queries, BLOCK_M, DIM, True, DESCRIPTORS
        )  # (M, D)  # fmt: skip
        dlow = tl.dot(weights, dlow_out, dlow, input_precision=PRECISION)
        dhigh_out = load_tile(
            high_here, row, begin, first_head + head, 1, draw_stride, num_queries, BLOCK_M, DIM, True, DESCRIPTORS
        )  # fmt: skip
        dhigh = tl.dot(weights, dhigh_out, dhigh, input_precision=PRECISION)
    return dlow, dhigh


@triton.jit(do_not_specialize=["num_queries", "num_keys", "interval_stride"])
def value_kernel(
    signal_source, noise_source, key_ptr, draw_source, lse_ptr, first_ptr, last_ptr, runs_ptr, dvalue_ptr,
    signal_row, signal_token, signal_group, signal_head, noise_row, noise_token, noise_group,
    key_row, key_token, key_group, key_half,
    num_queries, num_keys, num_groups, rows_and_groups, interval_stride, log2_scale,
    RATIO: tl.constexpr, HAS_INTERVALS: tl.constexpr, DESCRIPTORS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dvalue (B, S, G, 2, D).

    Grid: (tiles of keys * B * G,). With intervals, `runs` (B or 1, 2, tiles) tells which queries see a tile.
    """
    tiles = tl.cdiv(num_keys, BLOCK_N)
    tile = tl.program_id(0) // rows_and_groups
    row_and_group = tl.program_id(0) % rows_and_groups
    row, group = row_and_group // num_groups, row_and_group % num_groups
    wide_row, wide_group = row.to(tl.int64), group.to(tl.int64)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    start, end = _seen_from(
        tile, runs_ptr, row, tiles, num_queries, num_keys, interval_stride, BLOCK_N, HAS_INTERVALS
    )  # fmt: skip
    steps = tl.cdiv(end - start, BLOCK_M)
    first_ptr += wide_row * interval_stride
    last_ptr += wide_row * interval_stride
    key_ptr += wide_row * key_row + wide_group * key_group
    draw_token = num_groups * (RATIO + 1) * 2 * DIM
    if not DESCRIPTORS:
        draw_source += wide_row * num_queries * draw_token
        signal_source += wide_row * signal_row + wide_group * signal_group
        noise_source += wide_row * noise_row + wide_group * noise_group
    lse_ptr += wide_row * num_groups * (RATIO + 1) * num_queries
    dlow = tl.zeros((BLOCK_N, DIM), tl.float32)
    dhigh = tl.zeros((BLOCK_N, DIM), tl.float32)
    key = load_rows(key_ptr, keys, key_token, num_keys, DIM, True)  # (N, D)
    dlow, dhigh = _collect(
        dlow, dhigh, key, keys, signal_source, draw_source, lse_ptr, first_ptr, last_ptr, row, group, group * RATIO,
        signal_token, signal_head, draw_token, start, steps, RATIO, num_queries, num_keys, log2_scale,
        DIM, BLOCK_M, STAGES, PRECISION, HAS_INTERVALS, DESCRIPTORS,
    )  # fmt: skip
    key = load_rows(key_ptr + key_half, keys, key_token, num_keys, DIM, True)
    dlow, dhigh = _collect(
        dlow, dhigh, key, keys, noise_source, draw_source, lse_ptr, first_ptr, last_ptr,
        row, group, num_groups * RATIO + group,
        noise_token, 0, draw_token, start, steps, 1, num_queries, num_keys, log2_scale,
        DIM, BLOCK_M, STAGES, PRECISION, HAS_INTERVALS, DESCRIPTORS,
    )  # fmt: skip
    out_token = num_groups * 2 * DIM
    dvalue_ptr += wide_row * num_keys * out_token + group * 2 * DIM
    store_rows(dvalue_ptr, dlow, keys, out_token, num_keys, DIM)
    store_rows(dvalue_ptr + DIM, dhigh, keys, out_token, num_keys, DIM)
