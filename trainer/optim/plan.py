"""The plan of a step: who orthogonalises which matrix, in which chunks, and what travels where.

A plan is a pure function of shapes, layouts and settings, so every rank works out the same one.
Legend: A rows, B columns of a matrix; positions are places in the team of ranks.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from trainer.optim.layout import Block, Layout


@dataclass(frozen=True)
class Piece:
    """A block of matrix number `matrix`, at `offset` (elements) of a buffer to or from the rank at position `peer`."""

    matrix: int
    peer: int
    block: Block
    offset: int


@dataclass(frozen=True)
class Strip:
    """Equal tiles at equal distances in a matrix and in a buffer, so that one strided copy moves them all.

    Args:
        matrix: number of the matrix.
        count: tiles.
        shape: rows and columns of a tile.
        corner: row and column of the first tile in the matrix.
        corner_step: rows and columns from one tile to the next.
        offset: element of the buffer where the first tile starts.
        offset_step: elements from one tile to the next.
        pitch: elements from one row of a tile to the next.
    """

    matrix: int
    count: int
    shape: tuple[int, int]
    corner: tuple[int, int]
    corner_step: tuple[int, int]
    offset: int
    offset_step: int
    pitch: int

    def is_whole(self, shape: tuple[int, int]) -> bool:
        """Whether it is a whole matrix of this shape, row after row."""
        return self.count == 1 and self.shape == shape and self.pitch == shape[1]

    def views(self, full: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """The tiles in the matrix (A, B) and in the flat buffer, both (count, rows, columns)."""
        down, right = full.stride()
        strides = (self.corner_step[0] * down + self.corner_step[1] * right, down, right)
        start = full.storage_offset() + self.corner[0] * down + self.corner[1] * right
        shape = (self.count, *self.shape)
        return (
            full.as_strided(shape, strides, start),
            buffer.as_strided(shape, (self.offset_step, self.pitch, 1), buffer.storage_offset() + self.offset),
        )


@dataclass(frozen=True)
class Route:
    """One all-to-all as one rank sees it: pieces in the buffers' order, and elements to and from each position.

    `landings`, which copies into peers' buffers need, is where this rank's elements start in each position's buffer.
    """

    sends: tuple[Piece, ...]
    receives: tuple[Piece, ...]
    send_splits: tuple[int, ...]
    receive_splits: tuple[int, ...]
    landings: tuple[int, ...] = ()

    @cached_property
    def send_strips(self) -> tuple[Strip, ...]:
        """What is sent, by as few copies as possible."""
        return strips_of(self.sends)

    @cached_property
    def receive_strips(self) -> tuple[Strip, ...]:
        """What is received, by as few copies as possible."""
        return strips_of(self.receives)


@dataclass(frozen=True)
class Chunk:
    """What one rank does in one round of the pipeline.

    Args:
        members: numbers of all matrices of the round, whoever owns them.
        owned: numbers of the matrices that this rank orthogonalises.
        gather: brings the blocks of owned matrices to this rank.
        scatter: brings the updates of this rank's blocks back from their owners.
    """

    members: tuple[int, ...]
    owned: tuple[int, ...]
    gather: Route
    scatter: Route


def assign_owners(costs: Sequence[float], team_size: int, balanced: bool = True) -> list[int]:
    """Position that owns each matrix: longest processing time first, or in turn where not `balanced`."""
    if not balanced:
        return [number % team_size for number in range(len(costs))]
    owners, loads = [0] * len(costs), [(0, position) for position in range(team_size)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, position = heapq.heappop(loads)
        owners[number] = position
        heapq.heappush(loads, (load + costs[number], position))
    return owners


def cut_rounds(
    layouts: Sequence[Layout], owners: Sequence[int], costs: Sequence[float], chunk_size: int | None, balanced: bool
) -> list[list[list[int]]]:
    """Cut each rank's matrices into rounds of at most `chunk_size` times the largest matrix's elements.

    A round so holds `chunk_size` large matrices a rank or many small ones, which make an efficient batch. Where
    `balanced`, equal shapes stand together and costly ones first.

    Returns:
        list: for each round, for each position, the numbers of the matrices it owns.
    """
    sizes = [layout.shape[0] * layout.shape[1] for layout in layouts]
    order = sorted(range(len(sizes)), key=lambda n: (-costs[n], layouts[n].shape, n)) if balanced else None
    budget = float("inf") if chunk_size is None else chunk_size * max(sizes)
    team_size = len(layouts[0].team)
    by_position: list[list[list[int]]] = [[] for _ in range(team_size)]
    used = [float("inf")] * team_size
    for number in order or range(len(sizes)):
        position = owners[number]
        if not by_position[position] or used[position] + sizes[number] > budget:
            by_position[position].append([])
            used[position] = 0
        by_position[position][-1].append(number)
        used[position] += sizes[number]
    count = max(map(len, by_position))
    return [[rounds[i] if i < len(rounds) else [] for rounds in by_position] for i in range(count)]


def plan_chunks(
    layouts: Sequence[Layout], me: int, cost_of: Callable[[int, int], float], chunk_size: int | None, balanced: bool
) -> tuple[Chunk, ...]:
    """Plan the rounds of one team.

    Args:
        layouts: of every matrix of the team, in the same order on every rank.
        me: this rank's position in the team.
        cost_of: work to orthogonalise an (A, B) matrix, in any unit.
        chunk_size: most elements a rank owns in a round, in units of the largest matrix; None puts all in one round.
        balanced: share out by cost, longest first, instead of in turn.
    """
    costs = [cost_of(*layout.shape) for layout in layouts]
    owners = assign_owners(costs, len(layouts[0].team), balanced)
    rounds = cut_rounds(layouts, owners, costs, chunk_size, balanced)
    return tuple(_chunk_of(layouts, owned_by, me) for owned_by in rounds)


def strips_of(pieces: Sequence[Piece]) -> tuple[Strip, ...]:
    """Join the tiles of pieces into strips: one a matrix where shards are even, however many ranks there are."""
    strips: list[Strip] = []
    for piece in sorted(pieces, key=lambda piece: (piece.matrix, piece.offset)):
        for corner, place, shape in piece.block.tile_corners():
            offset = piece.offset + place[0] * piece.block.shape[1] + place[1]
            tile = Strip(piece.matrix, 1, shape, corner, (0, 0), offset, 0, piece.block.shape[1])
            joined = _joined(strips[-1], tile) if strips else None
            strips[-1:] = [joined] if joined else [*strips[-1:], tile]
    return tuple(strips)


def _joined(strip: Strip, tile: Strip) -> Strip | None:
    """The strip with one more tile, or a taller tile; None if the tile neither follows in step nor stands below."""
    if (strip.matrix, strip.pitch) != (tile.matrix, tile.pitch):
        return None
    (rows, columns), (top, left) = strip.shape, strip.corner
    below = (tile.corner, tile.offset) == ((top + rows, left), strip.offset + rows * strip.pitch)
    if strip.count == 1 and below and tile.shape[1] == columns:
        return replace(strip, shape=(rows + tile.shape[0], columns))
    if strip.shape != tile.shape:
        return None
    last = strip.count - 1
    corner_step = tuple(new - old - last * step for new, old, step in zip(
        tile.corner, strip.corner, strip.corner_step, strict=True))  # fmt: skip
    if corner_step < (0, 0):  # memory cannot be viewed backwards
        return None
    offset_step = tile.offset - strip.offset - last * strip.offset_step
    if strip.count > 1 and (corner_step, offset_step) != (strip.corner_step, strip.offset_step):
        return None
    return replace(strip, count=strip.count + 1, corner_step=corner_step, offset_step=offset_step)


def _chunk_of(layouts: Sequence[Layout], owned_by: list[list[int]], me: int) -> Chunk:
    team = range(len(owned_by))
    gather = Route(
        *_pieces(
            [[(n, layouts[n].blocks[me]) for n in owned_by[o] if me in layouts[n].sources(o)] for o in team],
            [[(n, layouts[n].blocks[s]) for n in owned_by[me] if s in layouts[n].sources(me)] for s in team],
        )
    )
    scatter = Route(
        *_pieces(
            [[(n, layouts[n].blocks[position]) for n in owned_by[me]] for position in team],
            [[(n, layouts[n].blocks[me]) for n in owned_by[o]] for o in team],
        )
    )
    members = tuple(sorted(number for owned in owned_by for number in owned))
    return Chunk(members, tuple(owned_by[me]), gather, scatter)


def _pieces(*directions: list[list[tuple[int, Block]]]) -> tuple[tuple, ...]:
    """Lay blocks by peer into a buffer, for sending and receiving: (sends, receives, send_splits, receive_splits)."""
    laid, splits = [], []
    for by_peer in directions:
        pieces, offset = [], 0
        for peer, blocks in enumerate(by_peer):
            for number, block in blocks:
                if block.numel:
                    pieces.append(Piece(number, peer, block, offset))
                offset += block.numel
        laid.append(tuple(pieces))
        splits.append(tuple(sum(block.numel for _, block in blocks) for blocks in by_peer))
    return (*laid, *splits)
