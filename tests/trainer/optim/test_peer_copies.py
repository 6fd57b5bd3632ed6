"""Copies into peers' buffers bring what the plan's all-to-all brings; on GPUs, steps have the same bits."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from tests.distributed import run_distributed
from tests.trainer.optim.helpers import Bag, attention_of, groups_of, train
from tests.trainer.optim.test_layout_and_plan import cost_of
from tests.trainer.optim.test_parallel_muon_clip import OPTIONS, fsdp, fsdp_on, hsdp, single_result
from trainer.optim import ParallelMuonClip, communication
from trainer.optim.layout import Layout, _read_placements
from trainer.optim.peer_copies import PeerCopies
from trainer.optim.plan import Route, plan_chunks

SHAPES = [(16, 12), (7, 9), (2, 30), (12, 16), (11, 8), (5, 5)]  # over three ranks: uneven, and one rank without rows
LAYOUTS = {
    "FSDP on 2": ((2,), (Shard(0),)),
    "FSDP on 3": ((3,), (Shard(0),)),
    "columns": ((8,), (Shard(1),)),
    "copies": ((3,), (Replicate(),)),
    "HSDP 2 x 4": ((2, 4), (Replicate(), Shard(0))),
    "HSDP 4 x 2 by columns": ((4, 2), (Replicate(), Shard(1))),
    "FSDP over TP": ((2, 4), (_StridedShard(0, split_factor=4), Shard(0))),
    "FSDP by rows, TP by columns": ((2, 4), (Shard(0), Shard(1))),
    "TP with copies": ((2, 2), (Shard(1), Replicate())),
}


def on_one_process(monkeypatch, ranks: int) -> list[PeerCopies]:
    """The copies of all ranks, with their buffers in this process's memory and nothing to wait for."""
    buffers = [torch.zeros(10_000, dtype=torch.uint8) for _ in range(ranks)]
    stream = SimpleNamespace(wait_stream=lambda _: None, record_event=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    team = [PeerCopies(None, me, torch.device("cpu"), 1.0) for me in range(ranks)]
    for copies in team:
        copies.peers, copies._handle = buffers, SimpleNamespace(barrier=lambda **_: None)
        monkeypatch.setattr(copies, "_allocate", lambda size, copies=copies: setattr(copies, "slot_bytes", size))
    return team


def gather_locally(monkeypatch, plans: list) -> None:
    """Let `reserve` gather the splits of these plans, one of each rank, without a process group."""
    splits = [torch.tensor([[c.gather.receive_splits, c.scatter.receive_splits] for c in plan]) for plan in plans]
    monkeypatch.setattr(dist, "get_world_size", lambda _: len(plans))
    monkeypatch.setattr(dist, "all_gather", lambda parts, *_, **__: torch._foreach_copy_(parts, splits))


def teams_of(layout: str, replicas: int) -> list[list[Layout]]:
    """The layouts of `SHAPES` for each team that works together, with so many copies in each."""
    shape, placements = LAYOUTS[layout]
    mesh = torch.arange(torch.Size(shape).numel()).view(shape)
    whole = [_read_placements(mesh, placements, shape) for shape in SHAPES]
    of_ranks = [[layout.among(rank, replicas) for layout in whole] for rank in range(mesh.numel())]
    return list({layouts[0].team: layouts for layouts in of_ranks}.values())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("replicas", [1, 2, 99])
def test_pieces_land_where_they_are_looked_for(monkeypatch, layout, chunk_size, replicas):
    for layouts in teams_of(layout, replicas):
        ranks = range(len(layouts[0].team))
        plans = [plan_chunks(layouts, me, cost_of, chunk_size, True) for me in ranks]
        compared = assert_pieces_land(monkeypatch, plans)
        assert compared == 2 * len(plans[0]) > 0  # a gather and a scatter a round


def assert_pieces_land(monkeypatch, plans: list) -> int:
    """Exchange along all routes of the plans and compare with an all-to-all worked out by hand; how many were."""
    ranks = len(plans)
    team = on_one_process(monkeypatch, ranks)
    gather_locally(monkeypatch, plans)
    plans = [copies.reserve(plan, 4) for copies, plan in zip(team, plans, strict=True)]
    kept = []
    for rounds in zip(*plans, strict=True):
        for scatter in (False, True):
            routes = [chunk.scatter if scatter else chunk.gather for chunk in rounds]
            sent = [torch.randn(sum(route.send_splits)) for route in routes]
            arrived = [copies.exchange(send, route, scatter)[0]
                       for copies, send, route in zip(team, sent, routes, strict=True)]  # fmt: skip
            parts = [send.split(route.send_splits) for send, route in zip(sent, routes, strict=True)]
            expected = [torch.cat([part[me] for part in parts]) for me in range(ranks)]
            assert all(map(torch.equal, arrived, expected))
            kept.append((arrived, expected))
            for old, values in kept[-4:]:  # two rounds are under way at once
                assert all(map(torch.equal, old, values))
    return len(kept)


def test_it_waits_for_the_stream_of_its_own_device(monkeypatch):
    asked = []
    copies = on_one_process(monkeypatch, 2)[0]
    stream = SimpleNamespace(wait_event=lambda _: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: asked.append(device) or stream)
    copies.device, copies.slot_bytes = torch.device("cuda:1"), 64
    route = Route((), (), (2, 2), (2, 2), landings=(0, 0))
    copies.exchange(torch.zeros(4), route, False)[1].wait()
    assert asked == [(torch.device("cuda:1"),)] * 2


def test_ranks_of_several_hosts_are_refused(monkeypatch):
    allocate = PeerCopies._allocate
    copies = on_one_process(monkeypatch, 2)[0]
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda hosts, *_, **__: hosts.__setitem__(slice(None), ["a", "b"]))
    with pytest.raises(ValueError, match=r"ranks on \['a', 'b'\]: they must share one host"):
        allocate(copies, 256)


