"""Candidates for a faster Gram Newton-Schulz on one GPU, each beside what there is: errors first, then times.

    python benchmarks/newton_schulz_candidates.py                                    # about 80 s
    TRITON_INTERPRET=1 python benchmarks/newton_schulz_candidates.py --scale 512     # tries the program on a CPU

1. Products without addends. With P = a I + b R + c R^2 stored, Q P and P R P need no addend: seven of a pass's
   fourteen (S, S) products read a third less at their ends, and one copy of a matrix goes. Right after a restart P's
   diagonal must not be rounded with a I in it; that step stays as it is. Prediction: 2 to 3% of the share's time.
2. One program a tile instead of one a multiprocessor. Alone they should take the same time. Where other kernels hold
   some multiprocessors, as NCCL does in the optimizer's pipeline, programs that find none free start after the others
   have ended; single tiles go where there is room. Prediction: a product of two matrices takes 5/8 of the time then.

Times are of the 12.7B's share of one rank in eight, in ms a matrix; "beside" has 16 multiprocessors held by another
stream's kernels all the while. Writes newton_schulz_candidates.csv in $OUT, else in benchmarks/results/.
"""

import argparse
import csv
import importlib
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.parallel_muonclip_checks import SPECTRA, matrix_of, relative_error
from kernels_hub import load_local
from trainer.optim.muon_clip_reference import newton_schulz_reference

ROOT = Path(__file__).resolve().parents[1]
# name, shape, how many of them in the share, how many at once
SHARE = (("gate, up", (16384, 4096), 10, 2), ("down", (4096, 16384), 5, 2), ("q", (5120, 4096), 5, 5),
         ("k, v", (2048, 4096), 10, 10), ("o", (4096, 8192), 5, 4))  # fmt: skip
HELD = 16  # multiprocessors, about what NCCL takes for an all-to-all (assumption)

kernels = load_local("newton_schulz")
entry = importlib.import_module(f"{kernels.__name__}.orthogonalize")
products_module = importlib.import_module(f"{kernels.__name__}.triton_products")
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
TILES = {
    "a multiprocessor": (products_module.HOPPER, products_module.HOPPER_NARROW),
    "a tile": tuple(replace(c, persistent=False) for c in (products_module.HOPPER, products_module.HOPPER_NARROW)),
}


def iterate_without_addends(products, steps: tuple, restarts: tuple[int, ...]) -> None:
    """`iteration.gram_iteration` as candidate 1 has it."""

    def symmetric(left, right, addend=None, alpha=1.0, beta=1.0, gamma=0.0):
        return products_module.symmetric_product(left, right, addend, alpha, beta, gamma, config=products.config)

    gram, factor = products.gram(), None  # (N, S, S)
    for index, (a, b, c) in enumerate(steps):
        goes_on = index + 1 < len(steps) and index + 1 not in restarts
        if index in restarts:
            products.apply(factor)
            gram = products.gram()
            polynomial = symmetric(gram, gram, gram, c, b)  # b R + c R^2, (N, S, S)
            factor = products.shift(polynomial, a)
            if goes_on:
                gram = symmetric(gram, polynomial, gram, beta=a)
                gram = symmetric(polynomial, gram, gram, beta=a)
            continue
        polynomial = symmetric(gram, gram, gram, c, b, a)  # a I + b R + c R^2, (N, S, S)
        factor = polynomial if factor is None else symmetric(factor, polynomial)
        if goes_on:
            gram = symmetric(symmetric(gram, polynomial), polynomial)
    products.apply(factor, last=True)


FORMS = {"addends": entry.gram_iteration, "no addends": iterate_without_addends}


def use(form: str, programs: str) -> None:
    """Let the kernels run in this form, with one program for each of these."""
    entry.gram_iteration = FORMS[form]
    products_module.HOPPER, products_module.HOPPER_NARROW = TILES[programs]


def orthogonalise(batch: torch.Tensor) -> torch.Tensor:
    """Gram Newton-Schulz of a bfloat16 batch into its own memory, as float16."""
    return kernels.newton_schulz(batch, "gram", "motif", backend="triton", out=batch.view(torch.float16))


