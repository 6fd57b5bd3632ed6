"""Parts of a MuonClip step that parallel_muonclip.py times by themselves, and what a step's kernels take.

`bench` is that program's `Bench`: ranks, device, layers, and where rows go.
"""

import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from trainer.optim.orthogonalise import Orthogonaliser

KINDS = {  # kernels by words in their names; the first match wins
    "symmetric products": ("symmetric_product_kernel",),
    "network": ("nccl", "memcpy ptop", "memcpy dtod", "barrier_kernel"),
    "other products": ("gemm", "nvjet", "cutlass"),
    "normalisation": ("square_sums_kernel", "normalise_kernel"),
    "momentum and update": ("_nesterov_kernel", "_apply_update_kernel"),
    "looking for bad gradients": ("_mark_not_finite_kernel",),
}


def kernel_times(bench, step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of each kind of kernel on this rank in one step; kinds run beside each other."""
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA if bench.cuda else ProfilerActivity.CPU]) as recorded:
        step()
        if bench.cuda:
            torch.cuda.synchronize()
    spent = dict.fromkeys((*KINDS, "rest"), 0.0)
    for event in recorded.key_averages():
        name = event.key.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "rest")
        spent[kind] += 1e-3 * (event.self_device_time_total if bench.cuda else event.self_cpu_time_total)
    return spent


def profile_rows(bench, table: dict[str, dict]) -> None:
    """What the first rank's kernels take in a table's rows, in ms; last: a profiler slows what comes after it."""
    bench.renew_layers(copies=1)
    bench.say("| row | step | " + " | ".join((*KINDS, "rest")) + " |\n" + "|---" * (len(KINDS) + 3) + "|")
    for row in (row for row in bench.rows if row["row"] in table):
        optimizer = bench.optimizer(bench.layers, **table[row["row"]])
        optimizer.step()
        row |= kernel_times(bench, optimizer.step)
        optimizer.state.clear()
        bench.say(f"| {row['row']} | " + " | ".join(f"{row[kind]:.1f}" for kind in ("ms", *KINDS, "rest")) + " |")


def time_newton_schulz(bench) -> None:
    """Newton-Schulz of one rank's share alone, in the batches of a chunk of two."""
    largest = max(rows * columns for rows, columns in bench.shapes.values())
    shapes = list(bench.shapes.values())
    work = []  # (batch, times)
    for shape in sorted(set(shapes)):
        count = shapes.count(shape) * bench.num_layers // bench.world_size
        batch = max(1, 2 * largest // (shape[0] * shape[1]))
        matrices = torch.randn(min(batch, count), *shape, device=bench.device)
        matrices = matrices.bfloat16() if bench.cuda else matrices
        work += [(matrices, count // batch), (matrices[: count % batch], 1 if count % batch else 0)]
    for method in ("classic", "gram"):
        maker = Orthogonaliser(method, "motif", "auto")
        out = torch.empty(2 * largest, device=bench.device, dtype=maker.result_dtype(matrices.dtype, bench.device))

        def run(method=method, maker=maker, out=out) -> None:
            for matrices, times in work:
                for _ in range(times):
                    results = out[: matrices.numel()].view_as(matrices)
                    maker.kernels.newton_schulz(matrices, method, maker.coefficients, backend="auto", out=results)

        bench.report(f"Newton-Schulz alone, {method}", 2, method, *bench.measure(run))


def time_batches(bench) -> None:
    """Newton-Schulz of one matrix, again and again so that the device is warm, and of gate and down in one batch."""
    largest = max(rows * columns for rows, columns in bench.shapes.values())
    both = [bench.shapes["gate_proj"], bench.shapes["down_proj"]]
    for method in ("classic", "gram"):
        maker = Orthogonaliser(method, "motif", "auto")
        for parts in (*([shape] for shape in sorted(set(bench.shapes.values()))), both):
            matrices = [torch.randn(1, *shape, device=bench.device) for shape in parts]
            matrices = [matrix.bfloat16() if bench.cuda else matrix for matrix in matrices]
            outs = [
                torch.empty_like(matrix, dtype=maker.result_dtype(matrix.dtype, bench.device)) for matrix in matrices
            ]
            times = 8 * largest // sum(matrix.numel() for matrix in matrices)

            def run(method=method, maker=maker, matrices=matrices, outs=outs, times=times) -> None:
                for _ in range(times):
                    maker.kernels.newton_schulz(matrices, method, maker.coefficients, backend="auto", out=outs)

            each = [taken / times for taken in bench.measure(run)[0]]
            names = " with ".join(f"{rows} x {columns}" for rows, columns in parts)
            bench.keep_times(f"Newton-Schulz of {names}, {method}", each)


def time_agreement(bench) -> None:
    """The part of a step before any matrix moves: finiteness of all gradients and the packed maximum."""
    optimizer = bench.optimizer(bench.layers)
    optimizer.step()
    bench.keep_times("agreement on gradients and maxima", bench.measure(optimizer._agree)[0])


def time_link(bench) -> None:
    """All-to-all alone, of as much as a chunk of one and of two sends."""
    for matrices in (1, 2):
        numel = matrices * max(a * b for a, b in bench.shapes.values())
        send, receive = (torch.zeros(numel, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
        times, _ = bench.measure(lambda send=send, receive=receive: dist.all_to_all_single(receive, send))
        sent = 2 * numel * (bench.world_size - 1) / bench.world_size
        rate = sent / statistics.median(times) / 1e6
        bench.keep_times("all-to-all alone", times, chunk=matrices, sent_mb=sent / 1e6, gb_per_second=rate)
