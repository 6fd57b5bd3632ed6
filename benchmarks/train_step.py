"""A training step of a 1B-class Motif-2, beside transformers' Trainer with Llama and DiffLlama of equal parameters.

    python benchmarks/train_step.py                                  # one GPU, about a quarter of an hour
    torchrun --nproc_per_node 2 benchmarks/train_step.py             # FSDP2; compares itself with the table of one GPU
    python benchmarks/train_step.py --ranks 1 2 4                    # the main step alone on 1, 2 and 4 GPUs
    python benchmarks/train_step.py --max_logits --repeats 6         # what QK-clip's maximum logits cost in a step
    python benchmarks/train_step.py --tiny                           # tries the program itself, on a CPU
    python benchmarks/train_step.py --cpu_mark                       # a 10M model beside a Llama on this CPU

The first loss and gradient norm of each way to run are compared with the eager step's; a wrong way is not timed. A
step is the trainer's: next batch, forward, backward, norm, MuonClip with QK-clip, numbers on the host. FLOPs are
counted exactly, attention over visible pairs included, recomputation and the optimizer not. FP8 needs torchao, the
chunked loss TRL. Writes train_step.csv (train_step_x<N>.csv on N ranks, train_step_logits.csv with --max_logits), and
train_step_profile.md: what limits the step and by how much.
"""

import argparse
import csv
import gc
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_step_cases as cases
from benchmarks import train_step_logits as logits
from benchmarks import train_step_parts as parts
from benchmarks import train_step_profile as step_profile
from benchmarks.train_step_cases import OurRun, Shape, Timing, Variant
from benchmarks.train_step_peers import trainer_run

ROOT = Path(__file__).resolve().parents[1]
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}
COLUMNS = (
    "section", "row", *cases.describe(Variant("")), "parameters", "tokens_a_step", "micro_rows", "seconds", "p20",
    "p80", "tokens_per_second", "flops_a_step", "mfu", "peak_gib", "data_wait_share", "forward_share",
    "backward_share", "optimizer_share", "logits", "logits_share", "note", "commit", "device", "torch", "transformers",
    "world_size",
)  # fmt: skip
# What a recipe sets as compile_layers, residual, muon_chunk_size, loss, micro_batch_tokens and
# attn_implementation.
MAIN = Variant(
    "Motif-2", compiled=True, attention="gda_kernel", residual="bfloat16", chunk_size=8, loss="full", micro_rows=5
)
SDPA = replace(MAIN, name="Motif-2, SDPA", attention="sdpa")
FP8 = replace(MAIN, name="Motif-2, FP8", fp8="rowwise_with_gw_hp")
LONG = replace(MAIN, name="Motif-2, 50 rows a step", rows=50)  # the report's last batch on its 400 GPUs
VARIANTS = (
    replace(MAIN, name="Motif-2, all matrices at once", chunk_size=None),
    replace(MAIN, name="Motif-2, AdamW", optimizer="adamw"),
    replace(MAIN, name="Motif-2, packed documents", packed=True),
    replace(SDPA, name="Motif-2, packed documents, SDPA", packed=True),
    replace(MAIN, name="Motif-2, selective recomputation", recompute="selective"),
    replace(MAIN, name="Motif-2, 2 rows at once", micro_rows=2),
    Variant("Motif-2, compiled alone", compiled=True),
    Variant("Motif-2, eager"),
)
PROFILED = (MAIN.name, SDPA.name)


