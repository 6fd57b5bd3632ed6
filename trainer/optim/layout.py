"""Where the shards of a matrix lie: rows and columns by rank, read from the DTensor's placements.

Legend: A rows, B columns of the full matrix; a run is a half-open range (start, stop) of rows or columns.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import _StridedShard

Run = tuple[int, int]


@dataclass(frozen=True)
class Block:
    """The part of a matrix that one rank holds: the rows in `row_runs` crossed with the columns in `column_runs`."""

    row_runs: tuple[Run, ...]
    column_runs: tuple[Run, ...]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns held."""
        return _length(self.row_runs), _length(self.column_runs)

    @cached_property
    def numel(self) -> int:
        """Elements held."""
        return self.shape[0] * self.shape[1]

    def tile_corners(self):
        """For each run of rows crossed with one of columns: its corner in the matrix, in the block, and its shape."""
        row = 0
        for row_start, row_stop in self.row_runs:
            column = 0
            for start, stop in self.column_runs:
                yield (row_start, start), (row, column), (row_stop - row_start, stop - start)
                column += stop - start
            row += row_stop - row_start

    def tiles(self, full: Tensor, local: Tensor):
        """Pairs of views, one into the full matrix (A, B) and one into the block (rows, columns), that correspond."""
        for (top, left), (row, column), (rows, columns) in self.tile_corners():
            yield full[top : top + rows, left : left + columns], local[row : row + rows, column : column + columns]


@dataclass(frozen=True)
class Layout:
    """How one matrix is spread over a team of ranks.

    Args:
        shape: (A, B) of the full matrix.
        team: global ranks, ascending; a position is an index into it.
        blocks: what the rank at each position holds.
        replicas: at each position, which copy of the matrix the rank's block belongs to.
    """

    shape: tuple[int, int]
    team: tuple[int, ...]
    blocks: tuple[Block, ...]
    replicas: tuple[int, ...]

    def sources(self, owner: int) -> list[int]:
        """Positions whose blocks make up the copy of the matrix that the rank at position `owner` is part of."""
        return [position for position, copy in enumerate(self.replicas) if copy == self.replicas[owner]]

    def among(self, rank: int, max_replicas: int) -> "Layout":
        """The layout on those ranks that hold `rank`'s copy or one of the up to `max_replicas` it works with."""
        club = self.replicas[self.team.index(rank)] // max_replicas
        kept = [position for position, copy in enumerate(self.replicas) if copy // max_replicas == club]
        fields = (tuple(values[position] for position in kept) for values in (self.team, self.blocks, self.replicas))
        return Layout(self.shape, *fields)


def layout_of(parameter: Tensor, replica_ranks: tuple[int, ...]) -> Layout:
    """Read the layout of a parameter.

    Args:
        parameter: matrix (A, B), a DTensor on any mesh or a plain tensor.
        replica_ranks: global ranks that each hold a copy, where `parameter` is a plain tensor.

    Raises:
        ValueError: a placement that is neither a shard nor a replica, or a shard of a size that does not follow from
            its placements.
    """
    if not isinstance(parameter, DTensor):
        shape, copies = tuple(parameter.shape), len(replica_ranks)
        whole = Block(((0, shape[0]),), ((0, shape[1]),))
        return Layout(shape, replica_ranks, (whole,) * copies, tuple(range(copies)))
    layout = _mesh_layout(parameter.device_mesh, tuple(parameter.placements), tuple(parameter.shape))
    mine = layout.blocks[layout.team.index(dist.get_rank())]
    local_shape = tuple(local_of(parameter).shape)
    if mine.shape != local_shape:
        raise ValueError(
            f"a parameter of shape {layout.shape} with placements {parameter.placements} should have a local shard of "
            f"{mine.shape}, but has {local_shape}: shard it with fully_shard, parallelize_module or distribute_tensor"
        )
    return layout


def local_of(tensor: Tensor) -> Tensor:
    """The local shard of a DTensor, or the tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


_LAYOUTS: dict = {}


def _mesh_layout(mesh, placements: tuple, shape: tuple[int, int]) -> Layout:
    """Layouts are the same for all layers of a model: each is worked out once."""
    key = (mesh, placements, shape)
    if key not in _LAYOUTS:
        _LAYOUTS[key] = _read_placements(mesh.mesh, placements, shape)
    return _LAYOUTS[key]


def _read_placements(ranks: Tensor, placements: tuple, shape: tuple[int, int]) -> Layout:
    """Apply placements, left to right as DTensor does, to the row and column numbers themselves."""
    held = {}
    for coordinate in itertools.product(*map(range, ranks.shape)):
        indices, copy = [torch.arange(size) for size in shape], 0
        for axis, placement in enumerate(placements):
            if isinstance(placement, Replicate):
                copy = copy * ranks.shape[axis] + coordinate[axis]
            elif placement.is_shard() or isinstance(placement, _StridedShard):
                dim = placement.dim % 2
                indices[dim] = _split(placement, indices[dim], ranks.shape[axis])[coordinate[axis]]
            else:
                raise ValueError(f"a matrix has placement {placement}: MuonClip takes shards and replicas")
        held[int(ranks[coordinate])] = (Block(_runs(indices[0]), _runs(indices[1])), copy)
    team = tuple(sorted(held))
    return Layout(shape, team, tuple(held[rank][0] for rank in team), tuple(held[rank][1] for rank in team))


def _split(placement, index: Tensor, num_shards: int) -> list[Tensor]:
    """Shards of a 1-D index, cut as `Shard` (torch.chunk) or `_StridedShard` (chunks of chunks) cut a dimension."""
    pieces = [_chunk(piece, num_shards) for piece in _chunk(index, getattr(placement, "split_factor", 1))]
    return [torch.cat([piece[shard] for piece in pieces]) for shard in range(num_shards)]


def _chunk(index: Tensor, count: int) -> list[Tensor]:
    """`torch.chunk`, made up to `count` pieces with empty ones."""
    pieces = list(index.chunk(count))
    return pieces + [index[:0]] * (count - len(pieces))


def _runs(index: Tensor) -> tuple[Run, ...]:
    """Ranges that an ascending 1-D index consists of, in order."""
    if index.numel() == 0:
        return ()
    breaks = (index.diff() != 1).nonzero().flatten() + 1
    starts = [0, *breaks.tolist()]
    stops = [*breaks.tolist(), index.numel()]
    return tuple((int(index[start]), int(index[stop - 1]) + 1) for start, stop in zip(starts, stops, strict=True))


def _length(runs: tuple[Run, ...]) -> int:
    return sum(stop - start for start, stop in runs)
