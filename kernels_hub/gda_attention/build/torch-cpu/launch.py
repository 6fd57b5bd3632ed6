"""Launches of the Triton kernels: tile sizes, grids, strides and the tensors between the passes.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension.
"""

import math
from functools import cache, partial
from typing import NamedTuple

import torch
import triton

from . import backward_kernels, decode_kernels, forward_kernels, hopper_passes, passes

INTERPRETED = triton.knobs.runtime.interpret
LOG2_E = math.log2(math.e)
EPILOGUE_ROWS, EPILOGUE_WARPS = 4, 1


class Tiles(NamedTuple):
    """Tile of one kernel.

    Args:
        queries: queries a tile.
        keys: keys a tile.
        warps: warps a program.
        stages: depth of the prefetch into shared memory.
        descriptors: whether the backward's pass for dQ or dV reads through tensor descriptors, where it can.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False


class Plan(NamedTuple):
    """Tiles of every kernel; a tile of `key` has as many keys as one of `query` has queries."""

    forward: Tiles
    query: Tiles
    key: Tiles
    value: Tiles
    decode: Tiles


SMALL = Tiles(16, 16, 4, 1)  # a few values a program: for the interpreter
INTERPRETER = Plan(SMALL, SMALL, SMALL, Tiles(16, 32, 4, 1), SMALL)
# The fastest of those measured on an H100 (decoding's: by the compiler's report of registers).
HOPPER = Plan(
    Tiles(128, 64, 8, 3),
    Tiles(128, 32, 8, 4),
    Tiles(64, 128, 8, 4),
    Tiles(64, 64, 4, 2, True),
    Tiles(16, 64, 4, 3),
)
# For 64 KiB to 164 KiB of shared memory.
MODEST = Plan(Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 2), Tiles(32, 64, 4, 1), Tiles(16, 32, 4, 2))
# For wide heads of 32-bit elements.
NARROW = Plan(Tiles(32, 16, 4, 1), Tiles(32, 16, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1))
# Scratch of a backward: groups go together up to the first, a group is cut beyond the second (assumption: 5% of a
# large GPU's memory).
TOGETHER_BYTES, SCRATCH_BYTES = 4 * 2**30, 4 * 2**30


@cache
def plan(dim: int, element_size: int, device: torch.device) -> Plan:
    """Chooses the tiles for heads of `dim` elements of `element_size` bytes.

    Args:
        dim: D.
        element_size: bytes.
        device: where the kernels run.
    """
    if INTERPRETED:
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    if element_size == 2 and dim <= 128 and shared_bytes >= 220 * 1024:
        return HOPPER
    if element_size == 4 and dim > 64:
        return NARROW
    return MODEST


@cache
def num_splits(rows_and_groups: int, num_keys: int, tile: int, device: torch.device) -> int:
    """Splits of the cache, a power of 2: about two programs a multiprocessor, none shorter than two tiles of keys."""
    multiprocessors = 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, 2 * multiprocessors // rows_and_groups)
    possible = max(1, num_keys // (2 * tile))
    return min(64, 2 ** int(math.log2(min(wanted, possible))))


def _unit_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors with unit stride along their last dimension; copies only where it is not."""
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _intervals(first, last, fill: torch.Tensor):
    """Pointers to pass for `first` and `last`, whether there are any, and their stride along rows."""
    if first is None:
        return fill, fill, False, 0
    first, last = first.to(torch.int32).contiguous(), last.to(torch.int32).contiguous()
    return first, last, True, first.shape[1] if first.shape[0] > 1 else 0


