"""The ranks that share an optimizer, and the collectives they run: one all-to-all with exact sizes, one maximum.

A team has a process group of its own, so that its collectives neither wait for the training's nor delay them: NCCL
runs each group on a stream of its own, beside the products on the current stream.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from trainer.optim.peer_copies import Arrival, PeerCopies
from trainer.optim.plan import Chunk, Route


@dataclass
class Flight:
    """Buffers under way: `arrive()` returns the received one once the current stream may read it."""

    received: Tensor | None
    sent: Tensor | None = None
    work: dist.Work | Arrival | None = None
    team: "Team | None" = None

    def arrive(self) -> Tensor:
        """Wait (on NCCL: make the current stream wait) and hand the received buffer over, once."""
        if self.work is not None:
            with self.team.clear_errors():
                self.work.wait()
        received, self.received, self.sent, self.work = self.received, None, None, None
        return received


class Team:
    """Ranks that work together on the same parameters.

    Args:
        ranks: global ranks, ascending; this rank is one of them. One rank alone communicates nothing.
        timeout_seconds: how long a collective waits for a rank that does not come.
        device: of the tensors to come.
        copy_engines: let these carry what `exchange` moves, between GPUs of one node.
    """

    def __init__(self, ranks: Sequence[int], timeout_seconds: float, device: torch.device, copy_engines: bool = False):
        self.ranks, self.timeout_seconds, self.copy_engines = tuple(ranks), timeout_seconds, copy_engines
        self.me, self.group, self.copies = 0, None, None
        if len(self.ranks) > 1:
            self.me = self.ranks.index(dist.get_rank())
            with self.clear_errors():
                self.group = _new_group(self.ranks, timedelta(seconds=timeout_seconds))
                if device.type == "cuda":
                    self._connect(device)
                if copy_engines:
                    self.copies = PeerCopies(self.group, self.me, device, timeout_seconds)

    @contextlib.contextmanager
    def clear_errors(self):
        """Turn a collective's failure into an error that says what it means.

        Raises:
            RuntimeError: a rank has died, or did not come within the timeout.
        """
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._lost(error) from error

    @contextlib.contextmanager
    def clear_traps(self):
        """Turn a failed launch, by which a barrier of copy engines gives up, into an error that says what it means.

        Raises:
            RuntimeError: with copy engines, a launch has failed: most likely such a barrier's.
        """
        try:
            yield
        except torch.AcceleratorError as error:
            if self.copy_engines and "launch failure" in str(error):
                raise self._lost(error) from error
            raise

    def _lost(self, error: Exception) -> RuntimeError:
        return RuntimeError(
            f"MuonClip on rank {self.ranks[self.me]} lost a rank among {list(self.ranks)}: it died, or did not "
            f"reach the same step within {self.timeout_seconds} s. Look for that rank's own error, and restart "
            f"from the last checkpoint ({error})"
        )

    def _connect(self, device: torch.device) -> None:
        """Let NCCL connect every pair of ranks while there is memory for it: PyTorch may keep what a backward used."""
        torch.cuda.empty_cache()
        element = torch.zeros(len(self.ranks), device=device)  # one for each rank
        one_each = [1] * len(self.ranks)
        dist.all_to_all_single(element.clone(), element, one_each, one_each, group=self.group)
        dist.all_reduce(element, dist.ReduceOp.MAX, group=self.group)

    def reserve(self, chunks: Sequence[Chunk], itemsize: int) -> tuple[Chunk, ...]:
        """The chunks of a plan, ready to be exchanged along; `itemsize` bytes an element at most."""
        if self.copies is None:
            return tuple(chunks)
        with self.clear_errors():
            return self.copies.reserve(chunks, itemsize)

    def exchange(self, send: Tensor, route: Route, scatter: bool = False) -> Flight:
        """Start an all-to-all of flat `send` along `route`, to owners or back from them, without waiting for it."""
        if self.group is None:
            return Flight(send)
        if self.copies is not None:
            with self.clear_errors():
                received, arrival = self.copies.exchange(send, route, scatter)
            return Flight(received, send, arrival, self)
        receive = send.new_empty(sum(route.receive_splits))
        with self.clear_errors():
            work = dist.all_to_all_single(
                receive, send, list(route.receive_splits), list(route.send_splits), group=self.group, async_op=True
            )
        return Flight(receive, send, work, self)

    def maximum(self, values: Tensor) -> Tensor:
        """Elementwise maximum of `values` over the team, in place."""
        if self.group is not None:
            with self.clear_errors():
                dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def require_equal(self, number: int, what: str, device: torch.device) -> None:
        """Check that all ranks hold the same `number`.

        Raises:
            ValueError: they do not; `what` says what differs.
        """
        pair = self.maximum(torch.tensor([number, -number], dtype=torch.int64, device=device)).tolist()
        if pair[0] != -pair[1]:
            raise ValueError(
                f"{what} differ between ranks {list(self.ranks)}: give every rank the same parameters in the same "
                "order and the same settings, or pass `process_group` with the ranks that do share them"
            )


_groups_made: Counter = Counter()  # by their ranks


def _new_group(ranks: tuple[int, ...], timeout: timedelta) -> dist.ProcessGroup:
    """A process group that its own ranks alone take part in making, since others may not know of it."""
    world = dist.group.WORLD
    if len(ranks) == world.size():
        return dist.new_group(timeout=timeout)
    _groups_made[ranks] += 1
    # where the default group is bound to a device, NCCL would split the new communicator off the default one, and for
    # that all ranks of the world would have to come
    bound, world.bound_device_id = world.bound_device_id, None
    # PyTorch would name the group after how many groups this process knows, which may be others on other ranks
    named, name = distributed_c10d._hash_ranks_to_str, f"muon_clip {ranks} {_groups_made[ranks]}"
    distributed_c10d._hash_ranks_to_str = lambda *_: hashlib.sha256(name.encode()).hexdigest()
    try:
        return dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    finally:
        world.bound_device_id, distributed_c10d._hash_ranks_to_str = bound, named
