"""Triton kernel of the forward: one pass over the scores for a value twice as wide as the key, epilogue included.

The same kernel runs twice: first the noise heads, whose outputs are stored, then the signal heads, which subtract
lambda times those and norm the difference. Raw outputs and statistics have H = G * (r + 1) heads, the signal heads of
all groups first, then the noise heads.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension, M queries and N keys of a tile.
Logits are in base 2. Sums have a fixed order: results repeat bit for bit.
"""

import triton
import triton.language as tl

from .tiles import interval, key_runs, load_rows, store_rows


@triton.jit
def _attend(
    low, high, largest, total, query, key_ptr, low_ptr, high_ptr, key_stride, value_stride,
    start, end, first, last, num_keys, log2_scale,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the keys from `start` to `end` into the running softmax; the two halves of the value share the map."""
    for begin in tl.range(start, end, BLOCK_N, num_stages=STAGES):
        keys = begin + tl.arange(0, BLOCK_N)
        key = load_rows(key_ptr, keys, key_stride, num_keys, DIM, MASKED)  # (N, D)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # (M, N)
        if MASKED:
            seen = (keys[None, :] >= first[:, None]) & (keys[None, :] <= last[:, None])
            logits = tl.where(seen, logits, -float("inf"))
        raised = tl.maximum(largest, tl.max(logits, 1) * log2_scale)
        shift = raised
        if MASKED:  # a query that has seen no key yet
            shift = tl.where(raised == -float("inf"), 0.0, raised)
        weights = tl.exp2(logits * log2_scale - shift[:, None])
        decay = tl.exp2(largest - shift)
        total = total * decay + tl.sum(weights, 1)
        largest = raised
        weights = weights.to(query.dtype)
        low_value = load_rows(low_ptr, keys, value_stride, num_keys, DIM, MASKED)  # (N, D)
        low = tl.dot(weights, low_value, low * decay[:, None], input_precision=PRECISION)
        high_value = load_rows(high_ptr, keys, value_stride, num_keys, DIM, MASKED)  # (N, D)
        high = tl.dot(weights, high_value, high * decay[:, None], input_precision=PRECISION)
    return low, high, largest, total


@triton.jit(do_not_specialize=["num_queries", "num_keys", "interval_stride"])
def forward_kernel(
    query_ptr, key_ptr, value_ptr, lambda_ptr, weight_ptr, first_ptr, last_ptr, raw_ptr, out_ptr, lse_ptr, largest_ptr,
    query_row, query_token, query_group, query_head,
    key_row, key_token, key_group, key_half, value_row, value_token, value_group, value_half,
    num_queries, num_keys, num_groups, interval_stride, raw_signals, log2_scale, eps, out_scale,
    RATIO: tl.constexpr, NOISE: tl.constexpr, SAVE_RAW: tl.constexpr, HAS_INTERVALS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """raw (B, T, raw_signals + G, 2D), lse (B, H, T), largest (B, H, tiles) and out (B, T, G, r, 2D).

    Grid: (B * G * tiles * heads,), a group's heads next to each other, its longest tile first. `NOISE` runs the noise
    heads alone and leaves `out`, the other run reads them; it stores its own raw outputs, G * r heads, if `SAVE_RAW`.
    """
    HEADS: tl.constexpr = 1 if NOISE else RATIO
    tiles = tl.cdiv(num_queries, BLOCK_M)
    head = tl.program_id(0) % HEADS
    tile = tiles - 1 - tl.program_id(0) // HEADS % tiles
    row_and_group = tl.program_id(0) // (HEADS * tiles)
    row = (row_and_group // num_groups).to(tl.int64)
    group = (row_and_group % num_groups).to(tl.int64)

    queries = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    first_ptr += row * interval_stride
    last_ptr += row * interval_stride
    first, last = interval(first_ptr, last_ptr, queries, num_queries, num_keys, HAS_INTERVALS)
    start, middle, middle_end, end = key_runs(first, last, num_keys, BLOCK_N)

    query_ptr += row * query_row + group * query_group + head * query_head
    query = load_rows(query_ptr, queries, query_token, num_queries, DIM, True)  # (M, D)
    key_ptr += row * key_row + group * key_group + (key_half if NOISE else 0)
    low_ptr = value_ptr + row * value_row + group * value_group
    high_ptr = low_ptr + value_half
    low = tl.zeros((BLOCK_M, DIM), tl.float32)
    high = tl.zeros((BLOCK_M, DIM), tl.float32)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_INTERVALS:
        low, high, largest, total = _attend(
            low, high, largest, total, query, key_ptr, low_ptr, high_ptr, key_token, value_token,
            start, tl.minimum(middle, end), first, last, num_keys, log2_scale,
            DIM, BLOCK_N, STAGES, PRECISION, True,
        )  # fmt: skip
    low, high, largest, total = _attend(
        low, high, largest, total, query, key_ptr, low_ptr, high_ptr, key_token, value_token,
        middle, middle_end, first, last, num_keys, log2_scale, DIM, BLOCK_N, STAGES, PRECISION, False,
    )  # fmt: skip
    low, high, largest, total = _attend(
        low, high, largest, total, query, key_ptr, low_ptr, high_ptr, key_token, value_token,
        middle_end, end, first, last, num_keys, log2_scale, DIM, BLOCK_N, STAGES, PRECISION, True,
    )  # fmt: skip

    place = num_groups * RATIO + group if NOISE else group * RATIO + head
    head_row = row * num_groups * (RATIO + 1) + place
    inside = queries < num_queries
    lse = tl.where(total > 0, largest + tl.log2(total), float("inf"))
    tl.store(lse_ptr + head_row * num_queries + queries, lse, mask=inside)
    tl.store(largest_ptr + head_row * tiles + tile, tl.max(tl.where(inside, largest, -float("inf")), 0))
    inverse = tl.where(total > 0, 1 / total, 0.0)
    low *= inverse[:, None]
    high *= inverse[:, None]

    raw_token = (raw_signals + num_groups) * 2 * DIM
    raw_ptr += row * num_queries * raw_token
    noise_ptr = raw_ptr + (raw_signals + group) * 2 * DIM
    if NOISE:
        store_rows(noise_ptr, low, queries, raw_token, num_queries, DIM)
        store_rows(noise_ptr + DIM, high, queries, raw_token, num_queries, DIM)
    else:
        if SAVE_RAW:
            signal_ptr = raw_ptr + place * 2 * DIM
            store_rows(signal_ptr, low, queries, raw_token, num_queries, DIM)
            store_rows(signal_ptr + DIM, high, queries, raw_token, num_queries, DIM)
        noise_weight = tl.load(lambda_ptr).to(tl.float32)
        low -= noise_weight * load_rows(noise_ptr, queries, raw_token, num_queries, DIM, True).to(tl.float32)
        high -= noise_weight * load_rows(noise_ptr + DIM, queries, raw_token, num_queries, DIM, True).to(tl.float32)
        mean_square = (tl.sum(low * low, 1) + tl.sum(high * high, 1)) / (2 * DIM)
        inverse_rms = (tl.rsqrt(mean_square + eps) * out_scale)[:, None]
        columns = tl.arange(0, DIM)
        low *= inverse_rms * tl.load(weight_ptr + columns).to(tl.float32)[None, :]
        high *= inverse_rms * tl.load(weight_ptr + DIM + columns).to(tl.float32)[None, :]
        out_token = num_groups * RATIO * 2 * DIM
        out_ptr += row * num_queries * out_token + (group * RATIO + head) * 2 * DIM
        store_rows(out_ptr, low, queries, out_token, num_queries, DIM)
        store_rows(out_ptr + DIM, high, queries, out_token, num_queries, DIM)


@triton.jit(do_not_specialize=["num_queries"])
def finish_kernel(
    raw_ptr, lambda_ptr, weight_ptr, out_ptr, num_queries, num_groups, eps, out_scale,
    RATIO: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (B, T, G, r, 2D) from raw (B, T, H, 2D): the epilogue alone. Grid: (blocks of T, B * G)."""
    WIDTH: tl.constexpr = 2 * DIM
    row = (tl.program_id(1) // num_groups).to(tl.int64)
    group = (tl.program_id(1) % num_groups).to(tl.int64)
    queries = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    raw_token, out_token = num_groups * (RATIO + 1) * WIDTH, num_groups * RATIO * WIDTH
    raw_ptr += row * num_queries * raw_token
    out_ptr += row * num_queries * out_token
    noise_weight = tl.load(lambda_ptr).to(tl.float32)
    weight = (tl.load(weight_ptr + tl.arange(0, WIDTH)).to(tl.float32) * out_scale)[None, :]
    noise_ptr = raw_ptr + (num_groups * RATIO + group) * WIDTH
    noise = load_rows(noise_ptr, queries, raw_token, num_queries, WIDTH, True).to(tl.float32)
    for head in tl.static_range(RATIO):
        place = (group * RATIO + head) * WIDTH
        signal = load_rows(raw_ptr + place, queries, raw_token, num_queries, WIDTH, True).to(tl.float32)
        difference = signal - noise_weight * noise
        inverse_rms = tl.rsqrt(tl.sum(difference * difference, 1) / WIDTH + eps)[:, None]
        store_rows(out_ptr + place, difference * inverse_rms * weight, queries, out_token, num_queries, WIDTH)
