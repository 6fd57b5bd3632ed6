"""What `benchmarks/gda_attention.py` and `benchmarks/decode.py` share: a report, clocks, and inputs of attention.

Shapes: B rows, T queries, S keys, G groups, r signal heads a group, D head dimension.
"""

import csv
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import kernels_hub  # noqa: E402

FIELDS = ("section", "name", "shape", "direction", "value", "unit", "p20", "p80", "share", "peak_gib", "note")
EPS, OUT_SCALE = 1e-5, 0.64


def _place(row: dict) -> tuple:
    """What a row measures: a later one of the same is put in its place."""
    names = ("section", "name", "shape", "direction", "device", *["commit"] * (row["section"] == "copy"))
    return tuple(row[name] for name in names)


class Report:
    """Rows of results: printed and written to a CSV file as they come.

    A row takes the place of the file's row of the same section, name, shape, direction and device. A copy's rate stays
    with the rows of its commit, whose shares are of it.
    """

    def __init__(self, path: Path, device: torch.device):
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, capture_output=True).returncode == 1
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.common = {"device": name, "torch": torch.__version__, "commit": "unknown"}
        if commit.stdout.strip():
            self.common["commit"] = commit.stdout.strip() + "+changes" * changed
        try:
            import triton

            self.common["triton"] = triton.__version__
        except ImportError:
            self.common["triton"] = "none"
        self.path, self.rows, self.failed = path, [], []

    def add(self, section: str, name: str, shape: str, direction: str, value: float, unit: str, **more) -> None:
        """Adds one result; `more` may hold p20, p80, share (of a bandwidth or rate), peak_gib and note."""
        row = {"section": section, "name": name, "shape": shape, "direction": direction, "value": value, "unit": unit}
        row |= more
        self.rows.append({key: f"{each:.5g}" if isinstance(each, float) else each for key, each in row.items()})
        extra = "  ".join(f"{key} {each:.3g}" if isinstance(each, float) else str(each) for key, each in more.items()
                          if key not in ("p20", "p80"))  # fmt: skip
        print(f"{section:9} {name:20} {shape:24} {direction:9} {value:10.4g} {unit:9} {extra}", flush=True)
        self.write()

    def section(self, name: str, function: Callable[[], None]) -> bool:
        """Runs one section, whatever it does; returns whether it went through."""
        started = time.perf_counter()
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            self.failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        print(f"# {name}: {time.perf_counter() - started:.0f} s", flush=True)
        return not any(each.startswith(f"{name}:") for each in self.failed)

    def leave_out(self, what: str, error: Exception) -> None:
        """Notes one measurement that failed, and goes on."""
        print(f"{what}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        self.failed.append(f"{what}: {type(error).__name__}")

    def write(self) -> None:
        """Writes the CSV file: this run's rows after those that the file keeps."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row | self.common for row in self.rows]
        measured = {_place(row) for row in rows}
        kept = []
        if self.path.is_file():
            with self.path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if _place(row) not in measured]
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*FIELDS, *self.common])
            writer.writeheader()
            writer.writerows([*kept, *rows])

    def finish(self) -> int:
        """Prints what failed and where the file is; returns the exit code."""
        print("# failed: " + ("; ".join(self.failed) or "nothing") + f"; wrote {self.path}")
        return 1 if self.failed else 0


def milliseconds(function: Callable, sets: list, rounds: int = 9, device: torch.device | None = None) -> dict:
    """Median, 20th and 80th percentile of one call's time; calls rotate over `sets`.

    On a GPU a sleep on the device comes first, so that the host has queued a round before its first kernel starts.
    """
    times = []
    for attempt in range(rounds + 2):
        if device is None or device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(3_000_000)
            start.record()
            for one in sets:
                function(one)
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            started = time.perf_counter()
            for one in sets:
                function(one)
            elapsed = 1e3 * (time.perf_counter() - started)
        if attempt >= 2:
            times.append(elapsed / len(sets))
    fifths = statistics.quantiles(times, n=5)
    return {"value": statistics.median(times), "p20": fifths[0], "p80": fifths[3]}


def graph_milliseconds(step: Callable[[], object], replays: int, device: torch.device, rounds: int = 5) -> dict:
    """The same of a step that is captured once and replayed; without a GPU it is simply called."""
    if device.type != "cuda":
        return milliseconds(lambda _: step(), [None] * replays, rounds, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return milliseconds(lambda _: graph.replay(), [None] * replays, rounds, device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read plus written, of large copies on the device."""
    elements = 2**28 if device.type == "cuda" else 2**20
    sets = [(torch.randn(elements, device=device), torch.empty(elements, device=device)) for _ in range(2)]
    median = milliseconds(lambda pair: pair[1].copy_(pair[0]), sets, device=device)["value"]
    return 2 * 4 * elements / median * 1e3


def load_kernel():
    """The attention kernel of this checkout."""
    return kernels_hub.load_local("gda_attention")


def make_inputs(batch, tokens, keys, groups, ratio, dim, dtype, device, gradients: bool) -> list[torch.Tensor]:
    """signal_query, noise_query, key, value, lambda and weight in the kernel's shapes, as projections leave them."""
    shapes = ((batch, tokens, groups, ratio, dim), (batch, tokens, groups, dim))
    shapes += ((batch, keys, groups, 2, dim),) * 2
    inputs = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    # lambda in the heads' type: the model's own layers round it, and an error of that would not be attention's.
    inputs += [torch.tensor(0.4, device=device, dtype=dtype).float(), 1 + 0.1 * torch.randn(2 * dim, device=device)]
    return [each.requires_grad_(gradients) for each in inputs]


def epilogue(signal, noise, lambda_, weight):
    """The model's own: subtraction, norm, factor; signal (B, T, G, r, 2D), noise (B, T, G, 1, 2D)."""
    difference = signal - lambda_.to(signal.dtype) * noise
    wide = difference if difference.dtype == torch.float64 else difference.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (weight * normed).to(signal.dtype) * OUT_SCALE


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm; infinite where anything is not finite."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    return float(error) if torch.isfinite(actual).all() else float("inf")