class Bench:
    """This run: its settings, its clock and its rows."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.started = time.perf_counter()
        self.cuda = torch.cuda.is_available()
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.main = int(os.environ.get("RANK", 0)) == 0
        if self.cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        name = torch.cuda.get_device_name() if self.cuda else "cpu"
        known = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
        self.peak_tflops = arguments.peak_tflops or known
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        self.common = {"commit": commit.stdout.strip() or arguments.commit, "device": name, **versions}
        self.common["world_size"] = self.world_size
        self.rows: list[dict] = []
        self.lost = ""  # section after which the device answers no more
        self.largest_logits: dict[str, list[float]] = {}
        self.references: dict[tuple[bool, int | None], tuple[float, float]] = {}
        self.folder = Path(arguments.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        suffix = f"_x{self.world_size}" if self.world_size > 1 else ""
        suffix = "_cpu" if arguments.cpu_mark else "_logits" if arguments.max_logits else suffix
        self.path = self.folder / f"train_step{suffix}.csv"

    def say(self, text: str = "") -> None:
        """Print once."""
        if self.main:
            print(text, flush=True)

    def wants(self, title: str) -> bool:
        """Whether the command line asks for a section; the reference is always wanted."""
        only = self.arguments.only
        return not only or any(re.search(pattern, title) for pattern in (*only, "reference"))

    def section(self, title: str, body: Callable[[], None]) -> None:
        """Run one part unless time is up; a failure is shown and noted, and the next part runs."""
        passed = time.perf_counter() - self.started
        if not self.wants(title):
            return
        self.say(f"\n## {title} (after {passed:.0f} s)\n")
        if passed > self.arguments.budget_seconds:
            self.note(title, f"not run: {passed:.0f} s of {self.arguments.budget_seconds} had passed")
            return
        if self.lost:
            self.note(title, f"not run: the device was lost in {self.lost}")
            return
        try:
            body()
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            self.note(title, f"failed: {type(error).__name__}: {str(error)[:200]}")
        self.clean(title)
        self.save()

    def clean(self, title: str = "") -> None:
        """Give memory back; after an illegal memory access no more can be done on the device in this process."""
        torch._dynamo.reset()
        gc.collect()
        try:
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except torch.AcceleratorError:
            self.lost = self.lost or title

    def save(self) -> None:
        """Write the rows so far."""
        if self.main:
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(self.rows)

    def note(self, row: str, text: str) -> None:
        """A row without figures."""
        self.say(f"{row}: {text}")
        self.rows.append({"row": row, "note": text, **self.common})

    def report(self, section: str, row: str, timing: Timing, micro_rows: int, **columns) -> dict:
        """Print and keep a timed row."""
        ordered = sorted(timing.seconds)
        seconds = statistics.median(ordered)
        entry = {
            "section": section,
            "row": row,
            "parameters": timing.parameters,
            "tokens_a_step": timing.tokens,
            "micro_rows": micro_rows,
            "seconds": seconds,
            "p20": ordered[int(0.2 * (len(ordered) - 1))],
            "p80": ordered[round(0.8 * (len(ordered) - 1))],
            "tokens_per_second": timing.tokens / seconds,
            "flops_a_step": timing.flops,
            "data_wait_share": timing.wait_seconds / statistics.mean(timing.seconds),
            **{f"{part}_share": share for part, share in (timing.parts or {}).items()},
            **columns,
            **self.common,
        }
        if self.peak_tflops:
            entry["mfu"] = timing.flops / seconds / (self.peak_tflops * 1e12)
        if timing.peak_bytes is not None:
            entry["peak_gib"] = timing.peak_bytes / 2**30
        shown = ("tokens_per_second", "mfu", "peak_gib", "data_wait_share", "forward_share", "backward_share")
        figures = "  ".join(
            f"{key} {entry[key]:.4g}" for key in ("seconds", *shown, "optimizer_share") if key in entry
        )
        self.say(f"{row}: {figures}  {columns.get('note', '')}")
        self.rows.append(entry)
        return entry


def take_reference(bench: Bench, shape: Shape, packed: bool, rows: int | None = None) -> None:
    """Loss and gradient norm of an eager step on the first batch, of whole or of packed rows."""
    run = OurRun(shape, Variant("eager", packed=packed, rows=rows, micro_rows=1))
    bench.references[packed, rows] = run.first_step()
    run.close()
    bench.say(f"loss and gradient norm {bench.references[packed, rows]}")


def check(bench: Bench, variant: Variant, found: tuple[float, float]) -> float:
    """How far a variant's first step is off the eager one, relatively, in loss or gradient norm.

    Raises:
        RuntimeError: too far; the bounds are an assumption: 2% of bfloat16's own 0.4% a rounding, 10% for FP8's 6%.
    """
    wanted = bench.references.get((variant.packed, variant.rows))
    if wanted is None:
        raise RuntimeError("there is no eager step to compare with, so it is not timed")
    error = max(abs(one / other - 1) for one, other in zip(found, wanted, strict=True))
    bound = 2e-2 if variant.fp8 == "none" else 1e-1
    if not error <= bound:
        raise RuntimeError(
            f"loss and gradient norm are {found}, eager {wanted}: off by {error:.1e}, so it is not timed"
        )
    return error


def time_variant(bench: Bench, shape: Shape, variant: Variant) -> None:
    """Our step, checked and then timed; with fewer rows at once where memory runs out."""
    lacking = parts.missing_library(variant)
    if lacking:
        bench.note(variant.name, f"not run: {lacking} is not installed")
        return
    micro_rows = variant.micro_rows or shape.micro_rows
    while not attempt(bench, shape, replace(variant, micro_rows=micro_rows)):
        micro_rows //= 2
        if not micro_rows:
            raise RuntimeError("a single row does not fit into memory")


def attempt(bench: Bench, shape: Shape, variant: Variant) -> bool:
    """Check, time and report one variant; False where memory ran out."""
    run = None
    try:
        run = OurRun(shape, variant)
        error = check(bench, variant, run.first_step())
        timing = run.time(bench.arguments.warm_ups, bench.arguments.repeats)
        columns = cases.describe(variant) | {"note": f"PolyNorm: {run.polynorm}; off the eager step by {error:.1e}"}
        entry = bench.report("step", variant.name, timing, variant.micro_rows, **columns)
        if variant.name == MAIN.name:
            compare_with_one(bench, entry)
        if variant.name in PROFILED and not bench.arguments.unprofiled:
            write_profile(bench, run, variant, timing)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        if run is not None:
            run.close()
        del run
        bench.clean(variant.name)


def time_long(bench: Bench, shape: Shape) -> None:
    """The main step with the report's last batch, against an eager step of as many rows."""
    take_reference(bench, shape, False, LONG.rows)
    bench.clean()
    time_variant(bench, shape, LONG)