def forward(
    signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale, training, tiles=None
):
    """out (B, T, G, r, 2D), raw (B, T, H or G, 2D), lse (B, H, T) in base 2, max_logits (G, r + 1).

    The H = G * (r + 1) heads are the signal heads of all groups, then the noise heads; without `training` raw is of
    these alone. With `tiles` by the Triton kernel, else on Hopper by the one written for it where it suits and runs.
    """
    batch, tokens, groups, ratio, dim = signal_query.shape
    states = _unit_rows(signal_query, noise_query, key, value)
    signals = groups * ratio
    out = signal_query.new_empty((batch, tokens, groups, ratio, 2 * dim))
    raw = signal_query.new_empty((batch, tokens, (signals if training else 0) + groups, 2 * dim))
    lse = signal_query.new_empty((batch, signals + groups, tokens), dtype=torch.float32)
    if signal_query.numel() == 0:
        return out, raw, lse, lse.new_full((groups, ratio + 1), -torch.inf)
    arguments = (*states, lambda_, weight, raw, out, lse, scaling, eps, out_scale)
    with torch.cuda.device_of(key):
        arguments, largest = (*arguments, *_intervals(first, last, lse)), None
        if tiles is None and hopper_passes.suits(*states):
            largest = hopper_passes.attempt(lambda: hopper_passes.forward(*arguments))
        if largest is None:
            tiles = tiles or plan(dim, signal_query.element_size(), signal_query.device).forward
            largest = _forward(*arguments, tiles)
    largest = largest.amax(dim=(0, 2)) / LOG2_E
    return out, raw, lse, torch.cat((largest[:signals].view(groups, ratio), largest[signals:, None]), dim=1)


def _forward(
    signal_query, noise_query, key, value, lambda_, weight, raw, out, lse, scaling, eps, out_scale,
    first, last, has_intervals, interval_stride, tiles,
):  # fmt: skip
    """Writes raw, out and lse; the largest logits of every tile (B, H, tiles), in base 2."""
    batch, tokens, groups, ratio, dim = signal_query.shape
    num_tiles, raw_signals = triton.cdiv(tokens, tiles.queries), raw.shape[2] - groups
    largest = lse.new_empty((batch, lse.shape[1], num_tiles))
    for noise in (True, False):
        query = noise_query[:, :, :, None] if noise else signal_query
        forward_kernels.forward_kernel[(batch * groups * num_tiles * query.shape[3],)](
            query, key, value, lambda_, weight, first, last, raw, out, lse, largest,
            *query.stride()[:4], *key.stride()[:4], *value.stride()[:4],
            tokens, key.shape[1], groups, interval_stride, raw_signals, scaling * LOG2_E, eps, out_scale,
            RATIO=ratio, NOISE=noise, SAVE_RAW=raw_signals > 0, HAS_INTERVALS=has_intervals, DIM=dim,
            BLOCK_M=tiles.queries, BLOCK_N=tiles.keys, STAGES=tiles.stages, PRECISION=passes.precision(query),
            num_warps=tiles.warps,
        )  # fmt: skip
    return largest


def finish(raw, lambda_, weight, eps, out_scale, groups):
    """out (B, T, G, r, 2D) from raw outputs (B, T, H, 2D): the epilogue alone."""
    batch, tokens, heads, width = raw.shape
    ratio = heads // groups - 1
    out = raw.new_empty((batch, tokens, groups, ratio, width))
    forward_kernels.finish_kernel[(triton.cdiv(tokens, EPILOGUE_ROWS), batch * groups)](
        raw, lambda_, weight, out, tokens, groups, eps, out_scale,
        RATIO=ratio, DIM=width // 2, BLOCK=EPILOGUE_ROWS, num_warps=EPILOGUE_WARPS,
    )  # fmt: skip
    return out