def check(shape: tuple[int, int], spectrum: str, seed: int) -> dict:
    """Errors of both forms against float64; programs and the batch must not change a bit.

    Raises:
        SystemExit: they do, or leaving addends out costs a quarter more error (assumption: between the few per cent
            of 512 rows in emulated float16 and the 80% of leaving them out after a restart too).
    """
    matrix = matrix_of(spectrum, shape, DEVICE, seed).bfloat16()
    reference, row = newton_schulz_reference(matrix.double()), {}
    for form in FORMS:
        results = []
        for programs in TILES:
            use(form, programs)
            results += [orthogonalise(matrix.clone()[None])[0], orthogonalise(matrix.repeat(2, 1, 1))[1]]
        if not all(torch.equal(result, results[0]) for result in results):
            raise SystemExit(f"{form}, {shape}, {spectrum}: programs or the batch change the result")
        row[form] = relative_error(results[0], reference)
    if min(shape) > 1000 and not row["no addends"] <= 1.25 * row["addends"]:  # a few rows scatter too much
        raise SystemExit(f"{shape}, {spectrum}: errors are {row}")
    return {form: f"{error:.2e}" for form, error in row.items()}


def hold(launch_size) -> None:
    """Start kernels on the current stream that hold HELD multiprocessors for about 60 ms."""
    products_module._launch_size = lambda device, units, config: (HELD, HELD)
    matrices = torch.randn(4, 4096, 16384, device=DEVICE, dtype=torch.float16)
    for _ in range(4):
        products_module.symmetric_product(matrices, config=TILES["a multiprocessor"][1])
    products_module._launch_size = launch_size


def time_share(shapes: tuple, repeats: int, beside: bool) -> dict:
    """Milliseconds a matrix of each shape, and of the whole share."""
    row, total = {}, 0.0
    launch_size, stream = products_module._launch_size, torch.cuda.Stream() if beside else None
    for name, shape, count, batch in shapes:
        source, times = torch.randn(batch, *shape, device=DEVICE, dtype=torch.bfloat16), []
        for _ in range(repeats):
            work = source.clone()
            if ON_GPU:
                torch.cuda.synchronize()
            with torch.cuda.stream(stream) if beside else nullcontext():
                if beside:
                    hold(launch_size)
                    over = torch.cuda.Event()
                    over.record()
            times.append(timed(lambda work=work: orthogonalise(work)))
            if beside and over.query():
                raise RuntimeError(f"{name}: the multiprocessors were free before the end: hold them longer")
        row[name] = statistics.median(times[1:]) / batch
        total += count * row[name]
    return {key: f"{value:.4f}" for key, value in row.items()} | {"share": f"{total:.2f}"}


def timed(call) -> float:
    """Milliseconds of a call on the device."""
    if not ON_GPU:
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main() -> None:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="divide all sizes, to try the program on a CPU")
    parser.add_argument("--repeats", type=int, default=8, help="timed runs of each batch")
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    common = {"commit": commit.stdout.strip() or "unknown", "device": device, "torch": torch.__version__}
    shapes = tuple(
        (name, tuple(side // arguments.scale for side in shape), count, batch) for name, shape, count, batch in SHARE
    )
    rows: list[dict] = []

    def add(**row) -> None:
        rows.append(row | common)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "newton_schulz_candidates.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)

    for seed, ((name, shape, *_), spectrum) in enumerate((s, p) for s in shapes[::2] for p in SPECTRA):
        add(section="error", row=f"{name}, {spectrum}", **check(shape, spectrum, seed))
    ways = [(form, programs) for form in FORMS for programs in TILES]
    for form, programs in (*ways, *reversed(ways)):  # twice, so that a device that grows warm shows
        use(form, programs)
        add(section="alone", row=f"{form}, a program for {programs}", **time_share(shapes, arguments.repeats, False))
    for form, programs in ways if ON_GPU else ():
        use(form, programs)
        add(section="beside", row=f"{form}, a program for {programs}", **time_share(shapes, 4, True))


if __name__ == "__main__":
    main()