def compare_with_one(bench: Bench, entry: dict) -> None:
    """Throughput of several ranks over as many times that of one, from the table of an earlier run on one."""
    if bench.world_size == 1:
        return
    path = bench.folder / "train_step.csv"
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    one = [row for row in rows if row["row"] == entry["row"] and row["device"] == entry["device"] and row["seconds"]]
    if not one:
        bench.note(
            "scaling", f"no row {entry['row']!r} of one {entry['device']} in {path}: run the program without torchrun"
        )
        return
    share = entry["tokens_per_second"] / (bench.world_size * float(one[0]["tokens_per_second"]))
    bench.note("scaling", f"{share:.1%} of {bench.world_size} times one rank")


def write_profile(bench: Bench, run: OurRun, variant: Variant, timing: Timing) -> None:
    """Where the time of a step goes, beside the table: of the main variant, or of another under its own name."""
    batch = run.loader.next_batch()

    def step() -> None:
        run.step.run(batch, 0.01)
        cases.synchronize()

    spans = step_profile.record(step, bench.cuda)
    if not bench.main:
        return
    lines = [
        f"# Where a step of {run.parameters / 1e9:.2f}B parameters goes: {variant.name}",
        "",
        f"{bench.common['device']}, torch {bench.common['torch']}, commit {bench.common['commit']}, "
        f"{bench.world_size} rank(s), {timing.tokens:,} tokens a step, {variant.micro_rows} rows at once, "
        f"{statistics.median(timing.seconds):.4f} s (median, not profiled).",
        "",
        *step_profile.describe(spans, run.config, timing, batch.nominal_tokens, bench.world_size, bench.peak_tflops),
    ]
    suffix = "" if variant.name == MAIN.name else "_" + re.sub(r"\W+", "_", variant.name.lower())
    (bench.folder / f"{bench.path.stem}_profile{suffix}.md").write_text("\n".join(lines))
    bench.say("\n".join(lines))


def time_peer(bench: Bench, shape: Shape, kind: str, compiled: bool) -> None:
    """transformers' Trainer on the same rows."""
    timing = trainer_run(shape, kind, bench.arguments.warm_ups, bench.arguments.repeats, compiled)
    name = f"{kind} by transformers' Trainer" + (", compiled" if compiled else "")
    bench.report("peer", name, timing, shape.micro_rows, optimizer="adamw", compiled=compiled)


