"""Parallel MuonClip on paper: a step of the 12.7B on 2 to 512 ranks, from kernel times and link speeds.

    python benchmarks/muonclip_scaling.py [--milliseconds 4.40 4.40 2.58 0.515 3.08] [--memory 3.8] [--link 264]
    python benchmarks/muonclip_scaling.py --milliseconds 7.03 7.03 2.57 0.474 3.79 --chunk_size 4  # the classic form

The optimizer's own plan is simulated round by round: a gather waits for the network and for every rank to have packed,
a rank's products wait for its gather, a scatter for the slowest owner, and beside traffic products are slower. Eight
ranks share a node. The first table holds what was measured: 10 layers on 2 ranks, 20 and 40 on 4, 40 on 8.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import Replicate, Shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.optim.layout import Layout, _read_placements
from trainer.optim.plan import assign_owners, cut_rounds

NUM_LAYERS, RANKS_A_NODE = 40, 8
# matrices a layer: shape, how many, and milliseconds of Newton-Schulz for one on an H200
SHAPES = (((16384, 4096), 2), ((4096, 16384), 1), ((5120, 4096), 1), ((2048, 4096), 2), ((4096, 8192), 1))
MILLISECONDS = (4.40, 4.40, 2.58, 0.515, 3.08)
NETWORK_BYTES_PER_MS = 45e6  # assumption: one 400 Gbit/s adapter a rank, each way
PEER_MS = 0.003  # assumption: cost of each peer in an all-to-all
WIRE_BYTES = 2
ELEMENTWISE_BYTES = 4 + 14 + 10  # float32: finiteness check, momentum and direction, decay and update
OWNER_BYTES = 4 + 4  # from the received buffer to whole matrices, and from updates to the sent one, if not just one
FIXED_MS = 1.5  # agreement beside its bytes, and the host's launches before the first product; measured on two H200s
LOST_BESIDE = 0.28  # of the time that the network takes, what products beside it lose; measured there too


@dataclass(frozen=True)
class Machine:
    """What a GPU and its node can do.

    Args:
        milliseconds: Newton-Schulz time of a matrix by shape.
        memory: terabytes a second of a copy, read plus written.
        link: gigabytes a second that a rank sends to the others of its node in an all-to-all.
    """

    milliseconds: dict[tuple[int, int], float]
    memory: float
    link: float


def simulate(
    shards: int, together: int, chunk_size: int, machine: Machine, layers: int = NUM_LAYERS, pipelined: bool = True
) -> dict[str, float]:
    """One step.

    Args:
        shards: ranks that split each matrix.
        together: copies that share a matrix's work; others repeat it.
        chunk_size: as `ParallelMuonClip`'s.
        machine: that it runs on.
        layers: of the model.
        pipelined: transfers run beside the products of their neighbours.

    Returns:
        dict: step_ms, compute_ms (slowest rank), balance (mean / slowest), network_ms, memory_gb.
    """
    mesh = torch.arange(shards * together).view(together, shards)
    shapes = [shape for _ in range(layers) for shape, count in SHAPES for _ in range(count)]
    by_shape = {shape: _read_placements(mesh, (Replicate(), Shard(0)), shape) for shape, _ in SHAPES}
    layouts, costs = [by_shape[shape] for shape in shapes], [machine.milliseconds[shape] for shape in shapes]
    owners = assign_owners(costs, mesh.numel())
    rounds = cut_rounds(layouts, owners, costs, chunk_size, True)
    compute = [[sum(costs[n] for n in owned) for owned in owned_by] for owned_by in rounds]
    traffic = [transfer_ms(layouts, owned_by, shards, together, machine.link) for owned_by in rounds]
    sizes = [rows * columns for rows, columns in shapes]
    copied = sum(sizes[n] for owned_by in rounds for owned in owned_by if len(owned) > 1 for n in owned)
    local_bytes = sum(sizes) * ELEMENTWISE_BYTES / shards + copied * OWNER_BYTES / mesh.numel()
    local_ms = local_bytes / (1e9 * machine.memory) + FIXED_MS
    totals = [sum(per_round) for per_round in zip(*compute, strict=True)]
    largest = max(sum(sizes[n] for n in owned) for owned_by in rounds for owned in owned_by)
    shard = max(sum(sizes[n] for owned in owned_by for n in owned) for owned_by in rounds) / shards
    squares = 5 * max(min(shape) for shape in shapes) ** 2
    # gather ahead: sent, received; products: batch, working copy of one more, squares; scatter behind: sent, received
    held = shard / together + largest + largest + (largest + max(sizes)) + squares + together * largest + shard
    in_turn = sum(max(costs) + sum(both) for costs, both in zip(compute, traffic, strict=True))
    return {
        "step_ms": (pipeline_ms(compute, traffic) if pipelined else in_turn) + local_ms,
        "compute_ms": max(totals),
        "balance": sum(totals) / len(totals) / max(totals),
        "network_ms": sum(gather + scatter for gather, scatter in traffic),
        "memory_gb": WIRE_BYTES * held / 1e9,
    }


def transfer_ms(layouts: list[Layout], owned_by: list, shards: int, together: int, link: float) -> tuple[float, float]:
    """Milliseconds of a round's gather and scatter: the busiest rank's bytes, within and beyond its node."""
    owned = [sum(layouts[n].shape[0] * layouts[n].shape[1] for n in numbers) * WIRE_BYTES for numbers in owned_by]
    ranks = shards * together
    shard_bytes = sum(owned) / shards  # of this round's matrices, what one rank holds
    return tuple(
        link_ms(busiest, peers, link) for busiest, peers in ((max(max(owned), shard_bytes / together), shards),
                                                       (max(max(owned) * together, shard_bytes), ranks))
    )  # fmt: skip


def link_ms(busiest_bytes: float, peers: int, link: float) -> float:
    """Time to move `busiest_bytes` evenly from or to `peers` ranks."""
    inside = min(RANKS_A_NODE, peers) / peers
    within = busiest_bytes * inside * (1 - 1 / min(RANKS_A_NODE, peers)) / (1e6 * link)
    return max(within, busiest_bytes * (1 - inside) / NETWORK_BYTES_PER_MS) + PEER_MS * peers


def pipeline_ms(compute: list[list[float]], traffic: list[tuple[float, float]]) -> float:
    """End of the last scatter when gathers run one round ahead and ranks wait for each other in the network only."""
    stream = [0.0] * len(compute[0])
    network = gathered = traffic[0][0]
    scattered = 0.0
    for index, costs in enumerate(compute):
        arrived, lost = gathered, LOST_BESIDE * traffic[index - 1][1] if index else 0.0
        if index + 1 < len(compute):
            network = gathered = max(network, max(stream)) + traffic[index + 1][0]
            lost += LOST_BESIDE * traffic[index + 1][0]
        stream = [max(free, arrived) + cost + lost for free, cost in zip(stream, costs, strict=True)]
        stream = [max(free, scattered) for free in stream]  # the round before is applied
        network = scattered = max(network, max(stream)) + traffic[index][1]
    return scattered


def main() -> None:
    """Print the tables of docs/parallel_muonclip.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, nargs=5, default=MILLISECONDS, metavar="MS",
                        help=f"Newton-Schulz of {[shape for shape, _ in SHAPES]}")  # fmt: skip
    parser.add_argument("--memory", type=float, default=3.8, help="TB/s of a copy; an H200's")
    parser.add_argument("--link", type=float, default=264.0, help="GB/s of an all-to-all in a node")
    parser.add_argument("--chunk_size", type=int, default=1, help="large matrices a rank owns in a round")
    arguments = parser.parse_args()
    times = {shape: value for (shape, _), value in zip(SHAPES, arguments.milliseconds, strict=True)}
    machine = Machine(times, arguments.memory, arguments.link)
    small = [("FSDP", 2, 1, 1, 10), ("FSDP", 4, 1, 1, 20), ("FSDP", 4, 1, 1, 40), ("HSDP", 2, 2, 2, 20),
             ("HSDP", 2, 2, 1, 20), ("HSDP", 2, 2, 2, 40), ("FSDP", 8, 1, 1, 40), ("HSDP", 4, 2, 2, 40)]  # fmt: skip
    rows = [("FSDP", ranks, 1, 1) for ranks in (8, 16, 32, 64, 128, 256, 512)]
    rows += [("HSDP", 8, copies, together) for copies, together in ((2, 2), (8, 1), (8, 2), (8, 8), (64, 1), (64, 2))]
    rows += [("HSDP", 64, 8, together) for together in (1, 2, 8)]
    header = ("layout", "ranks", "shards", "together", "step ms", "products ms", "balance", "network ms", "memory GB")
    print("| layers | " + " | ".join(header) + " | not pipelined ms |\n" + "|---" * (len(header) + 2) + "|")
    for name, shards, copies, together, layers in small:
        result = simulate(shards, together, arguments.chunk_size, machine, layers)
        in_turn = simulate(shards, together, arguments.chunk_size, machine, layers, pipelined=False)["step_ms"]
        values = f"{name} | {shards * copies} | {shards} | {together} | {figures(result)}"
        print(f"| {layers} | {values} | {in_turn:.1f} |")
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for name, shards, copies, together in rows:
        result = simulate(shards, together, arguments.chunk_size, machine)
        print(f"| {name} | {shards * copies} | {shards} | {together} | {figures(result)} |")


def figures(result: dict[str, float]) -> str:
    """A simulated step's columns."""
    columns = (("step_ms", 1), ("compute_ms", 1), ("balance", 2), ("network_ms", 1), ("memory_gb", 2))
    return " | ".join(f"{result[key]:.{digits}f}" for key, digits in columns)


if __name__ == "__main__":
    main()
