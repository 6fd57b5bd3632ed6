"""What the Triton kernels of all passes share: which keys a query sees, and loads of tiles.

A query sees an interval of keys, `first` to `last` inclusive; both never decrease along a row's queries. Without
intervals it is causal order, the last query seeing every key. So the keys of a tile of queries form three runs: an
edge that some see, a middle that all see (no mask needed), another edge; and the queries of a tile of keys form one.

Shapes: T queries, S keys, M queries of a tile, N keys of a tile, D head dimension.
"""

import triton
import triton.language as tl


@triton.jit
def interval(first_ptr, last_ptr, queries, num_queries, num_keys, HAS_INTERVALS: tl.constexpr):
    """First and last visible key of each query, (M,) int32; a query outside the row sees none with intervals."""
    if HAS_INTERVALS:
        inside = queries < num_queries
        first = tl.load(first_ptr + queries, mask=inside, other=num_keys)
        last = tl.minimum(tl.load(last_ptr + queries, mask=inside, other=-1), num_keys - 1)
    else:
        first = tl.zeros_like(queries)
        last = queries + (num_keys - num_queries)
    return first, last


@triton.jit
def key_runs(first, last, num_keys, BLOCK_N: tl.constexpr):
    """Start, middle's start, middle's end and end of the keys that a tile of queries sees; all but the end aligned."""
    start = tl.maximum(tl.min(first, 0), 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.max(last, 0) + 1, num_keys)
    middle = (tl.maximum(tl.max(first, 0), 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    middle_end = tl.maximum(tl.minimum(tl.min(last, 0) + 1, num_keys), 0) // BLOCK_N * BLOCK_N
    return start, middle, tl.maximum(middle_end, middle), end


@triton.jit
def load_rows(pointer, rows, stride, num_rows, DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows (len(rows), DIM) of unit stride; zeros past the end where `MASKED`."""
    columns = tl.arange(0, DIM)
    addresses = pointer + rows[:, None] * stride + columns[None, :]
    if MASKED:
        return tl.load(addresses, mask=(rows < num_rows)[:, None], other=0.0)
    return tl.load(addresses)


@triton.jit
def load_tile(
    source, row, begin, place, head, stride, num_rows,
    ROWS: tl.constexpr, DIM: tl.constexpr, MASKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows `begin` to `begin + ROWS`, (ROWS, DIM): a descriptor's (row, :, place, head), or from a pointer to it."""
    if DESCRIPTORS:
        tile = source.load([row, begin, place, head, 0]).reshape(ROWS, DIM)
    else:
        tile = load_rows(source, begin + tl.arange(0, ROWS), stride, num_rows, DIM, MASKED)
    return tile


@triton.jit
def store_rows(pointer, tile, rows, stride, num_rows, DIM: tl.constexpr):
    """Stores (len(rows), DIM) in the type behind the pointer."""
    addresses = pointer + rows[:, None] * stride + tl.arange(0, DIM)[None, :]
    tl.store(addresses, tile.to(pointer.dtype.element_ty), mask=(rows < num_rows)[:, None])
