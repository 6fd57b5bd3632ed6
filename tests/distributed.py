"""Run one function on several ranks of this machine: gloo on CPU, NCCL on accelerators."""

import os
import socket
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Counts what goes between ranks, by operator."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def run_distributed(fn: Callable, world_size: int, *args, backend: str = "gloo", timeout_seconds: int = 120) -> list:
    """Call `fn(rank, *args)` on `world_size` processes joined in one process group.

    Args:
        fn: runs on every rank; with gloo the ranks are forked, so a closure will do.
        world_size: number of ranks.
        backend: "gloo" or "nccl".
        timeout_seconds: limit of a collective, and of the whole call.

    Returns:
        list: what `fn` returned on each rank, in order of rank.

    Raises:
        RuntimeError: a rank raised (its traceback is in the message), died, or did not end in time.
    """
    context = mp.get_context("fork" if backend == "gloo" else "spawn")
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        ranks = [
            context.Process(target=_rank_main, args=(fn, rank, world_size, args, backend, port, folder))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(timeout_seconds)
        stuck = [index for index, rank in enumerate(ranks) if rank.is_alive()]
        for rank in ranks:
            rank.kill()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error_*"))]
        if errors:
            raise RuntimeError("\n".join(errors))
        if stuck:
            raise RuntimeError(f"ranks {stuck} did not end within {timeout_seconds} s")
        return [torch.load(Path(folder) / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(fn, rank: int, world_size: int, args: tuple, backend: str, port: int, folder: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size)
        torch.save(fn(rank, *args), Path(folder) / f"result_{rank}.pt")
        dist.barrier()
    except BaseException:
        (Path(folder) / f"error_{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os._exit(0)
