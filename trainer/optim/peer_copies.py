"""An all-to-all by the copy engines of one node's GPUs, which leave all multiprocessors to the products.

NCCL moves data with kernels. Here every rank writes its pieces straight into its peers' receive buffers, as plain
copies on a stream of its own; the buffers lie in memory that all ranks map (PyTorch's symmetric memory). A barrier
before the copies says that the buffers are free everywhere, one after them that all pieces have come.

Legend: R ranks of the team, C rounds, 2 directions: gather and scatter.
"""

import itertools
import socket
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.optim.plan import Chunk, Route

# Buffers of each direction: one arrives while the other is worked on.
_TURNS = 2
_ALIGNMENT = 256


class Arrival:
    """What a collective's `Work` is to its caller: `wait()` makes the current stream of `device` wait."""

    def __init__(self, event: torch.cuda.Event, device: torch.device):
        self.event, self.device = event, device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


class PeerCopies:
    """Receive buffers that the ranks of a team write into.

    Args:
        group: of the team, all on one node.
        me: this rank's position in it.
        device: of the buffers.
        timeout_seconds: how long a barrier waits for a rank that does not come; then its kernel traps, and CUDA
            reports a failed launch at the host's next wait.

    Raises:
        ValueError: from `reserve`, where the ranks are on several hosts.
    """

    def __init__(self, group: dist.ProcessGroup, me: int, device: torch.device, timeout_seconds: float):
        self.group, self.me, self.device = group, me, device
        self.timeout_ms = int(1000 * timeout_seconds)
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.slot_bytes, self.peers, self._handle, self._buffer = 0, [], None, None
        self._turns = [0, 0]

    @property
    def reserved_bytes(self) -> int:
        """Memory of this rank's receive buffers."""
        return 2 * _TURNS * self.slot_bytes

    def reserve(self, chunks: Sequence[Chunk], itemsize: int) -> tuple[Chunk, ...]:
        """Make buffers that hold any round; the chunks, with where this rank's pieces land in the peers' buffers.

        All ranks call it together, with their own chunks of one plan.
        """
        size = dist.get_world_size(self.group)
        own = [[chunk.gather.receive_splits, chunk.scatter.receive_splits] for chunk in chunks]
        splits = torch.tensor(own, device=self.device)  # (C, 2, R)
        parts = [torch.empty_like(splits) for _ in range(size)]
        dist.all_gather(parts, splits, group=self.group)
        gathered = torch.stack(parts)  # (R, C, 2, R)
        offsets = gathered[..., : self.me].sum(-1).permute(1, 2, 0).tolist()  # (C, 2, R)
        needed = max(1, int(gathered.sum(-1).max())) * itemsize
        if needed > self.slot_bytes:
            self._allocate(-(-needed // _ALIGNMENT) * _ALIGNMENT)
        return tuple(
            replace(
                chunk,
                gather=replace(chunk.gather, landings=tuple(gather)),
                scatter=replace(chunk.scatter, landings=tuple(scatter)),
            )
            for chunk, (gather, scatter) in zip(chunks, offsets, strict=True)
        )

    def _allocate(self, slot_bytes: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        ranks = range(dist.get_world_size(self.group))
        hosts: list[str | None] = [None] * len(ranks)
        dist.all_gather_object(hosts, socket.gethostname(), group=self.group)
        if len(set(hosts)) > 1:
            raise ValueError(f"copy_engines is set with ranks on {sorted(set(hosts))}: they must share one host")
        torch.cuda.synchronize(self.device)  # copies into the old buffers
        dist.barrier(self.group)
        self.peers, self._handle, self._buffer = [], None, None  # the old ones go before the new ones come
        total = 2 * _TURNS * slot_bytes
        buffer = symmetric_memory.empty(total, dtype=torch.uint8, device=self.device)
        self._handle = symmetric_memory.rendezvous(buffer, self.group)
        self.peers = [self._handle.get_buffer(rank, (total,), torch.uint8) for rank in ranks]
        self.slot_bytes, self._buffer = slot_bytes, buffer

    def exchange(self, send: Tensor, route: Route, scatter: bool) -> tuple[Tensor, Arrival]:
        """Start copying flat `send` along a route of `reserve`; what arrives here, and when it may be read."""
        slot = (_TURNS * scatter + self._turns[scatter]) * self.slot_bytes
        self._turns[scatter] = (self._turns[scatter] + 1) % _TURNS
        ranks = len(route.send_splits)
        starts = [0, *itertools.accumulate(route.send_splits)]
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self._handle.barrier(channel=0, timeout_ms=self.timeout_ms)
            for peer in ((self.me + step) % ranks for step in range(1, ranks + 1)):  # each rank with another peer
                part = send[starts[peer] : starts[peer + 1]]
                if part.numel():
                    self._view(peer, slot, route.landings[peer], part.numel(), send.dtype).copy_(part)
            self._handle.barrier(channel=0, timeout_ms=self.timeout_ms)
            arrived = self.stream.record_event()
        return self._view(self.me, slot, 0, sum(route.receive_splits), send.dtype), Arrival(arrived, self.device)

    def _view(self, rank: int, slot: int, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        start = slot + offset * dtype.itemsize
        return self.peers[rank][start : start + count * dtype.itemsize].view(dtype)
