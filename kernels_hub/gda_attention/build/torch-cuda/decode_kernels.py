"""Triton kernels of one decoding step: the cache is read once, in splits, then the splits are joined and normed.

One tile of queries holds a group's r signal queries and its noise query, so that either key and the value are each
loaded once for all of them. Splits divide the keys that are visible now: their bounds live on the device.

Shapes: B rows, S keys of the cache, G groups, r signal heads a group, D head dimension, H rows of the query tile (the
r + 1 queries, padded), N keys of a tile, P splits. Logits are in base 2.
"""

import triton
import triton.language as tl

from .tiles import load_rows


@triton.jit(do_not_specialize=["num_keys", "interval_stride"])
def split_kernel(
    signal_ptr, noise_ptr, key_ptr, value_ptr, first_ptr, last_ptr, partial_ptr, largest_ptr, total_ptr,
    signal_row, signal_group, signal_head, noise_row, noise_group,
    key_row, key_token, key_group, key_half, value_row, value_token, value_group, value_half,
    num_keys, num_groups, interval_stride, log2_scale,
    RATIO: tl.constexpr, HAS_INTERVALS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A split's outputs before division (B, G, P, ROWS, 2D), maxima and sums (B, G, P, ROWS); grid (P, G, B)."""
    split = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2).to(tl.int64)
    if HAS_INTERVALS:
        first = tl.maximum(tl.load(first_ptr + row * interval_stride), 0)
        stop = tl.minimum(tl.load(last_ptr + row * interval_stride) + 1, num_keys)
    else:
        first = 0
        stop = num_keys
    length = tl.cdiv(tl.cdiv(tl.maximum(stop - first, 0), SPLITS), BLOCK_N) * BLOCK_N
    start = first + split * length
    stop = tl.minimum(start + length, stop)

    heads = tl.arange(0, ROWS)
    columns = tl.arange(0, DIM)
    signal_ptr += row * signal_row + group * signal_group
    noise_ptr += row * noise_row + group * noise_group
    is_noise = heads == RATIO
    addresses = signal_ptr + heads[:, None] * signal_head + columns[None, :]
    query = tl.load(addresses, mask=(heads < RATIO)[:, None], other=0.0)  # (H, D)
    noise = tl.load(noise_ptr + columns)  # (D,)
    query = tl.where(is_noise[:, None], noise[None, :], query)
    signal_key_ptr = key_ptr + row * key_row + group * key_group
    low_ptr = value_ptr + row * value_row + group * value_group
    low = tl.zeros((ROWS, DIM), tl.float32)
    high = tl.zeros((ROWS, DIM), tl.float32)
    largest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for begin in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        keys = begin + tl.arange(0, BLOCK_N)
        signal_key = load_rows(signal_key_ptr, keys, key_token, stop, DIM, True)  # (N, D)
        noise_key = load_rows(signal_key_ptr + key_half, keys, key_token, stop, DIM, True)
        of_signal = tl.dot(query, tl.trans(signal_key), input_precision=PRECISION)  # (H, N)
        of_noise = tl.dot(query, tl.trans(noise_key), input_precision=PRECISION)
        logits = tl.where(is_noise[:, None], of_noise, of_signal) * log2_scale
        logits = tl.where((keys < stop)[None, :], logits, -float("inf"))
        raised = tl.maximum(largest, tl.max(logits, 1))  # finite: every tile holds a visible key
        weights = tl.exp2(logits - raised[:, None])
        decay = tl.exp2(largest - raised)
        total = total * decay + tl.sum(weights, 1)
        largest = raised
        weights = weights.to(query.dtype)
        low_value = load_rows(low_ptr, keys, value_token, stop, DIM, True)
        low = tl.dot(weights, low_value, low * decay[:, None], input_precision=PRECISION)
        high_value = load_rows(low_ptr + value_half, keys, value_token, stop, DIM, True)
        high = tl.dot(weights, high_value, high * decay[:, None], input_precision=PRECISION)

    place = ((row * num_groups + group) * SPLITS + split) * ROWS + heads
    tl.store(largest_ptr + place, largest)
    tl.store(total_ptr + place, total)
    addresses = partial_ptr + place[:, None] * (2 * DIM) + columns[None, :]
    tl.store(addresses, low)
    tl.store(addresses + DIM, high)


@triton.jit
def _joined(partial_ptr, largest_ptr, total_ptr, place, head, SPLITS: tl.constexpr, ROWS: tl.constexpr,
            BLOCK: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One head's output (WIDTH,), the splits put together."""
    splits = tl.arange(0, BLOCK)
    inside = splits < SPLITS
    rows = place + splits * ROWS + head
    largest = tl.load(largest_ptr + rows, mask=inside, other=-float("inf"))  # (P,)
    highest = tl.max(largest, 0)
    share = tl.exp2(largest - tl.where(highest == -float("inf"), 0.0, highest))
    total = tl.sum(share * tl.load(total_ptr + rows, mask=inside, other=0.0), 0)
    addresses = partial_ptr + rows[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    parts = tl.load(addresses, mask=inside[:, None], other=0.0)  # (P, WIDTH)
    return tl.sum(parts * share[:, None], 0) / tl.where(total > 0, total, 1.0)


@triton.jit
def join_kernel(
    partial_ptr, largest_ptr, total_ptr, lambda_ptr, weight_ptr, out_ptr, num_groups, eps, out_scale,
    RATIO: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """out (B, 1, G, r, 2D); grid (r, G, B)."""
    WIDTH: tl.constexpr = 2 * DIM
    head = tl.program_id(0)
    row_and_group = tl.program_id(2).to(tl.int64) * num_groups + tl.program_id(1)
    place = row_and_group * SPLITS * ROWS
    signal = _joined(partial_ptr, largest_ptr, total_ptr, place, head, SPLITS, ROWS, BLOCK, WIDTH)
    noise = _joined(partial_ptr, largest_ptr, total_ptr, place, RATIO, SPLITS, ROWS, BLOCK, WIDTH)
    difference = signal - tl.load(lambda_ptr).to(tl.float32) * noise
    inverse_rms = tl.rsqrt(tl.sum(difference * difference, 0) / WIDTH + eps)
    columns = tl.arange(0, WIDTH)
    out = difference * inverse_rms * out_scale * tl.load(weight_ptr + columns).to(tl.float32)
    out_ptr += (row_and_group * RATIO + head) * WIDTH
    tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty))