def scale(ranks: list[int]) -> int:
    """Runs this program's main step on each number of ranks, one after the other; returns a failed one's exit code."""
    given = sys.argv[1:]
    at = given.index("--ranks")
    others = given[:at] + given[at + 1 + len(ranks) :]
    failed = 0
    for count in ranks:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)] if count > 1 else []
        only = ["--only", f"{re.escape(MAIN.name)}$"]
        failed = subprocess.run([sys.executable, *launcher, __file__, *others, *only]).returncode or failed
    return failed


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=os.environ.get("OUT") or str(ROOT / "benchmarks/results"), help="folder")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the program; times mean nothing")
    parser.add_argument("--cpu_mark", action="store_true", help="only the 10M model on the CPU")
    parser.add_argument("--max_logits", action="store_true", help="only the cost of maximum logits, by attention")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps a row")
    parser.add_argument("--warm_ups", type=int, default=3, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the CPU mark")
    parser.add_argument("--rows", type=int, default=None, help="rows of a step on each rank")
    parser.add_argument("--micro_rows", type=int, default=None, help="rows at once")
    parser.add_argument("--ranks", nargs="*", type=int, help="time the main step on each of these numbers of GPUs")
    parser.add_argument(
        "--only", nargs="*", default=[], help="run only sections whose title holds one of these patterns"
    )
    parser.add_argument("--unprofiled", action="store_true", help="write no profile")
    parser.add_argument(
        "--product_seconds", type=float, default=1.5, help="of products alone, for each number of rows"
    )
    parser.add_argument("--budget_seconds", type=float, default=1200, help="start no section after this")
    parser.add_argument(
        "--peak_tflops", type=float, default=None, help="of the device, where the program knows it not"
    )
    parser.add_argument("--commit", default="unknown", help="commit, where this is no git checkout")
    return parser.parse_args()


def main() -> None:
    """Check, time, profile, and write the table."""
    arguments = parse()
    if arguments.ranks:
        sys.exit(scale(arguments.ranks))
    bench = Bench(arguments)
    bench.say(str(bench.common))
    if arguments.cpu_mark:
        bench.section("cpu mark", lambda: parts.cpu_mark(bench, cases.CPU_10M))
        return
    shape = cases.TINY if arguments.tiny else cases.LARGE
    shape = replace(shape, rows=arguments.rows or shape.rows, micro_rows=arguments.micro_rows or shape.micro_rows)
    if arguments.max_logits:
        for variant in (SDPA, MAIN):
            bench.section(f"maximum logits: {variant.name}", lambda v=variant: logits.time_max_logits(bench, shape, v))
        return
    main_shape = replace(shape, micro_rows=MAIN.micro_rows)
    packing = any(variant.packed and bench.wants(f"step: {variant.name}") for variant in VARIANTS)
    for packed in (False, True) if packing else (False,):
        title = f"reference for every step: {'packed' if packed else 'whole'} rows"
        bench.section(title, lambda packed=packed: take_reference(bench, shape, packed))
    bench.section(f"step: {MAIN.name}", lambda: time_variant(bench, shape, MAIN))
    if bench.world_size == 1:
        bench.section(f"step: {LONG.name}", lambda: time_long(bench, shape))
        bench.section("peer: Llama, Trainer", lambda: time_peer(bench, shape, "Llama", False))
        bench.section("peer: Motif2, Trainer", lambda: time_peer(bench, shape, "Motif2", False))
        bench.section("peer: DiffLlama, Trainer", lambda: time_peer(bench, shape, "DiffLlama", False))
        bench.section(f"step: {FP8.name}", lambda: time_variant(bench, shape, FP8))
        bench.section("linear part", lambda: parts.time_linear_part(bench, main_shape))
        bench.section("products alone", lambda: parts.time_products(bench, shape))
        bench.section(f"step: {SDPA.name}", lambda: time_variant(bench, shape, SDPA))
    for variant in VARIANTS:
        bench.section(f"step: {variant.name}", lambda variant=variant: time_variant(bench, shape, variant))
    if bench.world_size == 1:
        bench.section("loss", lambda: parts.time_head(bench, shape, 2048 if arguments.tiny else 219_520))
        bench.section("peer: Llama, Trainer, compiled", lambda: time_peer(bench, shape, "Llama", True))
    bench.save()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
