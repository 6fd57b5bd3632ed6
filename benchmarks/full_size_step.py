"""Training steps of the whole Motif-2-12.7B, random weights, on the GPUs of one node: FSDP2 or HSDP, bfloat16 or FP8.

    torchrun --nproc_per_node 8 benchmarks/full_size_step.py                                # FSDP2
    torchrun --nproc_per_node 8 benchmarks/full_size_step.py --replicas 2                   # HSDP, 2 x 4
    torchrun --nproc_per_node 8 benchmarks/full_size_step.py --fp8 rowwise_with_gw_hp
    torchrun --nproc_per_node 2 benchmarks/full_size_step.py --tiny                        # tries the program on CPUs

One way to run a call, so that one which fails loses no other's results. A step is the trainer's, as in train_step.py:
layers compiled and recomputed, chunked loss, float32 weights, MuonClip with QK-clip. All rows of a step go through at
once, since FSDP2 holds whole gradients while it accumulates. Without --rows it takes the most, up to eight, that
`trainer.flops.memory_by_rank` lets fit. A first loss that is not that of random weights ends the run, untimed.

Writes full_size_step_x<ranks>_<layout>_<precision>_l<layers>.csv in $OUT, else in benchmarks/results/, and beside it
as .md where the first rank's time goes; attention other than SDPA, and other recomputation, stand at the name's end.
FLOPs are the model's, attention over visible pairs included, recomputation and optimizer not.
"""

import argparse
import csv
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import train_step_profile as step_profile
from benchmarks.train_step_cases import TINY, OurRun, Shape, Timing, Variant, synchronize
from trainer.flops import memory_by_rank

ROOT = Path(__file__).resolve().parents[1]
FULL_SIZE = Shape(4096, 16384, 40, 16, 128, 219_520, 4096, 8, 8)
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0}
MEMORY_SHARE = 0.85  # assumption: what the count of memory leaves out fits into the rest


def layout_of(replicas: int) -> str:
    """Name of the layout; several replicas are HSDP, which accelerate is told as `accelerate launch` tells it."""
    ranks = int(os.environ["WORLD_SIZE"])
    if ranks % replicas or not 1 <= replicas < ranks:
        raise SystemExit(f"--replicas is {replicas}: it must divide the {ranks} ranks and leave shards")
    if replicas == 1:
        return "fsdp2"
    if not torch.cuda.is_available():
        raise SystemExit(
            "--replicas needs GPUs: accelerate shards nothing on CPUs, where only the program can be tried"
        )
    os.environ |= {
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": str(replicas),
        "PARALLELISM_CONFIG_DP_SHARD_SIZE": str(ranks // replicas),
    }
    return f"hsdp{replicas}x{ranks // replicas}"


def count_memory(shape: Shape, rows: int, shards: int, recompute: str) -> dict[str, float]:
    """Gigabytes on a rank, by `trainer.flops`."""
    tokens = rows * shape.length
    counted = memory_by_rank(shape.motif(), tokens, shards, recompute=recompute, chunked_loss=True)
    return {part: size / 1e9 for part, size in counted.items()}


def rows_that_fit(shape: Shape, shards: int, recompute: str) -> int:
    """The most rows of a rank, 8, 4, 2 or 1, for which the device's memory suffices."""
    if not torch.cuda.is_available():
        return shape.rows
    available = MEMORY_SHARE * torch.cuda.get_device_properties(0).total_memory / 1e9
    for rows in (8, 4, 2, 1):
        if sum(count_memory(shape, rows, shards, recompute).values()) < available:
            return rows
    raise SystemExit(f"not one row fits into {available:.0f} GB of {shards} shards: take more ranks or fewer replicas")


def check_first_step(run: OurRun, vocabulary: int) -> tuple[float, float]:
    """Loss and gradient norm before any update; random weights know nothing of the words, so the loss is ln V."""
    loss, norm = run.first_step()
    if not (abs(loss - math.log(vocabulary)) < 1 and 0 < norm < math.inf):
        raise SystemExit(f"first loss {loss} (random weights: {math.log(vocabulary):.2f}), gradient norm {norm}")
    return loss, norm


def describe(run: OurRun, timing: Timing, peak: float | None) -> dict:
    """A run's figures; seconds are the first rank's, peaks every rank's."""
    seconds = statistics.median(timing.seconds)
    peaks: list[float | None] = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, (timing.peak_bytes or 0) / 1e9)
    rate = timing.flops / seconds / 1e12
    return {
        "parameters": timing.parameters,
        "tokens_a_step": timing.tokens,
        "seconds": seconds,
        "fastest": min(timing.seconds),
        "slowest": max(timing.seconds),
        "tokens_per_second": timing.tokens / seconds,
        "tokens_per_second_a_gpu": timing.tokens / seconds / len(peaks),
        "tflops_a_gpu": rate,
        "mfu": rate / peak if peak else "",
        **{f"{part}_share": share for part, share in (timing.parts or {}).items()},
        "optimizer_ms": 1e3 * timing.parts["optimizer"] * statistics.mean(timing.seconds),
        "peak_gb_by_rank": " ".join(f"{peak:.1f}" for peak in peaks),
        "polynorm": str(run.polynorm),
    }


