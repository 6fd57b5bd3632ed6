"""Newton-Schulz on one accelerator: correctness at full size, a sweep of kernel variants, whole passes beside peers.

    python benchmarks/newton_schulz.py [--sections check,errors,sweep,passes] [--output_dir DIR]

Every line of every section is appended to `newton_schulz.jsonl` as it is measured, and `newton_schulz.csv` holds them
all at the end. A section that fails says so and the next one runs; a wrong result ends the run before any timing.

"Executed" counts a symmetric product half; "classic-equivalent" divides the operations of the classic form without
symmetry by the time. Shapes: N batch, S rows, L columns, S <= L.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels_hub" / "newton_schulz" / "torch-ext"))

from newton_schulz import newton_schulz, newton_schulz_flops  # noqa: E402
from newton_schulz.triton_products import TileConfig, aligned_empty, symmetric_product  # noqa: E402

# One rank's share of Motif-2-12.7B over 8: (rows, columns), matrices, and how many are batched at once.
SHARE = (((4096, 16384), 15, 3), ((4096, 5120), 5, 5), ((2048, 4096), 10, 10), ((4096, 8192), 5, 5))
SPECTRA = ("gaussian", "power_law", "low_rank_noise")
ONE_SHOT = {"flatten": False, "persistent": False}
VARIANTS = {
    "128x256 s4": TileConfig(num_stages=4, **ONE_SHOT),
    "128x256 s4 persistent": TileConfig(num_stages=4, flatten=False),
    "128x256 s3 flat persistent": TileConfig(),
    "128x256 s3": TileConfig(**ONE_SHOT),
    "128x256 k128 s2": TileConfig(block_k=128, num_stages=2, **ONE_SHOT),
    "128x128 s4": TileConfig(wide=128, num_stages=4, **ONE_SHOT),
    "128x128 s3 w4, two a multiprocessor": TileConfig(wide=128, num_warps=4, **ONE_SHOT),
    "128x128 s3, two a multiprocessor": TileConfig(wide=128, **ONE_SHOT),
}


class Report:
    """Prints rows and keeps them on disk as they come."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.rows = []
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        self.common = {
            "commit": commit.stdout.strip() or "unknown",
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }
        (folder / "newton_schulz.jsonl").write_text("")

    def add(self, **row) -> None:
        self.rows.append(row)
        with open(self.folder / "newton_schulz.jsonl", "a") as file:
            file.write(json.dumps({**self.common, **row}) + "\n")
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)

    def write_csv(self) -> None:
        names = list(dict.fromkeys(key for row in self.rows for key in row))
        with open(self.folder / "newton_schulz.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*self.common, *names])
            writer.writeheader()
            writer.writerows({**self.common, **row} for row in self.rows)


def time_ms(functions: list, repeats: int = 12, warmup: int = 3) -> dict[str, float]:
    """Median, 20th and 80th percentile of milliseconds a call, rotating over functions that differ in their inputs."""
    calls = itertools.cycle(functions)
    for _ in range(warmup):
        next(calls)()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        next(calls)()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    low, high = times[len(times) // 5], times[-1 - len(times) // 5]
    return {"ms": round(statistics.median(times), 4), "p20": round(low, 4), "p80": round(high, 4)}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the reference; NaN stays NaN."""
    return ((value.double() - reference).norm() / reference.norm()).item()


def draw(batch: int, rows: int, columns: int, spectrum: str = "gaussian") -> torch.Tensor:
    """Float32 matrices (N, rows, columns) of a spectrum, rows <= columns."""
    noise = torch.randn(batch, rows, columns, device="cuda")
    if spectrum == "gaussian":
        return noise
    left = torch.linalg.qr(torch.randn(batch, rows, rows, device="cuda"))[0]
    right = torch.linalg.qr(torch.randn(batch, columns, rows, device="cuda"))[0]
    if spectrum == "power_law":
        singular_values = torch.arange(1, rows + 1, device="cuda").float() ** -1.0
        return (left * singular_values) @ right.mT
    rank = rows // 16
    return left[..., :rank] @ right[..., :rank].mT + 1e-3 * noise / columns**0.5


def symmetric_operand(batch: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Exactly symmetric half matrices (N, S, S) with entries of order one, in aligned rows."""
    square = torch.randn(batch, size, size, device="cuda")
    return aligned_empty(batch, size, size, dtype, torch.device("cuda")).copy_((square + square.mT) / 2)


def check_kernels(report: Report) -> None:
    """Each variant against float64 on full, odd and tiny shapes, the output filled with NaN before."""
    cases = [(3, 4096, 4096), (2, 2048, 4096), (3, 1000, 520), (2, 333, 77), (1, 128, 64), (2, 5, 40), (1, 384, 8)]
    for name, config in VARIANTS.items():
        worst = 0.0
        for (batch, size, depth), dtype in itertools.product(cases, (torch.float16, torch.bfloat16)):
            if size == 4096 and (dtype is torch.bfloat16 or name != "128x256 s4"):
                continue
            x = aligned_empty(batch, size, depth, dtype, torch.device("cuda")).copy_(torch.randn(batch, size, depth))
            out = aligned_empty(batch, size, size, dtype, torch.device("cuda")).fill_(float("nan"))
            gram = symmetric_product(x, out=out, config=config)
            error = relative_error(gram, x.double() @ x.double().mT)
            if not torch.equal(gram, gram.mT) or not error < (4e-4 if dtype is torch.float16 else 3e-3):
                raise AssertionError(f"{name}: gram of {(batch, size, depth)} {dtype}, error {error}")
            a, d = symmetric_operand(batch, size, dtype), symmetric_operand(batch, size, dtype)
            out = aligned_empty(batch, size, size, dtype, torch.device("cuda")).fill_(float("nan"))
            got = symmetric_product(a, a, d, alpha=0.5, beta=-2.0, gamma=3.0, out=out, config=config)
            identity = torch.eye(size, device="cuda", dtype=torch.float64)
            error = relative_error(got, 0.5 * a.double() @ a.double() - 2.0 * d.double() + 3.0 * identity)
            if not torch.equal(got, got.mT) or not error < (4e-4 if dtype is torch.float16 else 3e-3):
                raise AssertionError(f"{name}: product of {(batch, size)} {dtype}, error {error}")
            alone = symmetric_product(a[-1:], a[-1:], d[-1:], alpha=0.5, beta=-2.0, gamma=3.0, config=config)
            if not torch.equal(alone[0], got[-1]):
                raise AssertionError(f"{name}: a matrix alone differs from the same matrix in a batch")
            worst = max(worst, error)
        report.add(section="check", variant=name, worst_error=f"{worst:.1e}")


def check_passes(report: Report) -> None:
    """Whole passes: batch invariance, repeatability, orientation, zeros, odd shapes; all backends that are here."""
    for method, backend in itertools.product(("gram", "classic"), _backends()):
        for rows, columns in ((2048, 4096), (520, 1000), (333, 777), (96, 96)):
            if backend == "quack" and rows % 8:
                continue
            x = draw(3, rows, columns).bfloat16()
            reference = newton_schulz(x.double(), method="classic")
            got = newton_schulz(x, method=method, backend=backend)
            error = relative_error(got, reference)
            if not error < 0.03:
                raise AssertionError(f"{backend} {method} {(rows, columns)}: error {error}")
            if not torch.equal(got, newton_schulz(x, method=method, backend=backend)):
                raise AssertionError(f"{backend} {method} {(rows, columns)}: two runs differ")
            same = torch.equal(got[1], newton_schulz(x[1], method=method, backend=backend))
            if not same and backend == "triton":
                raise AssertionError(f"{backend} {method} {(rows, columns)}: the batch changes a matrix's result")
            tall = newton_schulz(x.mT.contiguous(), method=method, backend=backend)
            flipped = newton_schulz(x.mT, method=method, backend=backend)
            if not relative_error(tall.mT, reference) < 0.03 or not relative_error(flipped.mT, reference) < 0.03:
                raise AssertionError(f"{backend} {method} {(rows, columns)}: the transposed matrix differs")
            if newton_schulz(torch.zeros_like(x), method=method, backend=backend).count_nonzero():
                raise AssertionError(f"{backend} {method} {(rows, columns)}: zeros do not give zeros")
            report.add(
                section="check", method=method, backend=backend, shape=f"{rows}x{columns}", error=f"{error:.2e}",
                batch_invariant=same, tall_equals_wide=torch.equal(tall.mT, got),
            )  # fmt: skip


def measure_errors(report: Report) -> None:
    """Relative error against the float64 polynomial at full shapes, results in float32."""
    for ((rows, columns), _, _), spectrum in itertools.product(SHARE[:3], SPECTRA):
        x = draw(1, rows, columns, spectrum)
        reference = newton_schulz(x.double(), method="classic")
        errors = {}
        for method, backend in itertools.product(("classic", "gram"), _backends()):
            errors[f"{backend} {method}"] = relative_error(newton_schulz(x, method=method, backend=backend), reference)
        report.add(
            section="errors",
            shape=f"{rows}x{columns}",
            spectrum=spectrum,
            **{k: f"{v:.2e}" for k, v in errors.items()},
        )
        if (
            not errors["triton gram"] <= errors["torch classic"]
            or not errors["triton classic"] <= 1.3 * errors["torch classic"]
        ):
            raise AssertionError(
                f"{(rows, columns)} {spectrum}: less accurate than the classic bfloat16 path: {errors}"
            )
        del x, reference
        torch.cuda.empty_cache()


def _backends() -> list[str]:
    found = ["torch", "triton"]
    try:
        import quack.gemm_interface  # noqa: F401

        found.append("quack")
    except ImportError:
        pass
    return found


def _precompile(config: TileConfig) -> float:
    start = time.perf_counter()
    x = torch.randn(1, 256, 256, device="cuda", dtype=torch.float16)
    for operand in (x, x.bfloat16()):
        symmetric_product(operand, config=config)
        symmetric_product(operand, operand, operand, config=config)
        symmetric_product(operand, operand, operand, gamma=1.0, config=config)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def precompile(report: Report) -> None:
    """Fill Triton's cache in parallel processes; a variant that does not compile is dropped."""
    with ProcessPoolExecutor(min(len(VARIANTS), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        futures = {name: pool.submit(_precompile, config) for name, config in VARIANTS.items()}
        for name, future in futures.items():
            try:
                report.add(section="compile", variant=name, seconds=round(future.result(), 1))
            except Exception as error:
                report.add(section="compile", variant=name, failed=f"{type(error).__name__}: {error}"[:200])
                del VARIANTS[name]


def measure_ceilings(report: Report) -> None:
    """What the library's product and a copy reach here: the rates the rest is compared with."""
    for dtype, (rows, depth, columns) in itertools.product(
        (torch.float16, torch.bfloat16),
        ((8192, 8192, 8192), (4096, 4096, 16384), (4096, 4096, 4096), (2048, 2048, 4096)),
    ):
        pairs = [
            (
                torch.randn(rows, depth, device="cuda", dtype=dtype),
                torch.randn(depth, columns, device="cuda", dtype=dtype),
            )
            for _ in range(2)
        ]
        out = torch.empty(rows, columns, device="cuda", dtype=dtype)
        timing = time_ms([partial(torch.mm, *pair, out=out) for pair in pairs])
        rate = 2 * rows * depth * columns / timing["ms"] / 1e9
        report.add(
            section="ceiling", what=f"mm {rows}x{depth}x{columns}", dtype=str(dtype)[6:], **timing, tflops=round(rate)
        )
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    timing = time_ms([lambda: target.copy_(source)])
    report.add(section="ceiling", what="copy", **timing, tb_per_s=round(8 * 2**29 / timing["ms"] / 1e9, 2))


def sweep_symmetric(report: Report) -> None:
    """Every variant on the products of a pass; executed TFLOP/s."""
    cases = [  # batch, S, K, addend
        (1, 4096, 4096, True), (3, 4096, 4096, True), (5, 4096, 4096, True), (5, 4096, 4096, False),
        (1, 4096, 16384, False), (3, 4096, 16384, False), (5, 4096, 5120, False),
        (10, 2048, 2048, True), (10, 2048, 4096, False),
    ]  # fmt: skip
    for batch, size, depth, has_addend in cases:
        sets = []
        for _ in range(2):
            left = symmetric_operand(batch, size, torch.float16)
            if depth != size:
                left = torch.randn(batch, size, depth, device="cuda", dtype=torch.float16)
            sets.append((left, symmetric_operand(batch, size, torch.float16) if has_addend else None))
        out = torch.empty(batch, size, size, device="cuda", dtype=torch.float16)
        calls = {
            name: [partial(symmetric_product, a, a, d, out=out, config=config) for a, d in sets]
            for name, config in VARIANTS.items()
        }
        if "quack" in _backends():
            from quack.gemm_interface import gemm_symmetric

            calls["quack"] = [partial(gemm_symmetric, a, a.mT, C=d, out=out) for a, d in sets]
        calls["torch.bmm, whole"] = [partial(torch.bmm, a, a.mT, out=out) for a, _ in sets]
        for name, functions in calls.items():
            try:
                timing = time_ms(functions)
            except Exception as error:
                report.add(section="sweep", variant=name, failed=f"{type(error).__name__}: {error}"[:200])
                continue
            rate = batch * size * size * depth / timing["ms"] / 1e9
            report.add(
                section="sweep", batch=batch, S=size, K=depth, addend=has_addend, variant=name, **timing,
                executed_tflops=round(rate),
            )  # fmt: skip


def time_blas(report: Report) -> None:
    """Q X, which the BLAS makes a matrix at a time."""
    for (size, length), _, batch in SHARE:
        left = symmetric_operand(batch, size, torch.float16)
        x = torch.randn(batch, size, length, device="cuda", dtype=torch.float16)
        out = torch.empty_like(x)
        calls = [partial(torch.mm, *factors, out=to) for *factors, to in zip(left, x, out, strict=True)]
        timing = time_ms([lambda calls=calls: [call() for call in calls]])
        rate = 2 * batch * size * size * length / timing["ms"] / 1e9
        report.add(section="product", batch=batch, S=size, L=length, variant="cuBLAS", **timing, tflops=round(rate))


def measure_passes(report: Report) -> None:
    """Whole passes from bfloat16 to bfloat16, a matrix and the whole share, for every backend and method."""
    share = {}
    for (rows, columns), count, best_batch in SHARE:
        for batch in dict.fromkeys((best_batch, 1)):
            sets = [draw(batch, rows, columns).bfloat16() for _ in range(2)]
            out = torch.empty_like(sets[0])
            for backend, method in itertools.product(_backends(), ("classic", "gram")):
                if batch == 1 and backend == "torch":
                    continue
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                try:
                    run = partial(newton_schulz, method=method, backend=backend, out=out)
                    timing = time_ms([partial(run, x) for x in sets], 8, 2)
                except Exception as error:
                    report.add(
                        section="pass", backend=backend, method=method, failed=f"{type(error).__name__}: {error}"[:200]
                    )
                    continue
                each = timing["ms"] / batch
                executed = newton_schulz_flops(rows, columns, method, symmetric=backend != "torch") / each / 1e9
                equivalent = newton_schulz_flops(rows, columns, "classic", symmetric=False) / each / 1e9
                report.add(
                    section="pass", shape=f"{rows}x{columns}", batch=batch, backend=backend, method=method,
                    ms_each=round(each, 3), **timing, executed_tflops=round(executed),
                    classic_equivalent_tflops=round(equivalent),
                    extra_gb=round((torch.cuda.max_memory_allocated() - before) / 1e9, 2),
                )  # fmt: skip
                if batch == best_batch:
                    share[backend, method] = share.get((backend, method), 0.0) + count * each
    for (backend, method), total in share.items():
        flops = sum(n * newton_schulz_flops(*s, method, symmetric=backend != "torch") for s, n, _ in SHARE)
        report.add(
            section="share",
            backend=backend,
            method=method,
            ms=round(total, 2),
            executed_tflops=round(flops / total / 1e9),
        )


SECTIONS = {
    "check": (check_kernels, check_passes),
    "errors": (measure_errors,),
    "ceilings": (measure_ceilings,),
    "sweep": (sweep_symmetric, time_blas),
    "passes": (measure_passes,),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated, of " + ", ".join(SECTIONS))
    default_folder = os.environ.get("OUT") or ROOT / "benchmarks" / "results"
    parser.add_argument("--output_dir", type=Path, default=Path(default_folder))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA device")
    torch.manual_seed(0)
    report = Report(arguments.output_dir)
    started = time.perf_counter()
    precompile(report)
    failed = []
    for section in arguments.sections.split(","):
        for function in SECTIONS[section]:
            print(f"-- {function.__name__} at {time.perf_counter() - started:.0f} s", flush=True)
            try:
                function(report)
            except Exception:
                traceback.print_exc()
                report.add(section=section, failed=function.__name__)
                failed.append(function.__name__)
            torch.cuda.empty_cache()
        if section == "check" and failed:
            break
    report.write_csv()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
