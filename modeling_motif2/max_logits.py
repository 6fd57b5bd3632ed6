"""The largest attention logit of every query head, computed only where a cheap bound says that it could matter.

QK-clip acts on logits above a threshold. No logit of a query q and a key k is larger than |q| |k|, and lengths cost
O(T D) against O(T^2 D) for the logits. So lengths come first, and logits are computed where the bound passes a gate;
elsewhere the bound itself, below the gate, stands for the logit. The device decides; the host waits for nothing.

Shapes: B batch, T query tokens, S key tokens, G groups, r queries a key, D head dimension.
"""

import math

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch comes without it: the kernel is for accelerators
    triton = None

# Logits held at a time by the torch form (assumption: 256 MiB in float32).
LOGITS_AT_ONCE = 2**26
# Queries and keys of a tile of the kernel.
TILE = 64


@torch.library.custom_op("motif2::largest_logits", mutates_args=())
def largest_logits(
    query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor | None, scaling: float, gate: float
) -> torch.Tensor:
    """Returns the largest scaled logit of each head over visible positions: (G, r), float32.

    Args:
        query: (B, G * r, T, D), rotated.
        key: (B, G, S, D), rotated.
        visible: (B or 1, 1, T, S) boolean, or None for a plain causal mask.
        scaling: factor of the dot products, positive.
        gate: exact where the result is above it; below, any number from the exact one up to the gate may stand for it.
            -inf asks for exact numbers everywhere.
    """
    if triton is not None and (query.is_cuda or triton.knobs.runtime.interpret):
        return _launch(query, key, visible, scaling, gate)
    return _largest_logits(query, key, visible, scaling, gate)


