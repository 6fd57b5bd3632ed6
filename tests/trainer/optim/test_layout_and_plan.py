"""Layouts agree with DTensor's own shards, and plans are complete, balanced and bounded."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from tests.distributed import run_distributed
from trainer.optim.communication import Flight
from trainer.optim.layout import Block, Layout, _read_placements, layout_of
from trainer.optim.pipeline import _assemble, _to_send
from trainer.optim.plan import assign_owners, cut_rounds, plan_chunks

PLACEMENTS = [
    ((4,), (Shard(0),)),
    ((4,), (Shard(1),)),
    ((4,), (Replicate(),)),
    ((2, 2), (Replicate(), Shard(0))),
    ((2, 2), (Shard(0), Shard(1))),
    ((2, 2), (Shard(0), Shard(0))),
    ((2, 2), (Shard(-1), Replicate())),
]


@pytest.mark.distributed
def test_layouts_are_those_of_dtensor():
    full = torch.arange(7 * 5.0).view(7, 5)

    def run(rank):
        for mesh_shape, placements in PLACEMENTS:
            tensor = distribute_tensor(full, init_device_mesh("cpu", mesh_shape), placements)
            layout = layout_of(tensor, ())
            rebuilt = torch.full_like(full, -1)
            for position in layout.sources(rank):
                block = layout.blocks[position]
                part = torch.empty(block.shape)
                for source, target in block.tiles(full, part):
                    target.copy_(source)
                if position == rank:
                    assert torch.equal(part, tensor.to_local())
                for target, source in block.tiles(rebuilt, part):
                    target.copy_(source)
            assert torch.equal(rebuilt, full)

    run_distributed(run, 4)


def test_strided_shards_interleave():
    # rows 0-3 and 4-7 lie on the two tensor-parallel ranks; data-parallel rank 0 holds the first half of each
    layout = _read_placements(torch.tensor([[0, 1], [2, 3]]), (_StridedShard(0, split_factor=2), Shard(0)), (8, 3))
    assert [block.row_runs for block in layout.blocks] == [((0, 2),), ((4, 6),), ((2, 4),), ((6, 8),)]
    layout = _read_placements(torch.tensor([0, 1]), (_StridedShard(0, split_factor=2),), (8, 3))
    assert [block.row_runs for block in layout.blocks] == [((0, 2), (4, 6)), ((2, 4), (6, 8))]


def test_copies_over_two_axes_are_told_apart():
    placements = (Replicate(), Shard(0), Replicate())
    layout = _read_placements(torch.arange(8).view(2, 2, 2), placements, (4, 4))
    assert layout.replicas == (0, 1, 0, 1, 2, 3, 2, 3)


def test_partial_sums_are_refused():
    with pytest.raises(ValueError, match="MuonClip takes shards and replicas"):
        _read_placements(torch.tensor([0, 1]), (Partial(),), (4, 4))


def row_layout(shape: tuple[int, int], ranks: int, copies: int = 1) -> Layout:
    mesh = torch.arange(ranks * copies).view(copies, ranks)
    return _read_placements(mesh, (Replicate(), Shard(0)), shape)


def cost_of(rows: int, columns: int) -> int:
    """Something like the work of Newton-Schulz."""
    return 6 * min(rows, columns) ** 2 * max(rows, columns) + 14 * min(rows, columns) ** 3


# Motif-2-12.7B's matrices: a layer has gate, up, down, q, k, v, o
FULL_MODEL = [(16384, 4096), (16384, 4096), (4096, 16384), (5120, 4096), (2048, 4096), (2048, 4096), (4096, 8192)] * 40


def test_full_model_is_balanced_on_eight_ranks():
    costs = [cost_of(*shape) for shape in FULL_MODEL]
    loads = [0] * 8
    for cost, owner in zip(costs, assign_owners(costs, 8), strict=True):
        loads[owner] += cost
    assert max(loads) == min(loads)


def test_longest_first_is_close_to_even_where_nothing_divides():
    costs = [cost_of(*shape) for shape in FULL_MODEL]
    loads = [0] * 24
    for cost, owner in zip(costs, assign_owners(costs, 24), strict=True):
        loads[owner] += cost
    assert max(loads) < 1.02 * sum(loads) / 24
    in_turn = assign_owners(costs, 24, balanced=False)
    assert in_turn[:25] == [*range(24), 0]


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("balanced", [True, False])
def test_rounds_hold_every_matrix_once_within_bounds(chunk_size, balanced):
    layouts = [row_layout(shape, 3) for shape in [(8, 4), (4, 8), (2, 4), (2, 4), (3, 4), (8, 4), (2, 2)] * 3]
    costs = [cost_of(*layout.shape) for layout in layouts]
    owners = assign_owners(costs, 3, balanced)
    rounds = cut_rounds(layouts, owners, costs, chunk_size, balanced)
    assert sorted(n for owned_by in rounds for owned in owned_by for n in owned) == list(range(len(layouts)))
    for owned_by in rounds:
        for position, owned in enumerate(owned_by):
            assert all(owners[n] == position for n in owned)
            if chunk_size:
                assert sum(layouts[n].shape[0] * layouts[n].shape[1] for n in owned) <= chunk_size * 32
    if chunk_size is None:
        assert len(rounds) == 1


def test_routes_of_all_ranks_fit_together():
    layouts = [row_layout(shape, 3, copies=2) for shape in [(8, 4), (2, 4), (5, 7), (4, 8), (1, 3)]]
    plans = [plan_chunks(layouts, me, cost_of, 1, True) for me in range(6)]
    assert len({len(plan) for plan in plans}) == 1
    for chunks in zip(*plans, strict=True):
        for routes in ([chunk.gather for chunk in chunks], [chunk.scatter for chunk in chunks]):
            for me in range(6):
                for peer in range(6):
                    assert routes[me].send_splits[peer] == routes[peer].receive_splits[me]
                    sent = [(p.matrix, p.block) for p in routes[me].sends if p.peer == peer]
                    assert sent == [(p.matrix, p.block) for p in routes[peer].receives if p.peer == me]
        # replicas do not gather twice what one of them has
        gathered = sum(sum(chunk.gather.receive_splits) for chunk in chunks)
        assert gathered == sum(layouts[n].shape[0] * layouts[n].shape[1] for chunk in chunks for n in chunk.owned)


@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2), (1, 6), (2, 2, 2)])
@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0),),
        (Shard(1),),
        (Shard(0), Shard(1)),
        (_StridedShard(0, split_factor=2),),
        (Shard(1), Shard(0), Shard(1)),  # of (2, 5), equal tiles follow each other upwards
    ],
)
def test_strips_copy_what_pieces_are(mesh_shape, placements):
    placements = (*[Replicate()] * (len(mesh_shape) - len(placements)), *placements)[-len(mesh_shape) :]
    mesh = torch.arange(torch.tensor(mesh_shape).prod()).view(mesh_shape)
    layouts = [_read_placements(mesh, placements, shape) for shape in [(12, 8), (8, 12), (7, 5), (2, 5)]]
    layouts = [layout for layout in layouts for _ in range(mesh.numel())]  # each rank owns one of each shape
    chunk = plan_chunks(layouts, 0, cost_of, None, False)[0]
    received = torch.arange(-7, sum(chunk.gather.receive_splits))[7:]  # not at its memory's start
    by_strip, by_piece = ({n: torch.full(layouts[n].shape, -1) for n in chunk.owned} for _ in range(2))
    for strip in chunk.gather.receive_strips:
        in_matrix, in_buffer = strip.views(by_strip[strip.matrix], received)
        in_matrix.copy_(in_buffer)
    for local, full in tiles_of(chunk.gather.receives, received, by_piece):
        full.copy_(local)
    assert all(torch.equal(by_strip[n], by_piece[n]) for n in by_strip)
    wholes = {n: torch.randn(layouts[n].shape) for n in chunk.owned}
    sent_by_strip, sent_by_piece = (torch.zeros(7 + sum(chunk.scatter.send_splits))[7:] for _ in range(2))
    for strip in chunk.scatter.send_strips:
        in_matrix, in_buffer = strip.views(wholes[strip.matrix], sent_by_strip)
        in_buffer.copy_(in_matrix)
    for local, full in tiles_of(chunk.scatter.sends, sent_by_piece, wholes):
        local.copy_(full)
    assert torch.equal(sent_by_strip, sent_by_piece)
    assert all(sent_by_piece != 0)


def tiles_of(pieces, buffer, wholes):
    """Views of each tile of the pieces, in the buffer and in its matrix."""
    for piece in pieces:
        local = buffer[piece.offset : piece.offset + piece.block.numel].view(piece.block.shape)
        for full, tile in piece.block.tiles(wholes[piece.matrix], local):
            yield tile, full


@pytest.mark.slow
def test_even_shards_take_one_copy_a_matrix_on_any_number_of_ranks():
    layouts = [row_layout((128, 4), 64) for _ in range(70)]
    chunk = plan_chunks(layouts, 5, cost_of, None, True)[0]
    assert len(chunk.owned) == 2
    assert len(chunk.gather.receives) == 128
    assert [strip.count for strip in chunk.gather.receive_strips] == [64, 64]
    assert [strip.count for strip in chunk.scatter.send_strips] == [64, 64]


def test_replicas_can_work_apart():
    layout = row_layout((8, 4), 2, copies=4)
    assert layout.among(5, max_replicas=4) == layout
    pair = layout.among(5, max_replicas=2)
    assert (pair.team, pair.replicas) == ((4, 5, 6, 7), (2, 2, 3, 3))
    assert pair.blocks == layout.blocks[4:]
    assert layout.among(5, max_replicas=1).team == (4, 5)


def test_a_copy_everywhere_is_gathered_from_the_owner_itself():
    whole = Block(((0, 4),), ((0, 6),))
    layout = Layout((4, 6), (0, 1), (whole, whole), (0, 1))
    chunk = plan_chunks([layout], 0, cost_of, 1, True)[0]
    assert chunk.gather.send_splits == (24, 0)
    assert chunk.scatter.send_splits == (24, 24)


@pytest.mark.parametrize(
    ("placement", "shapes", "in_place"),
    [
        (Shard(0), [(8, 6)], True),
        (Shard(0), [(7, 5)], True),  # uneven shards still follow each other
        (Shard(0), [(8, 6), (8, 6)], False),  # each rank sends its part of both
        (Shard(1), [(8, 6)], False),
        (Replicate(), [(4, 6), (4, 6), (3, 5)], True),
        (Replicate(), [(4, 6), (6, 4)], True),  # one batch in two parts
    ],
)
def test_matrices_are_worked_on_where_they_arrive_and_sent_from_there(placement, shapes, in_place):
    team_size = 3
    layouts = [_read_placements(torch.arange(team_size), (placement,), shape) for shape in shapes]
    layouts += layouts * (team_size - 1)  # each rank owns the first ones or others like them
    wholes = [torch.randn(layout.shape) for layout in layouts]
    chunk = plan_chunks(layouts, 1, cost_of, None, False)[0]
    assert chunk.owned
    pieces = []
    for piece in chunk.gather.receives:
        part = torch.empty(piece.block.shape)
        for source, target in piece.block.tiles(wholes[piece.matrix], part):
            target.copy_(source)
        pieces.append(part.flatten())
    received = torch.cat([torch.empty(4), *pieces])[4:]  # not at its memory's start
    batches = _assemble(chunk, [layout.shape for layout in layouts], Flight(received))
    assert len(batches) == len({tuple(sorted(layouts[number].shape)) for number in chunk.owned})
    parts = [part for batch in batches for part in batch]
    assert sorted(number for numbers, _ in parts for number in numbers) == sorted(chunk.owned)
    for numbers, matrices in parts:
        assert all(torch.equal(matrices[index], wholes[number]) for index, number in enumerate(numbers))
        assert (matrices.untyped_storage().data_ptr() == received.untyped_storage().data_ptr()) == in_place
    sent = _to_send(chunk, parts, torch.float32, received.device)
    assert len(sent) == sum(chunk.scatter.send_splits)
    for piece in chunk.scatter.sends:
        local = sent[piece.offset : piece.offset + piece.block.numel].view(piece.block.shape)
        for full, part in piece.block.tiles(wholes[piece.matrix], local):
            assert torch.equal(full, part)
    aliased = sent.untyped_storage().data_ptr() == received.untyped_storage().data_ptr()
    assert aliased == (in_place and isinstance(placement, Shard))