def write_row(run: OurRun, timing: Timing, path: Path, row: dict) -> None:
    """Write the row, then the profile of one more step; the first rank writes, all take the step."""
    first = dist.get_rank() == 0
    if first:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, row)
            writer.writeheader()
            writer.writerow(row)
        print("\n".join(f"{key}: {value}" for key, value in row.items()), flush=True)

    def step() -> None:
        run.step.run(run.loader.next_batch(), 0.01)
        synchronize()

    if not first:
        return step()
    spans = step_profile.record(step, torch.cuda.is_available())
    tokens, ranks, peak = row["tokens_a_step"], row["world_size"], peak_tflops(row["device"])
    lines = [f"# {row['row']}, {row['rows_a_rank']} rows a rank, {row['seconds']:.3f} s a step", ""]
    lines += [f"{ranks} x {row['device']}, torch {row['torch']}, commit {row['commit']}", ""]
    lines += step_profile.describe(spans, run.config, timing, tokens, ranks, peak)
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines[:20]), flush=True)


def peak_tflops(device: str) -> float | None:
    """bfloat16's peak of a device, where known."""
    return next((value for key, value in PEAK_TFLOPS.items() if key in device), None)


def name_of(layout: str, layers: int, fp8: str, attention: str, recompute: str) -> str:
    """Name of a run's row and files; what is not as by default is in it."""
    precision = {"none": "bf16", "rowwise_with_gw_hp": "fp8"}.get(fp8, f"fp8_{fp8}")
    others = [attention] * (attention != "sdpa") + [f"recompute_{recompute}"] * (recompute != "full")
    return "_".join([layout, precision, f"l{layers}", *others])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1, help="copies of the model: HSDP")
    parser.add_argument("--fp8", default="none", choices=("none", "rowwise", "rowwise_with_gw_hp"))
    parser.add_argument("--attention", default="sdpa", help="attn_implementation")
    parser.add_argument("--recompute", default="full", choices=("none", "selective", "full"))
    parser.add_argument("--layers", type=int, help="fewer than the model has, for a layout that would not fit")
    parser.add_argument("--rows", type=int, help="of a rank in a step")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers")
    parser.add_argument("--tiny", action="store_true", help="a toy size")
    return parser.parse_args()


def main() -> None:
    """Prepare, check, time, write."""
    arguments, started = parse(), time.perf_counter()
    layout = layout_of(arguments.replicas)
    ranks = int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    def say(text: str) -> None:
        if os.environ["RANK"] == "0":
            print(f"{text} ({time.perf_counter() - started:.0f} s)", flush=True)

    size = TINY if arguments.tiny else FULL_SIZE
    size = replace(size, layers=arguments.layers or size.layers)
    shards = ranks // arguments.replicas
    rows = arguments.rows or rows_that_fit(size, shards, arguments.recompute)
    shape = replace(size, rows=rows, micro_rows=rows)
    counted = count_memory(shape, rows, shards, arguments.recompute)
    say(f"{layout}, {rows} rows a rank; GB counted: { ({part: round(size, 1) for part, size in counted.items()}) }")
    settings = {key: getattr(arguments, key) for key in ("fp8", "attention", "recompute")}
    name = name_of(layout, shape.layers, **settings)
    run = OurRun(shape, Variant(name, compiled=not arguments.eager, loss="chunked", **settings))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what whole layers left behind before they were sharded; NCCL needs some
    say("model and optimizer are ready")
    loss, norm = check_first_step(run, shape.vocabulary)
    say(f"first loss {loss:.4f}, gradient norm {norm:.4f}")
    timing = run.time(1, arguments.repeats)
    say("timed")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row = {
        **{
            "row": name,
            "layout": layout,
            "layers": shape.layers,
            **settings,
            "compiled": not arguments.eager,
            "rows_a_rank": rows,
        },
        **describe(run, timing, peak_tflops(device)),
        **{"counted_gb": sum(counted.values()), "first_loss": loss, "first_gradient_norm": norm},
        **{"commit": commit.stdout.strip() or "unknown", "device": device, "world_size": ranks},
        **{"torch": torch.__version__, "transformers": transformers.__version__},
    }
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    write_row(run, timing, folder / f"full_size_step_x{ranks}_{name}.csv", row)
    say("done")
    run.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
