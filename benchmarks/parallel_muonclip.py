"""One optimizer step over the 12.7B's matrices, in the form of the report's Table 4, beside its peers.

    torchrun --nproc_per_node 2 benchmarks/parallel_muonclip.py --layers 10

Ten layers on two accelerators give each rank the share that it has of all 40 on eight. First the results are compared
with a float64 polynomial; nothing is timed if one is wrong. Then every row is timed in this one run and written to
`parallel_muonclip.csv` in $OUT, else in benchmarks/results/. With --peers DIR, dion is timed too if DIR holds it.
`--scale 64 --repeats 1` on gloo tries the program itself on a CPU; its times mean nothing.

"Equivalent" TFLOPS count the classic form without symmetry (the table's own count), "executed" what the kernels do.
"""

import argparse
import csv
import functools
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
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from trainer.optim import ParallelMuonClip
from trainer.optim.muon_clip_reference import newton_schulz_reference, update_scale
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
SPECTRA = ("gaussian", "power_law", "low_rank_noise")
TABLE = {
    "Distributed": {"method": "classic", "mode": "distributed"},
    "Parallel, not pipelined": {"method": "classic", "chunk_size": None, "pipelined": False, "balanced": False},
    "Parallel, pipelined": {"method": "classic", "chunk_size": 4, "balanced": False},
    "Parallel, pipelined, balanced": {"method": "classic", "chunk_size": 4},
    "same, chunk 2": {"method": "classic", "chunk_size": 2},
    "Gram, not pipelined": {"method": "gram", "chunk_size": 2, "pipelined": False},
    "Gram, chunk 1": {"method": "gram", "chunk_size": 1},
    "Gram, chunk 2": {"method": "gram", "chunk_size": 2},
    "Gram, chunk 3": {"method": "gram", "chunk_size": 3},
}
COLUMNS = ("row", "chunk", "ms", "p20_ms", "p80_ms", "extra_mb", "equivalent_tflops", "executed_tflops", "commit",
           "device", "torch", "world_size", "layers")  # fmt: skip