def test_other_devices_and_modes_are_refused():
    parameter = torch.nn.Parameter(torch.randn(4, 4))
    parameter.grad = torch.randn(4, 4)
    with pytest.raises(ValueError, match="copy_engines is set and the parameters are on cpu"):
        ParallelMuonClip([parameter], lr=0.1, copy_engines=True).step()
    with pytest.raises(ValueError, match="copy_engines is set and mode is 'distributed'"):
        ParallelMuonClip([parameter], lr=0.1, copy_engines=True, mode="distributed")


class SharedCopies(PeerCopies):
    """Copies between processes through shared memory, which block until they are done."""

    buffers: tuple[torch.Tensor, ...] = ()

    def __init__(self, *args):
        stream = SimpleNamespace(wait_stream=lambda _: None, record_event=lambda: None)
        torch.cuda.Stream = lambda *_, **__: stream  # in a forked process of its own
        torch.cuda.stream = lambda _: contextlib.nullcontext()
        torch.cuda.current_stream = lambda _: SimpleNamespace(wait_event=lambda _: None)
        super().__init__(*args)

    def _allocate(self, slot_bytes: int) -> None:
        self.slot_bytes, self.peers = slot_bytes, self.buffers
        assert self.reserved_bytes <= len(self.buffers[0])
        self._handle = SimpleNamespace(barrier=lambda **_: dist.barrier())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("shard", [fsdp, hsdp])
@pytest.mark.parametrize("chunk_size", [1, None])
def test_steps_through_shared_memory_have_the_bits_of_one_device(monkeypatch, shard, chunk_size):
    ranks = 4
    buffers = tuple(torch.zeros(100_000, dtype=torch.uint8).share_memory_() for _ in range(ranks))
    monkeypatch.setattr(SharedCopies, "buffers", buffers)
    monkeypatch.setattr(communication, "PeerCopies", SharedCopies)

    def run(rank):
        bag = Bag(torch.float32)
        shard(bag, ranks)
        attention = attention_of(bag, rank, ranks)
        optimizer = ParallelMuonClip(groups_of(bag), **OPTIONS, attentions=[attention], chunk_size=chunk_size)
        team = communication.Team(tuple(range(ranks)), 30.0, torch.device("cpu"), copy_engines=True)
        optimizer._teams[team.ranks] = team
        weights = train(bag, optimizer, attention)
        assert team.copies.slot_bytes, "nothing went this way"
        return weights

    expected = single_result(torch.float32)
    for result in run_distributed(run, ranks):
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[name], expected[name]) for name in expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="takes two GPUs")
@pytest.mark.parametrize("method", ["gram", "classic"])
def test_steps_have_the_bits_of_nccl(method):
    runs = [run_distributed(fsdp_on, 2, 2, "cuda", method, flag, backend="nccl")[0] for flag in (False, True)]
    assert runs[0].keys() == runs[1].keys()
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
