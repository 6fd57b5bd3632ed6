"""One optimizer step over the 12.7B's matrices, in the form of the report's Table 4, beside its peers.

    torchrun --nproc_per_node 8 benchmarks/parallel_muonclip.py --layers 40
    torchrun --nproc_per_node 4 benchmarks/parallel_muonclip.py --layers 20 40
    torchrun --nproc_per_node 2 benchmarks/parallel_muonclip.py --layers 10

The first number of layers gives a rank the same share each time, that of all 40 on eight; with further numbers only
the table is timed. First the results are compared with a float64 polynomial; nothing is timed if one is wrong. Then
every row is timed in this one run, beside the report's own, and written to `parallel_muonclip_x<ranks>_l<layers>.csv`
in $OUT, else in benchmarks/results/. After the timed steps a row's weights must have the bits of the other rows of its
method. With --peers DIR, other packages are timed too, if DIR holds them (what `pip download --no-deps` fetches,
unpacked), each for --peer_seconds at most. `--scale 64 --repeats 1` on gloo tries the program itself on a CPU; its
times mean nothing.

"Equivalent" TFLOPS count the classic form without symmetry (the table's own count), "executed" what the kernels do.
"""

import argparse
import contextlib
import csv
import gc
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parallel_muonclip_checks import check_kernels, check_step, compare_step
from benchmarks.parallel_muonclip_parts import (
    KINDS,
    profile_rows,
    time_agreement,
    time_batches,
    time_link,
    time_newton_schulz,
)
from benchmarks.parallel_muonclip_peers import time_peer, time_peers, time_torch_muon
from trainer.optim import ParallelMuonClip
from trainer.optim.orthogonalise import Orthogonaliser

LAYER = {
    "gate_proj": (16384, 4096),
    "up_proj": (16384, 4096),
    "down_proj": (4096, 16384),
    "q_proj": (5120, 4096),
    "k_proj": (2048, 4096),
    "v_proj": (2048, 4096),
    "o_proj": (4096, 8192),
}
TABLE = {
    "Distributed": {"method": "classic", "mode": "distributed"},
    "Parallel, not pipelined": {"method": "classic", "chunk_size": None, "pipelined": False, "balanced": False},
    "Parallel, pipelined": {"method": "classic", "chunk_size": 4, "balanced": False},
    "Parallel, pipelined, balanced": {"method": "classic", "chunk_size": 4},
    "same, chunk 2": {"method": "classic", "chunk_size": 2},
    "same, chunk 1": {"method": "classic", "chunk_size": 1},
    "Gram, not pipelined": {"method": "gram", "chunk_size": 1, "pipelined": False},
    "Gram, chunk 1": {"method": "gram", "chunk_size": 1},
    "Gram, chunk 2": {"method": "gram", "chunk_size": 2},
}
# The report's table: ms and MB of extra memory, 40 layers on 8 H200.
REPORTED = {
    "Distributed": (1574.67, 832),
    "Parallel, not pipelined": (221.27, 11904),
    "Parallel, pipelined": (262.83, 2894),
    "Parallel, pipelined, balanced": (216.46, 3904),
}
HSDP_TABLE = {
    "HSDP, copies together": {"method": "gram", "chunk_size": 1},
    "HSDP, each copy for itself": {"method": "gram", "chunk_size": 1, "max_replicas": 1},
}
COPY_ENGINES_TABLE = {
    "Gram, chunk 1, copy engines": {"method": "gram", "chunk_size": 1, "copy_engines": True},
    "Gram, chunk 2, copy engines": {"method": "gram", "chunk_size": 2, "copy_engines": True},
    "Gram, chunk 1, once more": {"method": "gram", "chunk_size": 1},
}
PROFILED = (
    *("Parallel, pipelined, balanced", "Gram, not pipelined", "Gram, chunk 1", "Gram, chunk 2"),
    "Gram, chunk 1, copy engines",
)
COLUMNS = ("row", "chunk", "ms", "p20_ms", "p80_ms", "extra_mb", "equivalent_tflops", "executed_tflops",
           "reported_ms", "reported_mb", *KINDS, "rest", "bfloat16_error", "classic_error", "gram_error", "sent_mb",
           "gb_per_second", "commit", "device", "torch", "world_size", "layers")  # fmt: skip


