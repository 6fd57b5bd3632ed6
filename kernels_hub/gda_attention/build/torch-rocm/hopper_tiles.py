"""What the Gluon kernels for Hopper share: layouts, rings of tiles in shared memory, and how they are filled.

A ring has two barriers a stage: a loading group of warps waits for room and says how many bytes come, the groups that
multiply wait until they are there and say when they are done with them.

Shapes: B rows, T queries and keys, G groups, r signal heads a group, H = G * (r + 1) heads, the signal heads of all
groups and then the noise heads.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

WARPS = 4  # a program is started with; two times as many join it
REGISTERS = 168  # a thread, before the groups of warps trade them
# Numbers of the passes that go in parts: one program serves all values.
OF_A_PART = ["T", "num_groups", "first_group", "groups_here", "first_block", "blocks_here", "base", "size"]
OF_A_PART += ["interval_stride"]


@gluon.constexpr_function
def mma_layout(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.constexpr_function
def left_layout(columns):
    """Left operand in registers of a product with so many columns."""
    return gl.DotOperandLayout(operand_index=0, parent=mma_layout(columns), k_width=2)


@gluon.constexpr_function
def tile_layout(rows, columns):
    """Shared memory of a tile (1, rows, columns) of 16-bit elements."""
    return gl.NVMMASharedLayout.get_default_for([1, rows, columns], gl.bfloat16)


@gluon.constexpr_function
def spread_layout():
    """(64, 64) with twice 8 adjacent columns a thread: an accumulator after `spread`."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [0, 32], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )


@gluon.jit
def spread(tile):
    """Column 32 h + 8 j + 2 c + b of an accumulator (64, 64) becomes 32 h + 8 c + 2 j + b; no data move."""
    tile = tile.reshape([64, 2, 4, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, 64])
    return gl.convert_layout(tile, spread_layout())


@gluon.jit
def allocate_tiles(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    return gl.allocate_shared_memory(dtype, [COUNT, 1, ROWS, COLUMNS], tile_layout(ROWS, COLUMNS))


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def tile_of(buffers, i, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    return buffers.index(i).reshape([ROWS, COLUMNS])


@gluon.jit
def wait_filled(ready, i, STAGES: gl.constexpr):
    """Waits until the i-th tile of a ring is there."""
    mbarrier.wait(ready.index(i % STAGES), (i // STAGES) & 1)


@gluon.jit
def wait_room(empty, i, STAGES: gl.constexpr):
    """Waits until the i-th tile of a ring may be loaded."""
    mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)


@gluon.jit
def load_query(signal, noise, row, begin, group, head, signal_group, signal_head, noise_group, barrier, tile,
                RATIO: gl.constexpr):  # fmt: skip
    if head == RATIO:
        tma.async_copy_global_to_shared(noise, [row, begin, group * noise_group], barrier, tile)
    else:
        tma.async_copy_global_to_shared(
            signal, [row, begin, group * signal_group + head * signal_head], barrier, tile
        )  # fmt: skip


@gluon.jit
def head_of_all(group, head, num_groups, RATIO: gl.constexpr):
    """A head's place among H."""
    return gl.where(head == RATIO, num_groups * RATIO + group, group * RATIO + head)


@gluon.jit
def start_scores(left, right, COLUMNS: gl.constexpr):
    """Starts left (64, K) times right (COLUMNS, K) transposed."""
    zero = gl.zeros([64, COLUMNS], gl.float32, mma_layout(COLUMNS))
    return warpgroup_mma(left, right.permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def keys_of(first_ptr, last_ptr, tile, T, BLOCK: gl.constexpr):
    """Multiples of `BLOCK` between which a tile of 128 queries sees keys; one block even where it sees none."""
    start = gl.minimum(gl.maximum(gl.load(first_ptr + tile * 128), 0), T - 1) // BLOCK * BLOCK
    furthest = gl.minimum(gl.load(last_ptr + gl.minimum(tile * 128 + 127, T - 1)), T - 1)
    return start, gl.maximum((furthest + BLOCK) // BLOCK * BLOCK, start + BLOCK)


@gluon.jit
def bounds_of(first_ptr, last_ptr, rows, first_row, T, HAS_INTERVALS: gl.constexpr):
    """First and last key of 64 queries, (64,), and between which all of these see every key."""
    first, last, all_from, all_to = rows, rows, 0, first_row
    if HAS_INTERVALS:
        first = gl.load(first_ptr + rows, mask=rows < T, other=T)
        last = gl.minimum(gl.load(last_ptr + rows, mask=rows < T, other=-1), T - 1)
        all_from = gl.load(first_ptr + gl.minimum(first_row + 63, T - 1))
        all_to = gl.minimum(gl.load(last_ptr + gl.minimum(first_row, T - 1)), T - 1)
    return first, last, all_from, all_to


@gluon.jit
def seen_from(runs_ptr, row, tile, tiles, T, interval_stride, HAS_INTERVALS: gl.constexpr):
    """The first query that sees any key of 128, and the one after the last; equal where none does."""
    start, end = tile * 128, T
    if HAS_INTERVALS:
        runs_ptr += row * gl.where(interval_stride > 0, 2 * tiles, 0) + tile
        start = gl.load(runs_ptr)
        end = gl.maximum(gl.load(runs_ptr + tiles), start)
    return start, end