class Bench:
    """This run: ranks, device, the layers' shards, and the rows so far."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.cuda = torch.cuda.is_available()
        if self.cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        where = {"backend": "nccl", "device_id": self.device} if self.cuda else {"backend": "gloo"}
        dist.init_process_group(**where, timeout=timedelta(seconds=90))
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh(self.device.type, (self.world_size,))
        self.shapes = {name: (a // arguments.scale, b // arguments.scale) for name, (a, b) in LAYER.items()}
        self.layers = [self._new_layer() for _ in range(arguments.layers)]
        self.rows: list[dict] = []
        root = Path(__file__).resolve().parents[1]
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
        self.common = {
            "commit": commit.stdout.strip() or "unknown",
            "device": torch.cuda.get_device_name() if self.cuda else "cpu",
            "torch": torch.__version__,
            "world_size": self.world_size,
            "layers": arguments.layers,
        }
        self.folder = Path(os.environ.get("OUT") or root / "benchmarks" / "results")
        self.folder.mkdir(parents=True, exist_ok=True)

    def sharded(self, local: Tensor, shape: tuple[int, int]) -> DTensor:
        """A float32 DTensor of rows split over all ranks, as FSDP2 keeps it."""
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))

    def _new_layer(self) -> dict[str, nn.Parameter]:
        layer = {}
        for name, shape in self.shapes.items():
            rows = shape[0] // self.world_size
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
        return ParallelMuonClip(parameters, lr=1e-4, attentions=attentions, **options)

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

    def report(self, row: str, chunk, method: str, times: list[float], extra_mb: float) -> None:
        """Print and keep one row."""
        shapes = [shape for _ in range(self.arguments.layers) for shape in self.shapes.values()]
        flops = Orthogonaliser("classic", "motif", "auto").kernels.newton_schulz_flops
        equivalent = sum(flops(*shape, method="classic", symmetric=False) for shape in shapes)
        executed = sum(flops(*shape, **executed_form(method)) for shape in shapes)
        executed *= self.world_size if row == "Distributed" else 1
        seconds = 1e-3 * statistics.median(times) * self.world_size
        low, high = quantiles(times)
        values = (row, chunk, statistics.median(times), low, high, extra_mb, equivalent / seconds, executed / seconds)
        values = [value / 1e12 if index > 5 else value for index, value in enumerate(values)]
        self.rows.append(dict(zip(COLUMNS, values, strict=False)) | self.common)
        self.say(f"| {row:34} | {chunk!s:>5} | " + " | ".join(f"{value:9.2f}" for value in values[2:]) + " |")

    def section(self, title: str, body: Callable[[], None]) -> None:
        """Run one part; a failure is shown and the next part runs."""
        self.say(f"\n## {title}\n")
        try:
            body()
        except Exception:
            print(f"rank {self.rank}: {title} failed\n{traceback.format_exc()}", flush=True)
        if self.cuda:
            torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        """Write all rows so far."""
        if self.rank == 0:
            with open(self.folder / "parallel_muonclip.csv", "w", newline="") as file:
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


def matrix_of(spectrum: str, shape: tuple[int, int], device: torch.device, seed: int) -> Tensor:
    """A float32 matrix with Gaussian entries, singular values falling as 1/k, or 16 directions in noise."""
    generator = torch.Generator(device).manual_seed(seed)
    randn = functools.partial(torch.randn, generator=generator, device=device)
    if spectrum == "gaussian":
        return randn(shape)
    if spectrum == "low_rank_noise":
        return randn(shape[0], 16) @ randn(16, shape[1]) + 1e-2 * randn(shape)
    size = min(shape)
    left = torch.linalg.qr(randn(shape[0], size))[0]
    right = torch.linalg.qr(randn(shape[1], size))[0]
    return left / torch.arange(1, size + 1, device=device) @ right.mT


def real_gradients(bench: Bench) -> dict[str, Tensor]:
    """Gradients of one full-size Motif-2 layer on real text: the bytes of a long Python source."""
    scale = bench.arguments.scale
    torch.manual_seed(0)
    config = Motif2Config(
        vocab_size=256,
        hidden_size=4096 // scale,
        intermediate_size=16384 // scale,
        num_hidden_layers=1,
        num_attention_heads=40,
        num_key_value_heads=16,
        num_noise_heads=8,
        head_dim=128 // scale,
    )
    with bench.device:
        model = Motif2ForCausalLM(config)
    text = Path(argparse.__file__).read_bytes()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8)[: 4 * 4096 // scale].long().view(4, -1)
    ids = ids.to(bench.device)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layer = model.model.layers[0]
    modules = {name: getattr(layer.mlp if name[:4] in ("gate", "up_p", "down") else layer.self_attn, name)
               for name in LAYER}  # fmt: skip
    return {name: module.weight.grad for name, module in modules.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to `expected` (float64)."""
    return float((actual.double() - expected).norm() / expected.norm())


def plain_bfloat16(matrix: Tensor) -> Tensor:
    """The report's path: the classic form in bfloat16 without symmetric kernels."""
    return newton_schulz_reference(matrix.bfloat16())


