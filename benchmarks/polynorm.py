"""PolyNorm kernels against eager torch, torch.compile, Liger and the official kernel, on one GPU in one process.

`python benchmarks/polynorm.py` checks first (float64 reference, odd shapes, poisoned outputs, repeatability,
compilation) and times nothing on a red check. `--sweep` also times launch variants, for choosing the ones in
`launch.py`. A time is the median over rounds that rotate through input sets larger than the L2 cache; the share is
that of a large copy's bandwidth in the same run, counting each input once and each output once.

Shapes: T rows (tokens), N = 16384 columns.
"""

import argparse
import csv
import os
import statistics
import subprocess
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from polynorm_cases import COLUMNS, KERNEL, ROOT, check, make_inputs, ours, peers, values_and_gradients

import kernels_hub

ROWS = (2048, 8192, 16384)
RESULTS = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
FIELDS = "section name shape direction ms p20 p80 share_of_copy ratio_to_compile peak_over_minimum device torch commit"


def milliseconds(function: Callable, sets: list, rounds: int = 15) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of one call's device time; calls rotate over `sets`.

    A sleep on the device comes first, so that the host has queued a round before its first kernel starts.
    """
    times = []
    for round_index in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(20_000_000)
        start.record()
        for one in sets:
            function(one)
        end.record()
        torch.cuda.synchronize()
        if round_index >= 2:
            times.append(start.elapsed_time(end) / len(sets))
    fifths = statistics.quantiles(times, n=5)
    return statistics.median(times), fifths[0], fifths[3]


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of large copies on the device."""
    sets = [(torch.randn(2**28, device="cuda"), torch.empty(2**28, device="cuda")) for _ in range(2)]
    median, low, high = milliseconds(lambda pair: pair[1].copy_(pair[0]), sets)
    bandwidth = 2 * 4 * 2**28 / median * 1e3
    print(f"copy bandwidth {bandwidth / 1e12:.3f} TB/s (p20 {low:.3f} ms, p80 {high:.3f} ms)")
    return bandwidth