def epilogue_backward(dout, raw, lse, lambda_, weight, eps, out_scale):
    """draw (B, T, H, 2D), delta (B, H, T), and the gradients of lambda and of the weight.

    The H = G * (r + 1) heads are the signal heads of all groups, then the noise heads.
    """
    batch, tokens, groups, ratio, width = dout.shape
    (dout,) = _unit_rows(dout)
    heads = groups * (ratio + 1)
    draw, delta = raw.new_empty((batch, tokens, heads, width)), lse.new_empty((batch, heads, tokens))
    grid = (triton.cdiv(tokens, EPILOGUE_ROWS), batch * groups)
    dlambda = lse.new_empty((grid[0] * grid[1],))
    dweight = lse.new_empty((grid[0] * grid[1], width))
    backward_kernels.epilogue_kernel[grid](
        dout, raw, lambda_, weight, draw, delta, dlambda, dweight, *dout.stride()[:4],
        tokens, groups, eps, out_scale, RATIO=ratio, DIM=width // 2, BLOCK=EPILOGUE_ROWS, num_warps=EPILOGUE_WARPS,
    )  # fmt: skip
    return draw, delta, dlambda.sum(), dweight.sum(0)


class Part(NamedTuple):
    """What one pair of launches of the backward does.

    Args:
        first_group: first of the groups, counted over all rows.
        groups: how many.
        first_block: first row of blocks of queries.
        blocks: how many.
        size: blocks of a head's map.
    """

    first_group: int
    groups: int
    first_block: int
    blocks: int
    size: int


