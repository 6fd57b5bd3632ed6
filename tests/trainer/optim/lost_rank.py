"""One of two ranks, of which the second is lost in its third step: `python -m tests.trainer.optim.lost_rank …`.

Arguments: rank, port, backend ("gloo" or "nccl"), whether copy engines carry matrices ("0" or "1"), what becomes of
the second rank ("dies before", "stays away", "dies within", "hangs within" the step). The first rank prints "READY"
before its third step, and how that ends.
"""

import os
import resource
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from trainer.optim import ParallelMuonClip

TIMEOUT_SECONDS = 5


def lose_itself(optimizer: ParallelMuonClip, how: str) -> None:
    """Die or stop, at once or where the next step works on its first matrix."""

    def lost(*_, **__) -> None:
        if how.startswith("dies"):
            os._exit(3)
        time.sleep(600)

    if not how.endswith("within"):
        lost()
    optimizer.orthogonalise.kernels.newton_schulz = lost
    optimizer.step()


def main(rank: int, port: str, backend: str, copy_engines: bool, how: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a process that aborts would first write all its memory down
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    where = {"init_method": f"tcp://127.0.0.1:{port}", "rank": rank, "world_size": 2}
    dist.init_process_group(backend, **where, timeout=timedelta(seconds=60))
    mesh = init_device_mesh(device.type, (2,))
    torch.manual_seed(0)
    parameters = []
    for _ in range(4):
        weight, gradient = (
            distribute_tensor(torch.randn(512, 512, device=device), mesh, [Shard(0)]) for _ in range(2)
        )
        parameters.append(torch.nn.Parameter(weight))
        parameters[-1].grad = gradient
    optimizer = ParallelMuonClip(parameters, lr=0.01, timeout_seconds=TIMEOUT_SECONDS, copy_engines=copy_engines)
    for _ in range(2):
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        return lose_itself(optimizer, how)
    print("READY", flush=True)
    try:
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print("the step went through", flush=True)
    except Exception as error:
        print(f"raised {type(error).__name__}: {error}", flush=True)
        os._exit(5)  # an orderly end would wait for the lost rank
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "1", sys.argv[5])