class Table:
    """Rows of results: printed as they come, kept for the CSV file."""

    def __init__(self):
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        self.common = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "commit": commit.strip() or "unknown",
        }
        self.rows: list[dict] = []

    def add(self, section: str, name: str, shape: str, direction: str, times, **more) -> None:
        """Adds one result; `times` is (median, p20, p80) in ms."""
        row = dict.fromkeys(FIELDS.split(), "") | self.common
        row |= {"section": section, "name": name, "shape": shape, "direction": direction}
        row |= {key: f"{value:.4f}" for key, value in zip(("ms", "p20", "p80"), times, strict=True)}
        row |= {key: f"{value:.3f}" for key, value in more.items()}
        self.rows.append(row)
        extra = "  ".join(f"{key} {value:.3f}" for key, value in more.items())
        print(f"{section:10} {name:22} {shape:18} {direction:9} {times[0]:9.4f} ms  {extra}", flush=True)

    def write(self, path: Path) -> None:
        """Writes the CSV file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS.split())
            writer.writeheader()
            writer.writerows(self.rows)
        print(f"wrote {path}")


def minimal_bytes(rows: int, mul: bool, backward: bool) -> int:
    """Each input read once, each output written once; a backward reads x, dy (up) and writes dx (dup)."""
    return (3 + 2 * mul if backward else 2 + mul) * rows * COLUMNS * 2


def operators(table: Table, bandwidth: float) -> None:
    """Forward and backward of every implementation at every T, plain and times up."""
    implementations = peers()
    for rows, mul in product(ROWS, (False, True)):
        shape = f"T{rows} {'*up' if mul else 'plain'}"
        times: dict[tuple[str, str], tuple] = {}
        for name in ("torch.compile", *(name for name in implementations if name != "torch.compile")):
            torch.cuda.empty_cache()
            try:
                times |= _time_operator(implementations[name], name, rows, mul)
            except Exception as error:
                print(f"{name} {shape}: {type(error).__name__}: {str(error)[:200]}")
                continue
            for direction in ("forward", "backward"):
                result = times[name, direction]
                share = minimal_bytes(rows, mul, direction == "backward") / bandwidth / result[0] * 1e3
                base = times.get(("torch.compile", direction))  # none where it failed
                ratio = {"ratio_to_compile": base[0] / result[0]} if base else {}
                table.add("operator", name, shape, direction, result, share_of_copy=share, **ratio)
        _time_peak(table, rows, mul)


def _time_operator(function: Callable, name: str, rows: int, mul: bool) -> dict:
    num_sets, rounds = (2, 5) if name == "eager" else (8 if rows <= 2048 else 3, 15)
    sets = [make_inputs((rows, COLUMNS), torch.bfloat16, mul) for _ in range(num_sets)]

    def forward(one):
        function(*one[:4])

    def backward(one):
        torch.autograd.grad(one[0], one[1], one[2], retain_graph=True)

    result = {(name, "forward"): milliseconds(forward, sets, rounds)}
    graphs = [(function(*one[:4]), [leaf for leaf in one[:4] if leaf is not None], one[4]) for one in sets]
    result[name, "backward"] = milliseconds(backward, graphs, rounds)
    return result


def _time_peak(table: Table, rows: int, mul: bool) -> None:
    inputs = make_inputs((rows, COLUMNS), torch.bfloat16, mul)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = values_and_gradients(ours, *inputs)
    peak = torch.cuda.max_memory_allocated() - before
    minimum = sum(result.numel() * result.element_size() for result in results)
    shape = f"T{rows} {'*up' if mul else 'plain'}"
    table.add("memory", "ours", shape, "both", (0.0, 0.0, 0.0), peak_over_minimum=peak / minimum)


def _variants(direction: str, mul: bool) -> list:
    """Launches worth timing for one kernel."""
    plan = KERNEL.ops.launch.Plan
    num_inputs = 1 + mul + (direction == "backward")
    programs = (1, 2, 4, 8) if direction == "backward" or mul else (2, 8, 32, 1024)
    return [
        plan(warps, count, stages, COLUMNS, packed, together)
        for warps, stages, packed, together in product((8, 16, 32), (1, 2, 3), (False, True), (False, True))
        for count in programs
        if (stages - 1) * num_inputs * COLUMNS * 2 < 220 * 1024
        and not (together and direction == "forward")
        and (packed or stages != 2)
    ]


def _launch(direction: str, inputs, variant):
    x, up, weight, bias, dy = inputs[:5]
    if direction == "forward":
        return KERNEL.ops.launch.forward(x, up, weight, bias, 1e-6, variant)
    return KERNEL.ops.launch.backward(dy, x, up, weight, bias, inputs[5], variant)


def _compile_variants(direction: str, mul: bool, variants: list) -> None:
    """Fills Triton's cache from a process of its own."""
    inputs = [None if i is None else i.detach() for i in make_inputs((2, COLUMNS), torch.bfloat16, mul)]
    inputs.append(torch.ones(2, 3, device="cuda"))
    for variant in variants:
        try:
            _launch(direction, inputs, KERNEL.ops.launch.Plan(*variant))
        except Exception as error:
            print(f"{direction} mul={mul} {tuple(variant)}: {str(error)[:80]}")


def sweep(table: Table, bandwidth: float) -> None:
    """Times launch variants for each T and prints the best of each kernel, over all T and for one."""
    cases = {
        (direction, mul): _variants(direction, mul)
        for direction, mul in product(("forward", "backward"), (False, True))
    }
    distinct = {
        case: list({variant._replace(programs=1): tuple(variant) for variant in variants}.values())
        for case, variants in cases.items()
    }
    with ProcessPoolExecutor(16, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_compile_variants, *case, some[i::8]) for case, some in distinct.items() for i in range(8)]
        for job in jobs:
            job.result()
    for (direction, mul), variants in cases.items():
        shares = {variant: [] for variant in variants}
        for rows in ROWS:
            sets = [
                [None if i is None else i.detach() for i in make_inputs((rows, COLUMNS), torch.bfloat16, mul)]
                + [torch.rand(rows, 3, device="cuda")]
                for _ in range(4 if rows == 2048 else 2)
            ]
            wanted = _launch(direction, sets[0], None)
            for variant in variants:
                try:
                    for got, want in zip(_launch(direction, sets[0], variant), wanted, strict=True):
                        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
                    times = milliseconds(lambda one, d=direction, v=variant: _launch(d, one, v), sets, 5)
                except Exception as error:
                    print(f"{direction} mul={mul} {tuple(variant)}: {type(error).__name__} {str(error)[:100]!r}")
                    continue
                share = minimal_bytes(rows, mul, direction == "backward") / bandwidth / times[0] * 1e3
                shares[variant].append(share)
        whole = {variant: share for variant, share in shares.items() if len(share) == len(ROWS)}
        orders = {"all": min} | {f"T{rows}": lambda share, at=at: share[at] for at, rows in enumerate(ROWS)}
        for order, key in orders.items():
            for variant, share in sorted(whole.items(), key=lambda item: -key(item[1]))[:8]:
                by_rows = "  ".join(f"T{rows} {one:.3f}" for rows, one in zip(ROWS, share, strict=True))
                name = f"{direction:8} {'*up  ' if mul else 'plain'}"
                print(f"sweep {name} best for {order:6} {by_rows}  {tuple(variant)}", flush=True)