def check_kernels(bench: Bench) -> None:
    """Every shape and spectrum against the float64 polynomial, beside the report's bfloat16 path."""
    bench.say("| shape | spectrum | report's bfloat16 | classic | gram |\n|---|---|---|---|---|")
    makers = {method: Orthogonaliser(method, "motif", "auto") for method in ("classic", "gram")}
    cases = [(shape, spectrum) for shape in sorted(set(bench.shapes.values())) for spectrum in SPECTRA]
    gradients = real_gradients(bench)
    cases += [(bench.shapes[name], f"gradient of {name}") for name in gradients]
    for index, (shape, spectrum) in enumerate(cases):
        errors = torch.zeros(3, dtype=torch.float64, device=bench.device)
        if index % bench.world_size == bench.rank:
            real = gradients.get(spectrum.removeprefix("gradient of "))
            matrix = matrix_of(spectrum, shape, bench.device, seed=index) if real is None else real
            expected = newton_schulz_reference(matrix.double())
            results = [plain_bfloat16(matrix), *(maker(matrix.clone()[None])[0] for maker in makers.values())]
            errors += torch.tensor([relative_error(result, expected) for result in results], device=bench.device)
        dist.all_reduce(errors)
        plain, classic, gram = errors.tolist()
        bench.say(f"| {shape[0]} x {shape[1]} | {spectrum} | {plain:.1e} | {classic:.1e} | {gram:.1e} |")
        if not (classic <= 1.05 * plain + 1e-6 and gram <= 1.05 * plain + 1e-6):
            raise SystemExit(f"{shape} {spectrum}: an error is larger than the report's path has: nothing is timed")


def check_step(bench: Bench) -> None:
    """One step on one layer against float64 on the whole matrices, and every row's step against the others' bits."""
    weights = {name: 0.02 * matrix_of("gaussian", shape, bench.device, 7) for name, shape in bench.shapes.items()}
    gradients = {name: matrix_of("gaussian", shape, bench.device, 8) for name, shape in bench.shapes.items()}
    first: dict[str, dict[str, Tensor]] = {}
    for row, options in TABLE.items():
        layer = {}
        for name, shape in bench.shapes.items():
            layer[name] = nn.Parameter(bench.sharded(weights[name].chunk(bench.world_size)[bench.rank].clone(), shape))
            gradient = gradients[name].chunk(bench.world_size)[bench.rank].clone()
            layer[name].grad = bench.sharded(gradient, shape)
        bench.optimizer([layer], qk_clip_threshold=1e9, weight_decay=0.0, **options).step()
        same = first.setdefault(options["method"], {name: p.detach().full_tensor() for name, p in layer.items()})
        worst = 0.0
        for name, parameter in layer.items():
            full = parameter.detach().full_tensor()
            if not torch.equal(full, same[name]):
                raise SystemExit(f"{row} differs from other {options['method']} rows in {name}: nothing is timed")
            update = (weights[name].double() - full) / (1e-4 * update_scale(*full.shape))
            worst = max(worst, relative_error(update, newton_schulz_reference(gradients[name].double())))
        bench.say(f"{row}: largest relative error of an update {worst:.1e}")
        # bfloat16 on the wire and in the classic form is good for less than 1e-2 (assumption: twice that is a fault)
        if not worst < 2e-2:
            raise SystemExit(f"{row} is wrong by {worst}: nothing is timed")