class Bench:
    """This run: ranks, device, the layers' shards, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.started = arguments, time.perf_counter()
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        where = {"backend": "nccl", "device_id": self.device} if self.cuda else {"backend": "gloo"}
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if arguments.peer:  # beside its parents, which have the launcher's address
            where |= {"init_method": f"file://{arguments.peer_folder}/ranks", "rank": self.rank}
            where["world_size"] = self.world_size
        dist.init_process_group(**where, timeout=timedelta(seconds=90))
        self.num_layers = arguments.layers[0]
        self.shapes = {name: (a // arguments.scale, b // arguments.scale) for name, (a, b) in LAYER.items()}
        self.renew_layers(copies=1)
        self.rows: list[dict] = []
        self.teams: dict = {}
        self.checksums: dict[tuple, int] = {}  # of the weights after a row, by method and layout
        self.failed = False
        root = Path(__file__).resolve().parents[1]
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        self.common = {
            "commit": commit.stdout.strip() or "unknown",
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "torch": torch.__version__,
            "world_size": self.world_size,
        }
        self.folder = Path(os.environ.get("OUT") or root / "benchmarks" / "results")
        self.folder.mkdir(parents=True, exist_ok=True)

    def share_out(self, copies: int) -> None:
        """Split matrices made from now on over the ranks, or over each half of them (HSDP) and so on."""
        shards = self.world_size // copies
        names = ("replicate", "shard") if copies > 1 else ("shard",)
        self.mesh = init_device_mesh(self.device.type, (copies, shards)[-len(names) :], mesh_dim_names=names)
        self.placements = [*[Replicate()] * (copies > 1), Shard(0)]
        self.shards, self.shard = shards, self.rank % shards

    def renew_layers(self, copies: int) -> None:
        """New layers in place of those there are, shared out anew; each time the same random numbers."""
        self.layers: list[dict[str, nn.Parameter]] = []
        self.clean()
        self.share_out(copies)
        torch.manual_seed(self.shard)
        self.layers = [self._new_layer() for _ in range(self.num_layers)]

    def own_rows(self, matrix: Tensor) -> Tensor:
        """This rank's rows of a whole matrix, in memory of their own."""
        return matrix.chunk(self.shards)[self.shard].clone()

    def sharded(self, local: Tensor, shape: tuple[int, int]) -> DTensor:
        """A float32 DTensor of rows split as FSDP2 or HSDP keep them."""
        stride = (shape[1], 1)
        return DTensor.from_local(local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def _new_layer(self) -> dict[str, nn.Parameter]:
        """This rank's shards of a decoder layer's matrices, with gradients."""
        layer = {}
        for name, shape in self.shapes.items():
            rows = shape[0] // self.shards
            weight, gradient = (0.02 * torch.randn(rows, shape[1], device=self.device) for _ in range(2))
            layer[name] = nn.Parameter(self.sharded(weight, shape))
            layer[name].grad = self.sharded(gradient, shape)
        return layer

    def optimizer(self, layers: list[dict], **options) -> ParallelMuonClip:
        """MuonClip over layers, with QK-clip on maxima as a model would record them."""
        attentions = [
            SimpleNamespace(
                q_proj=SimpleNamespace(weight=layer["q_proj"]),
                k_proj=SimpleNamespace(weight=layer["k_proj"]),
                num_signal_heads_per_group=4,
                head_dim=128 // self.arguments.scale,
                max_logits=torch.linspace(50, 150, 40, device=self.device),
            )
            for layer in layers
        ]
        parameters = [parameter for layer in layers for parameter in layer.values()]
        optimizer = ParallelMuonClip(parameters, lr=1e-4, attentions=attentions, timeout_seconds=90, **options)
        # one communicator for all rows of a kind: each takes memory of its own
        optimizer._teams = self.teams.setdefault(optimizer.copy_engines, {})
        return optimizer

    def say(self, text: str = "") -> None:
        """Print once."""
        if self.rank == 0:
            print(text, flush=True)

    def measure(self, step: Callable[[], object]) -> tuple[list[float], float]:
        """Milliseconds of each repetition (the slowest rank's), and peak memory above the start, in MB."""
        for _ in range(1 if self.arguments.repeats == 1 else 2):
            step()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        times = []
        for _ in range(self.arguments.repeats):
            dist.barrier()
            times.append(self._time(step))
        extra = (torch.cuda.max_memory_allocated() - before) / 1e6 if self.cuda else 0.0
        slowest = torch.tensor([*times, extra], device=self.device, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest[:-1].tolist(), float(slowest[-1])

    def _time(self, step: Callable[[], object]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def report(self, row: str, chunk, method: str | None, times: list[float], extra_mb: float) -> None:
        """Print and keep one row; `method` tells the operations executed (None: not counted)."""
        shapes = [shape for _ in range(self.num_layers) for shape in self.shapes.values()]
        flops = Orthogonaliser("classic", "motif", "auto").kernels.newton_schulz_flops
        equivalent = sum(flops(*shape, method="classic", symmetric=False) for shape in shapes)
        seconds = 1e-3 * statistics.median(times) * self.world_size
        rates: list[float | str] = [equivalent / seconds / 1e12, ""]
        if method:
            executed = sum(flops(*shape, **executed_form(method)) for shape in shapes)
            executed *= {"Distributed": self.world_size, "HSDP, each copy for itself": 2}.get(row, 1)
            rates[1] = executed / seconds / 1e12
        values = (row, chunk, statistics.median(times), *quantiles(times), extra_mb, *rates)
        reported = REPORTED.get(row, ("", ""))
        found = dict(zip(COLUMNS, (*values, *reported), strict=False))
        self.keep(found)
        figures = [f"{value:9.2f}" if value != "" else " " * 9 for value in (*values[2:], *reported)]
        self.say(f"| {row:34} | {chunk!s:>5} | " + " | ".join(figures) + " |")

    def keep(self, row: dict) -> None:
        """Add a row to those that are written."""
        self.rows.append(row | self.common | {"layers": self.num_layers})

    def keep_times(self, row: str, times: list[float], **columns) -> None:
        """Print and keep what is no optimizer's step."""
        low, high = quantiles(times)
        found = {"row": row, "ms": statistics.median(times), "p20_ms": low, "p80_ms": high, **columns}
        self.keep(found)
        self.say(
            "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in found.items())
        )

    def check_weights(self, row: str, method: str) -> None:
        """Compare all weights after a row's steps with those after the first row of this method and layout.

        Raises:
            RuntimeError: they differ in a bit.
        """
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for parameter in (parameter for layer in self.layers for parameter in layer.values()):
            words = parameter.detach().to_local().flatten().view(torch.int32).long()
            total = 31 * total + (words * torch.arange(1, len(words) + 1, device=self.device)).sum()
        total *= self.rank + 1
        dist.all_reduce(total)
        first = self.checksums.setdefault((method, self.shards, self.num_layers), int(total))
        if int(total) != first:
            raise RuntimeError(f"{row}: weights differ from those of other {method} rows after the same steps")

    @contextlib.contextmanager
    def guard(self, title: str):
        """Show a failure and go on."""
        try:
            yield
        except (Exception, SystemExit):
            print(f"rank {self.rank}: {title} failed\n{traceback.format_exc()}", flush=True)
            self.failed = True

    def section(self, title: str, body: Callable[[], None]) -> None:
        """Run one part; a failure is shown and the next part runs."""
        self.say(f"\n## {title} (after {time.perf_counter() - self.started:.0f} s)\n")
        with self.guard(title):
            body()
        self.clean()
        self.save()

    def clean(self) -> None:
        """Give memory back: NCCL takes its own from what PyTorch leaves."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def save(self) -> None:
        """Write all rows so far."""
        if self.rank == 0:
            name = f"parallel_muonclip_x{self.world_size}_l{self.num_layers}.csv"
            with open(self.folder / name, "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)


def executed_form(method: str) -> dict:
    """What `newton_schulz_flops` needs to know of a method: "plain" is classic without symmetric kernels."""
    return {"method": "classic", "symmetric": False} if method == "plain" else {"method": method}


def quantiles(times: list[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    ordered = sorted(times)
    return ordered[int(0.2 * (len(ordered) - 1))], ordered[round(0.8 * (len(ordered) - 1))]


def time_table(bench: Bench, table: dict[str, dict]) -> None:
    """Rows of a table, each from the same weights, to the same weights for each method."""
    header = ("row", "chunk", "ms", "p20", "p80", "extra MB", "equiv.", "exec.", "report's ms", "report's MB")
    bench.say("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row, options in table.items():
        time_row(bench, row, options)


def time_row(bench: Bench, row: str, options: dict) -> None:
    """One row of a table."""
    chunk = "all" if options.get("chunk_size", 0) is None else options.get("chunk_size", "-")
    bench.renew_layers(bench.world_size // bench.shards)
    optimizer = bench.optimizer(bench.layers, **options)
    with bench.guard(row):
        times, extra = bench.measure(optimizer.step)
        bench.check_weights(row, options["method"])
        peers = [team.copies for team in optimizer._teams.values() if team.copies]
        extra += sum(each.reserved_bytes for each in peers) / 1e6  # PyTorch's allocator knows nothing of it
        bench.report(row, chunk, options["method"], times, extra)
    optimizer.state.clear()
    bench.clean()
    bench.save()


def time_copies(bench: Bench, first: dict) -> None:
    """HSDP: two copies, each over half of the ranks, so each rank holds twice as much; the bits are as without."""
    if bench.world_size < 4 or bench.world_size % 2:
        bench.say("not run: it takes four ranks or another even number above")
        return
    bench.layers.clear()
    bench.share_out(copies=2)
    try:
        for row, options in HSDP_TABLE.items():
            compare_step(bench, row, options, first)
        time_table(bench, HSDP_TABLE)
    finally:
        bench.renew_layers(copies=1)


def time_copy_engines(bench: Bench, first: dict) -> None:
    """Matrices carried by copy engines, with the same bits, and the plain row again between and after them."""
    if not (bench.cuda and bench.arguments.copy_engines):
        bench.say("not run: it takes --copy_engines, and GPUs of one node")
        return
    for row, options in COPY_ENGINES_TABLE.items():
        bench.teams.pop(True, None)  # a team a row, so that its buffers are that row's
        bench.clean()
        compare_step(bench, row, options, first)
        time_row(bench, row, options)


def main() -> None:
    """Check, time, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[10], help="decoder layers of the 12.7B")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps a row")
    parser.add_argument("--skip_errors", action="store_true", help="check steps only: kernels were checked elsewhere")
    parser.add_argument("--scale", type=int, default=1, help="divide all dimensions, to try the program on a CPU")
    parser.add_argument("--copy_engines", action="store_true", help="rows whose matrices these carry, within a node")
    parser.add_argument("--peers", default="", help="folder that holds other packages")
    parser.add_argument("--peer_seconds", type=float, default=60, help="the longest each package may take")
    parser.add_argument("--peer_rows", nargs="+", default=[""], help="only packages whose row contains one of these")
    parser.add_argument("--peer", default="", help=argparse.SUPPRESS)  # one package, in a process of its own
    parser.add_argument("--peer_folder", default="", help=argparse.SUPPRESS)
    parser.add_argument("--rows", nargs="+", default=[""], help="only the table's rows that contain one of these")
    bench = Bench(parser.parse_args())
    if bench.arguments.peer:
        return time_peer(bench)
    table = {row: how for row, how in TABLE.items() if any(part in row for part in bench.arguments.rows)}
    bench.say(f"{bench.common}")
    if not bench.arguments.skip_errors:
        bench.say("\n## Error against the float64 polynomial\n")
        check_kernels(bench)
    bench.say("\n## One layer's step\n")
    first = check_step(bench, table)
    bench.clean()
    bench.section("A step in the form of Table 4", lambda: time_table(bench, table))
    bench.section("HSDP, two copies", lambda: time_copies(bench, first))
    bench.section("Copy engines", lambda: time_copy_engines(bench, first))
    even = bench.num_layers % bench.world_size == 0  # whole layers for each rank
    if even:
        bench.section("Newton-Schulz of one rank's share", lambda: time_newton_schulz(bench))
    bench.section("Newton-Schulz of one batch", lambda: time_batches(bench))
    bench.section("Agreement", lambda: time_agreement(bench))
    bench.section("Link", lambda: time_link(bench))
    if even:
        bench.section("torch.optim.Muon", lambda: time_torch_muon(bench))
    rows = bench.rows
    for layers in bench.arguments.layers[1:]:
        bench.rows, bench.num_layers = [], layers
        bench.renew_layers(copies=1)
        bench.section(f"{layers} layers", lambda: time_table(bench, table))
    bench.rows, bench.num_layers = rows, bench.arguments.layers[0]
    bench.section("Other packages", lambda: time_peers(bench))
    profiled = {row: how for row, how in (TABLE | COPY_ENGINES_TABLE).items() if row in PROFILED}
    bench.section("Milliseconds by kind of kernel", lambda: profile_rows(bench, profiled))
    bench.say(f"\n{time.perf_counter() - bench.started:.0f} s in all")
    if bench.failed:
        os._exit(1)  # what failed may have left a collective behind, which an orderly end would wait for
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