def parts(
    groups: int, blocks_of_queries: int, blocks_of_keys: int, triangular: bool, together: int, limit: int
) -> list[Part]:
    """Cuts a backward into parts, by the blocks that a head of each group keeps.

    Args:
        groups: groups of all rows.
        blocks_of_queries: rows of blocks of a map.
        blocks_of_keys: columns.
        triangular: whether row i keeps i + 1 blocks only.
        together: blocks up to which several groups make one part.
        limit: blocks beyond which a group makes several parts; one has a row of blocks at least.
    """

    def size(start: int, end: int) -> int:
        return (end * (end + 1) - start * (start + 1)) // 2 if triangular else (end - start) * blocks_of_keys

    whole = size(0, blocks_of_queries)
    if whole <= limit:
        cuts = math.ceil(groups / max(1, min(together, limit) // whole))
        here = math.ceil(groups / cuts)
        return [
            Part(start, min(here, groups - start), 0, blocks_of_queries, whole) for start in range(0, groups, here)
        ]
    ranges, start = [], 0
    for end in range(1, blocks_of_queries + 1):
        if end == blocks_of_queries or size(start, end + 1) > limit:
            ranges.append((start, end - start, size(start, end)))
            start = end
    return [Part(group, 1, *each) for group in range(groups) for each in ranges]


def backward(
    dout, signal_query, noise_query, key, value, lambda_, weight, first, last, raw, lse, scaling, eps, out_scale,
    tiles=None,
):  # fmt: skip
    """[dsignal_query, dnoise_query, dkey, dvalue, dlambda, dweight], contiguous, in the types of the inputs.

    With `tiles` by the Triton kernels, else on Hopper by those written for it where they suit and run.
    """
    states = _unit_rows(signal_query, noise_query, key, value)
    if dout.numel() == 0:
        return [torch.zeros_like(each, memory_format=torch.contiguous_format) for each in (*states, lambda_, weight)]
    triangular, gradients = first is None and signal_query.shape[1] == key.shape[1], None
    with torch.cuda.device_of(key):
        draw, delta, dlambda, dweight = epilogue_backward(dout, raw, lse, lambda_, weight, eps, out_scale)
        arguments = (triangular, *states, draw, lse, delta, scaling)
        intervals = _intervals(first, last, lse)
        if tiles is None and hopper_passes.suits(*states):
            make_passes = partial(hopper_passes.Passes, intervals=intervals)
            gradients = hopper_passes.attempt(lambda: _in_parts(make_passes, hopper_passes.BLOCK, *arguments))
        if gradients is None:
            tiles = tiles or plan(key.shape[-1], key.element_size(), key.device)
            make_passes = partial(passes.Passes, intervals=intervals, tiles=tiles, triangular=triangular)
            gradients = _in_parts(make_passes, tiles.query.queries, *arguments)
    return [*gradients, dlambda.reshape(lambda_.shape).to(lambda_.dtype), dweight.view_as(weight).to(weight.dtype)]


def _in_parts(
    make_passes, edge, triangular, signal_query, noise_query, key, value, draw, lse, delta, scaling
) -> list[torch.Tensor]:
    """[dsignal_query, dnoise_query, dkey, dvalue] by passes whose blocks of dS have `edge` queries and keys."""
    batch, tokens, groups, ratio = signal_query.shape[:4]
    states = signal_query, noise_query, key, value
    gradients = [torch.empty_like(each, memory_format=torch.contiguous_format) for each in states]
    blocks = triton.cdiv(tokens, edge), triton.cdiv(key.shape[1], edge)
    block_bytes = edge * edge * (ratio + 1) * key.element_size()
    limits = TOGETHER_BYTES // block_bytes, SCRATCH_BYTES // block_bytes
    cut = parts(batch * groups, *blocks, triangular, *limits)
    in_ranges, dkey = cut[0].blocks < blocks[0], gradients[2]
    dkey_sum = dkey.new_empty(dkey.shape, dtype=torch.float32) if in_ranges else dkey
    dmaps = key.new_empty((max(part.groups * part.size for part in cut) * (ratio + 1) * edge, edge))
    chosen = make_passes(*states, draw, lse, delta, dmaps, gradients, scaling)
    for part in cut:
        base = part.first_block * (part.first_block + 1) // 2 if triangular else part.first_block * blocks[1]
        where = (*part[:4], base, part.size)
        chosen.query(where)
        chosen.key_sum(where, dkey_sum, part.first_block > 0)
    chosen.value_sum()
    if in_ranges:
        dkey.copy_(dkey_sum)
    return gradients


def decode(
    signal_query, noise_query, key, value, lambda_, weight, first, last, scaling, eps, out_scale, tiles=None,
    splits=None,
):  # fmt: skip
    """out (B, 1, G, r, 2D) of one token a row."""
    batch, _, groups, ratio, dim = signal_query.shape
    num_keys = key.shape[1]
    signal_query, noise_query, key, value = _unit_rows(signal_query, noise_query, key, value)
    out = signal_query.new_empty((batch, 1, groups, ratio, 2 * dim))
    if signal_query.numel() == 0:
        return out
    tiles = tiles or plan(dim, key.element_size(), key.device).decode
    splits = splits or num_splits(batch * groups, num_keys, tiles.keys, key.device)
    rows = max(16, triton.next_power_of_2(ratio + 1))
    partial = out.new_empty((batch, groups, splits, rows, 2 * dim), dtype=torch.float32)
    largest, total = out.new_empty((2, batch, groups, splits, rows), dtype=torch.float32)
    first, last, has_intervals, _ = _intervals(first, last, largest)
    with torch.cuda.device_of(key):
        decode_kernels.split_kernel[(splits, groups, batch)](
            signal_query, noise_query, key, value, first, last, partial, largest, total,
            signal_query.stride(0), *signal_query.stride()[2:4], noise_query.stride(0), noise_query.stride(2),
            *key.stride()[:4], *value.stride()[:4],
            num_keys, groups, int(has_intervals and first.shape[0] > 1), scaling * LOG2_E,
            RATIO=ratio, HAS_INTERVALS=has_intervals, SPLITS=splits, ROWS=rows, DIM=dim, BLOCK_N=tiles.keys,
            STAGES=tiles.stages, PRECISION=passes.precision(key), num_warps=tiles.warps,
        )  # fmt: skip
        decode_kernels.join_kernel[(ratio, groups, batch)](
            partial, largest, total, lambda_, weight, out, groups, eps, out_scale,
            RATIO=ratio, SPLITS=splits, ROWS=rows, BLOCK=triton.next_power_of_2(splits), DIM=dim, num_warps=4,
        )  # fmt: skip
    return out
