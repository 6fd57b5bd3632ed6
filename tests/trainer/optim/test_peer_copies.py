"""Copies into peers' buffers bring what the plan's all-to-all brings; on GPUs, steps have the same bits."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed
from tests.trainer.optim.helpers import Bag, attention_of, groups_of, train
from tests.trainer.optim.test_layout_and_plan import cost_of, row_layout
from tests.trainer.optim.test_parallel_muon_clip import OPTIONS, fsdp, fsdp_on, hsdp, single_result
from trainer.optim import ParallelMuonClip, communication
from trainer.optim.peer_copies import PeerCopies
from trainer.optim.plan import plan_chunks

SHAPES = [(16, 12), (7, 9), (2, 30), (12, 16), (11, 8), (5, 5)]  # over three ranks: uneven, and one rank without rows


def on_one_process(monkeypatch, ranks: int) -> list[PeerCopies]:
    """The copies of all ranks, with their buffers in this process's memory and nothing to wait for."""
    buffers = [torch.zeros(10_000, dtype=torch.uint8) for _ in range(ranks)]
    stream = SimpleNamespace(wait_stream=lambda _: None, record_event=lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    team = [PeerCopies(None, me, torch.device("cpu"), 1.0) for me in range(ranks)]
    for copies in team:
        copies.peers, copies._handle = buffers, SimpleNamespace(barrier=lambda **_: None)
        monkeypatch.setattr(copies, "_allocate", lambda size, copies=copies: setattr(copies, "slot_bytes", size))
    return team


@pytest.mark.parametrize("ranks", [2, 3])
def test_pieces_land_where_they_are_looked_for(monkeypatch, ranks):
    layouts = [row_layout(shape, ranks) for shape in SHAPES]
    plans = [plan_chunks(layouts, me, cost_of, 1, True) for me in range(ranks)]
    team = on_one_process(monkeypatch, ranks)
    splits = [torch.tensor([[c.gather.receive_splits, c.scatter.receive_splits] for c in plan]) for plan in plans]
    monkeypatch.setattr(dist, "get_world_size", lambda _: ranks)
    monkeypatch.setattr(dist, "all_gather", lambda parts, *_, **__: torch._foreach_copy_(parts, splits))
    for copies, plan in zip(team, plans, strict=True):
        copies.reserve(plan, 4)
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
        torch.cuda.current_stream = lambda: SimpleNamespace(wait_event=lambda _: None)
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
        assert team.copies._landings, "nothing went this way"
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
