"""Generated programs a second through the sandbox of `eval_harness`, by pool size, and how long one takes.

    python benchmarks/sandbox.py [--programs 100] [--rounds 5] [--output benchmarks/results/sandbox.csv]

The machine may be shared: each round tries every pool size, the best round is the figure, and the load average beside
it says how much of the machine was free.
"""

import argparse
import csv
import os
import platform
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path

from eval_harness.sandbox import Program, Sandbox

TRIVIAL = Program("def f(x): return x + 1", "assert f(2) == 3\nassert f(-1) == 0", ("f",))


def measure(workers: int, count: int) -> dict[str, float]:
    """One round of trivial programs: rate and median latency.

    Raises:
        RuntimeError: a program did not pass; a rate of failures is no rate.
    """
    sandbox = Sandbox(workers=workers)
    started = time.perf_counter()
    outcomes = sandbox.run_many([TRIVIAL] * count)
    seconds = time.perf_counter() - started
    if failed := [outcome.reason for outcome in outcomes if not outcome.passed]:
        raise RuntimeError(f"{len(failed)} of {count} trivial programs failed: {failed[0]}")
    return {
        "programs_per_second": count / seconds,
        "median_ms": 1000 * statistics.median(outcome.seconds for outcome in outcomes),
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Measure and print; with `--output` also write a CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=100, help="programs a round")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the best counts")
    parser.add_argument("--output", type=Path, help="CSV to write")
    options = parser.parse_args()
    default = Sandbox().workers
    sizes = sorted({1, os.cpu_count() or 1, default})
    rounds = [{size: measure(size, options.programs) for size in sizes} for _ in range(options.rounds)]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    bubblewrap = subprocess.run(["bwrap", "--version"], capture_output=True, text=True).stdout.split()[-1]
    facts = {"date": date.today().isoformat(), "commit": commit, "processors": os.cpu_count()}
    facts |= {"python": platform.python_version(), "bubblewrap": bubblewrap, "kernel": platform.release()}
    lines = []
    for size in sizes:
        best = max((measured[size] for measured in rounds), key=lambda found: found["programs_per_second"])
        rounded = {name: round(value, 2) for name, value in best.items()}
        lines.append({"workers": size, "default": size == default, **rounded, **facts})
        print("  ".join(f"{name}={value}" for name, value in lines[-1].items()))
    if options.output:
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


if __name__ == "__main__":
    main()