def whole_layers(table: Table) -> None:
    """A whole MLP and a whole decoder layer of Motif-2-12.7B, forward and backward, with each PolyNorm."""
    from modeling_motif2 import Motif2Config, Motif2Model

    config = Motif2Config(num_hidden_layers=1, vocab_size=256)
    with torch.device("cuda"):
        model = Motif2Model(config).to(torch.bfloat16)
    mlp = model.layers[0].mlp
    sets = [torch.randn(2, 4096, config.hidden_size, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    parts = {
        "MLP": (mlp, lambda run, x: run(x)),
        "decoder layer": (model, lambda run, x: run(inputs_embeds=x, use_cache=False).last_hidden_state),
    }
    for part, source, compiled in product(parts, ("torch", "local"), (False, True)):
        module, call = parts[part]
        torch._dynamo.reset()
        kernels_hub.use_polynorm(model, source)
        run = torch.compile(module) if compiled else module

        def step(x, run=run, call=call):
            leaf = x.detach().requires_grad_()
            call(run, leaf).backward(x)

        name = f"{'ours' if source == 'local' else source}{', compiled' if compiled else ''}"
        try:
            step(sets[0])
            torch.cuda.reset_peak_memory_stats()
            times = milliseconds(step, sets, 11)
        except Exception:
            traceback.print_exc()
            continue
        table.add("whole", name, f"{part} B2 T4096", "fwd+bwd", times)
        print(f"    peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
        model.zero_grad(set_to_none=True)


def norm_and_residual(table: Table, bandwidth: float) -> None:
    """RMSNorm after the residual addition, hidden size 4096: how far torch.compile is from a kernel's limit."""

    def add_norm(x, residual, weight):
        total = x + residual
        wide = total.float()
        return total, (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype))

    compiled = torch.compile(add_norm, dynamic=False, fullgraph=True)
    for rows in (8192, 16384):
        sets = []
        for _ in range(4):
            x, residual, dtotal, dy = (torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(4))
            weight = torch.ones(4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            sets.append((x.requires_grad_(), residual.requires_grad_(), weight, dtotal, dy))
        size = rows * 4096 * 2
        for name, function in (("eager", add_norm), ("torch.compile", compiled)):
            with torch.no_grad():
                times = milliseconds(lambda one, f=function: f(*one[:3]), sets)
            table.add(
                "norm+res",
                name,
                f"T{rows} C4096",
                "forward",
                times,
                share_of_copy=4 * size / bandwidth / times[0] * 1e3,
            )
            graphs = [(function(*one[:3]), one[:3], one[3:]) for one in sets]
            times = milliseconds(lambda g: torch.autograd.grad(g[0], g[1], g[2], retain_graph=True), graphs)
            table.add(
                "norm+res",
                name,
                f"T{rows} C4096",
                "backward",
                times,
                share_of_copy=4 * size / bandwidth / times[0] * 1e3,
            )


def main() -> None:
    """Checks, times every section, writes polynorm.csv; a section that fails is printed and the others go on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="also time launch variants")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table()
    print(table.common)
    check()
    bandwidth = copy_bandwidth()
    sections: list[Callable] = [
        lambda: operators(table, bandwidth),
        lambda: whole_layers(table),
        lambda: norm_and_residual(table, bandwidth),
    ]
    if arguments.sweep:
        sections.insert(0, lambda: sweep(table, bandwidth))
    for section in sections:
        try:
            section()
        except Exception:
            traceback.print_exc()
        table.write(RESULTS / "polynorm.csv")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