@largest_logits.register_fake
def _(query, key, visible, scaling, gate):
    return query.new_empty((key.shape[1], query.shape[1] // key.shape[1]), dtype=torch.float32)


def _largest_logits(query, key, visible, scaling: float, gate: float) -> torch.Tensor:
    """The torch form; it gates only on the CPU, where looking at a number costs nothing."""
    batch, heads, tokens, dim = query.shape
    groups, length = key.shape[1:3]
    query = query.reshape(batch, groups, heads // groups, tokens, dim)
    if query.device.type == "cpu" and gate > -math.inf:
        lengths = _lengths(query).amax((0, 3)) * _lengths(key).amax((0, 2))[:, None]  # (G, r)
        if bool((bound := scaling * lengths).le(gate).all()):
            return bound
    largest = torch.full((groups, heads // groups), -torch.inf, dtype=torch.float32, device=query.device)
    at_once = max(1, LOGITS_AT_ONCE // (batch * heads * length))
    for start in range(0, tokens, at_once):
        part = query[:, :, :, start : start + at_once]
        logits = torch.matmul(part.flatten(2, 3), key.transpose(2, 3)).float()  # (B, G, r * t, S)
        logits = logits.unflatten(2, (heads // groups, -1))  # (B, G, r, t, S)
        if visible is None:
            seen = torch.ones(part.shape[3], length, dtype=torch.bool, device=query.device)
            seen = seen.tril(length - tokens + start)[None, None, None]
        else:
            seen = visible[:, :, None, start : start + at_once]
        largest = torch.maximum(largest, logits.masked_fill(~seen, -torch.inf).amax(dim=(0, 3, 4)))
    return largest * scaling


def _lengths(states: torch.Tensor) -> torch.Tensor:
    """Lengths of vectors (..., D) in float32, rounded up: however it is summed, no dot product exceeds them."""
    return torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32) * (1 + 1e-4)


def _launch(query, key, visible, scaling: float, gate: float) -> torch.Tensor:
    batch, heads, tokens, dim = query.shape
    groups, length = key.shape[1:3]
    query_lengths, key_lengths = (
        _by_tile(_lengths(query)),
        _by_tile(_lengths(key)),
    )  # (B, G * r, T / 64), (B, G, S / 64)
    tiles = query_lengths.shape[2]
    largest = torch.empty(batch, heads, tiles, dtype=torch.float32, device=query.device)
    mask = query.new_empty(0, dtype=torch.bool) if visible is None else visible.expand(batch, 1, tokens, length)
    strides = (0, 0, 0) if visible is None else (mask.stride(0), mask.stride(2), mask.stride(3))
    device = torch.cuda.device_of(query) if query.is_cuda else torch.device("cpu")
    with device:
        _kernel[(tiles, batch * heads)](
            query, key, mask, query_lengths, key_lengths, largest,
            *query.stride(), *key.stride(), *strides,
            heads, heads // groups, tokens, length, dim, scaling, gate,
            MASKED=visible is not None, TILE=TILE, BLOCK_D=max(16, triton.next_power_of_2(dim)), num_warps=4,
        )  # fmt: skip
    return largest.unflatten(1, (groups, -1)).amax((0, 3))


def _by_tile(lengths: torch.Tensor) -> torch.Tensor:
    """The largest of each 64 lengths: (B, H, T) to (B, H, ceil(T / 64))."""
    padded = torch.nn.functional.pad(lengths, (0, -lengths.shape[-1] % TILE))
    return padded.unflatten(-1, (-1, TILE)).amax(-1).contiguous()


if triton is not None:

    @triton.jit
    def _kernel(
        query, key, visible, query_lengths, key_lengths, largest,
        query_b, query_h, query_t, query_d, key_b, key_g, key_s, key_d, visible_b, visible_t, visible_s,
        heads, ratio, tokens, length, dim, scaling, gate,
        MASKED: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr,
    ):  # fmt: skip
        """One tile of queries of one head: its largest logit, or the bound where that stays at or below the gate."""
        tile, row = tl.program_id(0), tl.program_id(1)
        batch, head = row // heads, row % heads
        group, groups = head // ratio, heads // ratio
        query += batch.to(tl.int64) * query_b + head.to(tl.int64) * query_h
        key += batch.to(tl.int64) * key_b + group.to(tl.int64) * key_g
        tokens_at = tile * TILE + tl.arange(0, TILE)
        dims = tl.arange(0, BLOCK_D)
        queries = tl.load(
            query + tokens_at.to(tl.int64)[:, None] * query_t + dims[None, :] * query_d,
            mask=(tokens_at < tokens)[:, None] & (dims < dim)[None, :],
            other=0.0,
        )  # (TILE, D)
        query_length = tl.load(query_lengths + row * tl.num_programs(0) + tile) * scaling
        key_tiles = tl.cdiv(length, TILE)
        key_lengths += (batch * groups + group) * key_tiles
        if MASKED:
            last = key_tiles
            visible += batch.to(tl.int64) * visible_b
        else:
            last = tl.minimum(key_tiles, tl.cdiv(length - tokens + (tile + 1) * TILE, TILE))
        result = -float("inf")
        for step in range(0, last):
            bound = query_length * tl.load(key_lengths + step)
            if bound <= gate:
                result = tl.maximum(result, bound)
            else:
                keys_at = step * TILE + tl.arange(0, TILE)
                keys = tl.load(
                    key + keys_at.to(tl.int64)[None, :] * key_s + dims[:, None] * key_d,
                    mask=(keys_at < length)[None, :] & (dims < dim)[:, None],
                    other=0.0,
                )  # (D, TILE)
                logits = tl.dot(queries, keys, input_precision="ieee").to(tl.float32) * scaling
                seen = (tokens_at < tokens)[:, None] & (keys_at < length)[None, :]
                if MASKED:
                    at = visible + tokens_at.to(tl.int64)[:, None] * visible_t + keys_at[None, :] * visible_s
                    seen = seen & tl.load(at, mask=seen, other=0).to(tl.int1)
                else:
                    seen = seen & (keys_at[None, :] <= tokens_at[:, None] + (length - tokens))
                result = tl.maximum(result, tl.max(tl.where(seen, logits, -float("inf"))))
        tl.store(largest + row * tl.num_programs(0) + tile, result)