def time_table(bench: Bench) -> None:
    """The rows of Table 4, and ours."""
    header = ("row", "chunk", "ms", "p20", "p80", "extra MB", "equiv.", "exec.")
    bench.say("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row, options in TABLE.items():
        optimizer = bench.optimizer(bench.layers, **options)
        times, extra = bench.measure(optimizer.step)
        chunk = "all" if options.get("chunk_size", 0) is None else options.get("chunk_size", "-")
        bench.report(row, chunk, options["method"], times, extra)
        optimizer.state.clear()


def time_newton_schulz(bench: Bench) -> None:
    """Newton-Schulz of one rank's share alone, in the batches of a chunk of two."""
    largest = max(rows * columns for rows, columns in bench.shapes.values())
    shapes = list(bench.shapes.values())
    work = []  # (batch, times)
    for shape in sorted(set(shapes)):
        count = shapes.count(shape) * bench.arguments.layers // bench.world_size
        batch = max(1, 2 * largest // (shape[0] * shape[1]))
        matrices = torch.randn(min(batch, count), *shape, device=bench.device)
        matrices = matrices.bfloat16() if bench.cuda else matrices
        work += [(matrices, count // batch), (matrices[: count % batch], 1 if count % batch else 0)]
    for method in ("classic", "gram"):
        orthogonalise = Orthogonaliser(method, "motif", "auto")

        def run(orthogonalise=orthogonalise) -> None:
            for matrices, times in work:
                for _ in range(times):
                    orthogonalise(matrices.clone())

        bench.report(f"Newton-Schulz alone, {method}", 2, method, *bench.measure(run))


def time_agreement(bench: Bench) -> None:
    """The part of a step before any matrix moves: finiteness of all gradients and the packed maximum."""
    optimizer = bench.optimizer(bench.layers)
    optimizer.step()
    times, _ = bench.measure(optimizer._agree)
    bench.say(f"agreement on gradients and maxima: {statistics.median(times):.2f} ms")


def time_link(bench: Bench) -> None:
    """All-to-all alone, of as much as a chunk of two sends."""
    numel = 2 * max(a * b for a, b in bench.shapes.values())
    send, receive = (torch.zeros(numel, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    times, _ = bench.measure(lambda: dist.all_to_all_single(receive, send))
    sent = 2 * numel * (bench.world_size - 1) / bench.world_size
    milliseconds = statistics.median(times)
    bench.say(f"all-to-all of {sent / 1e6:.0f} MB a rank: {milliseconds:.2f} ms, {sent / milliseconds / 1e6:.0f} GB/s")


def whole_share(bench: Bench) -> list[nn.Parameter]:
    """As many whole matrices as a rank owns, with gradients."""
    parameters = []
    for index in range(bench.arguments.layers * len(bench.shapes)):
        if index % bench.world_size == bench.rank:
            shape = list(bench.shapes.values())[index // bench.world_size % len(bench.shapes)]
            parameters.append(nn.Parameter(torch.randn(shape, device=bench.device)))
            parameters[-1].grad = torch.randn(shape, device=bench.device)
    return parameters


def time_torch_muon(bench: Bench) -> None:
    """torch.optim.Muon on a rank's share of whole matrices: no sharding, so no communication either."""
    optimizer = torch.optim.Muon(whole_share(bench), lr=1e-4, adjust_lr_fn="match_rms_adamw")
    bench.report("torch.optim.Muon, whole share", "-", "plain", *bench.measure(optimizer.step))


def time_dion(bench: Bench) -> None:
    """microsoft/dion's Muon with its Triton kernels, on the same shards; it compiles first, which takes a while."""
    if not bench.arguments.peers:
        bench.say("not run: name a folder that holds dion with --peers")
        return
    sys.path.insert(0, bench.arguments.peers)
    import dion

    parameters = [parameter for layer in bench.layers for parameter in layer.values()]
    by_shape: dict = {}
    for parameter in parameters:
        by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
    options = {"lr": 1e-4, "mu": 0.95, "nesterov": True, "adjust_lr": "rms_norm", "use_triton": bench.cuda}
    groups = [{"params": members} for members in by_shape.values()]
    optimizer = dion.Muon(groups, distributed_mesh=bench.mesh, **options)
    bench.report("dion Muon, Triton", "-", "classic", *bench.measure(optimizer.step))


def main() -> None:
    """Check, time, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10, help="decoder layers of the 12.7B")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps a row")
    parser.add_argument("--scale", type=int, default=1, help="divide all dimensions, to try the program on a CPU")
    parser.add_argument("--peers", default="", help="folder that holds the package dion")
    bench = Bench(parser.parse_args())
    bench.say(f"{bench.common}")
    bench.say("\n## Error against the float64 polynomial\n")
    check_kernels(bench)
    bench.say("\n## One layer's step\n")
    check_step(bench)
    bench.section("A step in the form of Table 4", lambda: time_table(bench))
    bench.section("Newton-Schulz of one rank's share", lambda: time_newton_schulz(bench))
    bench.section("Agreement", lambda: time_agreement(bench))
    bench.section("Link", lambda: time_link(bench))
    bench.section("torch.optim.Muon", lambda: time_torch_muon(bench))
    bench.section("dion", lambda: time_dion(bench))
    bench.save()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
