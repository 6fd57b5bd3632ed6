"""Triton kernels of the backward: through the epilogue, then dK and dV by tiles of keys, then dQ by tiles of queries.

Every gradient is summed by one program in a fixed order: no atomics, results repeat bit for bit. Logits are computed
again from the saved log-sum-exp, in base 2.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension, M queries and N keys of a tile.
"""

import triton
import triton.language as tl

from .tiles import interval, key_runs, load_rows, store_rows


@triton.jit(do_not_specialize=["num_queries"])
def epilogue_kernel(
    dout_ptr, raw_ptr, lambda_ptr, weight_ptr, draw_ptr, delta_ptr, dlambda_ptr, dweight_ptr,
    dout_row, dout_token, dout_group, dout_head, num_queries, num_groups, eps, out_scale,
    RATIO: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """draw (B, T, G, r + 1, 2D) and delta (B, G, r + 1, T); a program's shares of dlambda (P,) and dweight (P, 2D).

    Grid: (blocks of T, B * G). The noise's gradient is minus lambda times the sum of the signals'.
    """
    WIDTH: tl.constexpr = 2 * DIM
    row = (tl.program_id(1) // num_groups).to(tl.int64)
    group = (tl.program_id(1) % num_groups).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = queries < num_queries
    token = num_groups * (RATIO + 1) * WIDTH
    offset = row * num_queries * token + group * (RATIO + 1) * WIDTH
    raw_ptr += offset
    draw_ptr += offset
    dout_ptr += row * dout_row + group * dout_group
    delta_ptr += tl.program_id(1).to(tl.int64) * (RATIO + 1) * num_queries
    noise_weight = tl.load(lambda_ptr).to(tl.float32)
    weight = (tl.load(weight_ptr + tl.arange(0, WIDTH)).to(tl.float32) * out_scale)[None, :]
    noise = load_rows(raw_ptr + RATIO * WIDTH, queries, token, num_queries, WIDTH, True).to(tl.float32)
    dsum = tl.zeros((BLOCK, WIDTH), tl.float32)
    dweight = tl.zeros((WIDTH,), tl.float32)
    for head in tl.range(RATIO):
        signal = load_rows(raw_ptr + head * WIDTH, queries, token, num_queries, WIDTH, True).to(tl.float32)
        dout = load_rows(dout_ptr + head * dout_head, queries, dout_token, num_queries, WIDTH, True).to(tl.float32)
        difference = signal - noise_weight * noise
        inverse_rms = tl.rsqrt(tl.sum(difference * difference, 1) / WIDTH + eps)[:, None]
        normed = difference * inverse_rms
        dweight += tl.sum(dout * normed, 0)
        dnormed = dout * weight
        gradient = inverse_rms * (dnormed - normed * (tl.sum(dnormed * normed, 1) / WIDTH)[:, None])
        dsum += gradient
        rounded = gradient.to(draw_ptr.dtype.element_ty)
        store_rows(draw_ptr + head * WIDTH, rounded, queries, token, num_queries, WIDTH)
        delta = tl.sum(rounded.to(tl.float32) * signal, 1)
        tl.store(delta_ptr + head * num_queries + queries, delta, mask=inside)
    rounded = (-noise_weight * dsum).to(draw_ptr.dtype.element_ty)
    store_rows(draw_ptr + RATIO * WIDTH, rounded, queries, token, num_queries, WIDTH)
    delta = tl.sum(rounded.to(tl.float32) * noise, 1)
    tl.store(delta_ptr + RATIO * num_queries + queries, delta, mask=inside)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(dlambda_ptr + program, -tl.sum(dsum * noise))
    tl.store(dweight_ptr + program * WIDTH + tl.arange(0, WIDTH), dweight * out_scale)


@triton.jit
def _collect(
    dkey, dlow, dhigh, key, low, high, keys, query_ptr, draw_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr,
    query_stride, draw_stride, start, end, num_queries, num_keys, log2_scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
    HAS_INTERVALS: tl.constexpr,
):  # fmt: skip
    """Adds one head's queries from `start` to `end` to the gradients of a tile of keys and values.

    Every tile is masked: with a second loop, free of masks, the compiler spilled five times as many registers.
    """
    for begin in tl.range(start, end, BLOCK_M, num_stages=STAGES):
        queries = begin + tl.arange(0, BLOCK_M)
        inside = queries < num_queries
        query = load_rows(query_ptr, queries, query_stride, num_queries, DIM, True)  # (M, D)
        logits = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # (N, M)
        lse = tl.load(lse_ptr + queries, mask=inside, other=float("inf"))
        weights = tl.exp2(logits * log2_scale - lse[None, :])
        first, last = interval(first_ptr, last_ptr, queries, num_queries, num_keys, HAS_INTERVALS)
        seen = keys[:, None] <= last[None, :]
        if HAS_INTERVALS:
            seen = seen & (keys[:, None] >= first[None, :])
        weights = tl.where(seen, weights, 0.0)
        dlow_out = load_rows(draw_ptr, queries, draw_stride, num_queries, DIM, True)  # (M, D)
        dhigh_out = load_rows(draw_ptr + DIM, queries, draw_stride, num_queries, DIM, True)
        rounded = weights.to(query.dtype)
        dlow = tl.dot(rounded, dlow_out, dlow, input_precision=PRECISION)
        dhigh = tl.dot(rounded, dhigh_out, dhigh, input_precision=PRECISION)
        dweights = tl.dot(low, tl.trans(dlow_out), input_precision=PRECISION)
        dweights = tl.dot(high, tl.trans(dhigh_out), dweights, input_precision=PRECISION)  # (N, M)
        delta = tl.load(delta_ptr + queries, mask=inside, other=0.0)
        dlogits = weights * (dweights - delta[None, :])
        dkey = tl.dot(dlogits.to(query.dtype), query, dkey, input_precision=PRECISION)
    return dkey, dlow, dhigh


@triton.jit(do_not_specialize=["num_queries", "num_keys", "interval_stride"])
def key_value_kernel(
    signal_ptr, noise_ptr, key_ptr, value_ptr, draw_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, runs_ptr,
    dkey_ptr, dvalue_ptr,
    signal_row, signal_token, signal_group, signal_head, noise_row, noise_token, noise_group,
    key_row, key_token, key_group, key_half, value_row, value_token, value_group, value_half,
    num_queries, num_keys, num_groups, interval_stride, log2_scale, scale,
    RATIO: tl.constexpr, HAS_INTERVALS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dkey and dvalue (B, S, G, 2, D).

    Grid: (B * G * tiles of keys,). With intervals, `runs` (B or 1, 2, tiles) tells which queries see a tile.
    """
    tiles = tl.cdiv(num_keys, BLOCK_N)
    tile = tl.program_id(0) % tiles
    row_and_group = tl.program_id(0) // tiles
    row = (row_and_group // num_groups).to(tl.int64)
    group = (row_and_group % num_groups).to(tl.int64)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first_ptr += row * interval_stride
    last_ptr += row * interval_stride
    if HAS_INTERVALS:
        runs_ptr += row * tl.where(interval_stride > 0, 2 * tiles, 0) + tile
        start = tl.load(runs_ptr) // BLOCK_M * BLOCK_M
        end = tl.load(runs_ptr + tiles)
    else:
        start = tl.maximum(tile * BLOCK_N - (num_keys - num_queries), 0) // BLOCK_M * BLOCK_M
        end = num_queries

    key_ptr += row * key_row + group * key_group
    value_ptr += row * value_row + group * value_group
    low = load_rows(value_ptr, keys, value_token, num_keys, DIM, True)  # (N, D)
    high = load_rows(value_ptr + value_half, keys, value_token, num_keys, DIM, True)
    draw_token = num_groups * (RATIO + 1) * 2 * DIM
    draw_ptr += row * num_queries * draw_token + group * (RATIO + 1) * 2 * DIM
    lse_ptr += row_and_group.to(tl.int64) * (RATIO + 1) * num_queries
    delta_ptr += row_and_group.to(tl.int64) * (RATIO + 1) * num_queries
    out_token = num_groups * 2 * DIM
    offset = row * num_keys * out_token + group * 2 * DIM

    signal_ptr += row * signal_row + group * signal_group
    key = load_rows(key_ptr, keys, key_token, num_keys, DIM, True)
    dkey = tl.zeros((BLOCK_N, DIM), tl.float32)
    dlow = tl.zeros((BLOCK_N, DIM), tl.float32)
    dhigh = tl.zeros((BLOCK_N, DIM), tl.float32)
    for head in tl.range(RATIO, num_stages=1):
        dkey, dlow, dhigh = _collect(
            dkey, dlow, dhigh, key, low, high, keys, signal_ptr + head * signal_head, draw_ptr + head * 2 * DIM,
            lse_ptr + head * num_queries, delta_ptr + head * num_queries, first_ptr, last_ptr,
            signal_token, draw_token, start, end, num_queries, num_keys, log2_scale,
            DIM, BLOCK_M, STAGES, PRECISION, HAS_INTERVALS,
        )  # fmt: skip
    store_rows(dkey_ptr + offset, dkey * scale, keys, out_token, num_keys, DIM)
    key = load_rows(key_ptr + key_half, keys, key_token, num_keys, DIM, True)
    dkey = tl.zeros((BLOCK_N, DIM), tl.float32)
    dkey, dlow, dhigh = _collect(
        dkey, dlow, dhigh, key, low, high, keys, noise_ptr + row * noise_row + group * noise_group,
        draw_ptr + RATIO * 2 * DIM, lse_ptr + RATIO * num_queries, delta_ptr + RATIO * num_queries,
        first_ptr, last_ptr,
        noise_token, draw_token, start, end, num_queries, num_keys, log2_scale,
        DIM, BLOCK_M, STAGES, PRECISION, HAS_INTERVALS,
    )  # fmt: skip
    store_rows(dkey_ptr + offset + DIM, dkey * scale, keys, out_token, num_keys, DIM)
    store_rows(dvalue_ptr + offset, dlow, keys, out_token, num_keys, DIM)
    store_rows(dvalue_ptr + offset + DIM, dhigh, keys, out_token, num_keys, DIM)


@triton.jit
def _descend(
    dquery, query, dlow_out, dhigh_out, lse, delta, key_ptr, low_ptr, high_ptr, key_stride, value_stride,
    start, end, first, last, num_keys, log2_scale,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the keys from `start` to `end` to the gradient of a tile of queries."""
    for begin in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        keys = begin + tl.arange(0, BLOCK_N)
        key = load_rows(key_ptr, keys, key_stride, num_keys, DIM, MASKED)  # (N, D)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
        weights = tl.exp2(logits * log2_scale - lse[:, None])
        if MASKED:
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
            weights = tl.where(seen, weights, 0.0)
        low = load_rows(low_ptr, keys, value_stride, num_keys, DIM, MASKED)
        high = load_rows(high_ptr, keys, value_stride, num_keys, DIM, MASKED)
        dweights = tl.dot(dlow_out, tl.trans(low), input_precision=PRECISION)
        dweights = tl.dot(dhigh_out, tl.trans(high), dweights, input_precision=PRECISION)  # (M, N)
        dlogits = weights * (dweights - delta[:, None])
        dquery = tl.dot(dlogits.to(query.dtype), key, dquery, input_precision=PRECISION)
    return dquery


@triton.jit(do_not_specialize=["num_queries", "num_keys", "interval_stride"])
def query_kernel(
    query_ptr, key_ptr, value_ptr, draw_ptr, lse_ptr, delta_ptr, first_ptr, last_ptr, dquery_ptr,
    query_row, query_token, query_group, query_head,
    key_row, key_token, key_group, key_half, value_row, value_token, value_group, value_half,
    num_queries, num_keys, num_groups, interval_stride, log2_scale, scale,
    RATIO: tl.constexpr, NOISE: tl.constexpr, HAS_INTERVALS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dquery (B, T, G, heads, D) of the signal heads, or of the noise heads where `NOISE`; grid as in the forward."""
    HEADS: tl.constexpr = 1 if NOISE else RATIO
    tiles = tl.cdiv(num_queries, BLOCK_M)
    head = tl.program_id(0) % HEADS
    tile = tiles - 1 - tl.program_id(0) // HEADS % tiles
    row_and_group = tl.program_id(0) // (HEADS * tiles)
    row = (row_and_group // num_groups).to(tl.int64)
    group = (row_and_group % num_groups).to(tl.int64)
    head_of_all = RATIO if NOISE else head

    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = queries < num_queries
    first_ptr += row * interval_stride
    last_ptr += row * interval_stride
    first, last = interval(first_ptr, last_ptr, queries, num_queries, num_keys, HAS_INTERVALS)
    start, middle, middle_end, end = key_runs(first, last, num_keys, BLOCK_N)
    query_ptr += row * query_row + group * query_group + head * query_head
    query = load_rows(query_ptr, queries, query_token, num_queries, DIM, True)  # (M, D)
    draw_token = num_groups * (RATIO + 1) * 2 * DIM
    draw_ptr += row * num_queries * draw_token + (group * (RATIO + 1) + head_of_all) * 2 * DIM
    dlow_out = load_rows(draw_ptr, queries, draw_token, num_queries, DIM, True)
    dhigh_out = load_rows(draw_ptr + DIM, queries, draw_token, num_queries, DIM, True)
    head_row = (row_and_group.to(tl.int64) * (RATIO + 1) + head_of_all) * num_queries
    lse = tl.load(lse_ptr + head_row + queries, mask=inside, other=float("inf"))
    delta = tl.load(delta_ptr + head_row + queries, mask=inside, other=0.0)
    key_ptr += row * key_row + group * key_group + (key_half if NOISE else 0)
    low_ptr = value_ptr + row * value_row + group * value_group
    high_ptr = low_ptr + value_half
    dquery = tl.zeros((BLOCK_M, DIM), tl.float32)
    if HAS_INTERVALS:
        dquery = _descend(
            dquery, query, dlow_out, dhigh_out, lse, delta, key_ptr, low_ptr, high_ptr, key_token, value_token,
            start, tl.minimum(middle, end), first, last, num_keys, log2_scale,
            DIM, BLOCK_N, STAGES, PRECISION, True,
        )  # fmt: skip
    dquery = _descend(
        dquery, query, dlow_out, dhigh_out, lse, delta, key_ptr, low_ptr, high_ptr, key_token, value_token,
        middle, middle_end, first, last, num_keys, log2_scale, DIM, BLOCK_N, STAGES, PRECISION, False,
    )  # fmt: skip
    dquery = _descend(
        dquery, query, dlow_out, dhigh_out, lse, delta, key_ptr, low_ptr, high_ptr, key_token, value_token,
        middle_end, end, first, last, num_keys, log2_scale, DIM, BLOCK_N, STAGES, PRECISION, True,
    )  # fmt: skip
    out_token = num_groups * HEADS * DIM
    dquery_ptr += row * num_queries * out_token + (group * HEADS + head) * DIM
    store_rows(dquery_ptr, dquery * scale, queries, out_token, num_queries, DIM)
