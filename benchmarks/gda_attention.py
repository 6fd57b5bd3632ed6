"""Grouped differential attention on one GPU: correct first, then our kernel beside the libraries, and a whole layer.

    python benchmarks/gda_attention.py [--sections check,operator,packed,layer,sweep] [--all_ways] [--output DIR]

Heads of Motif-2-12.7B (32 signal, 8 noise, D 128), bfloat16, causal. Every time includes subtraction, norm and factor,
which a way marked "compiled" leaves to torch.compile. By default our kernel, with its own passes and with
FlashAttention-4's, beside the fastest libraries, all but the sweep of tiles (four minutes); `--all_ways` adds the
slower ones.
"share" is that of the dense bfloat16 peak (989 TFLOP/s) by the operations that one pass over a 256-wide value needs.
A way that failed its check is not timed. `--tiny` runs every section on a CPU with toy sizes, to prove the script.

Shapes: B rows, T tokens, G groups, r signal heads a group, D head dimension.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import torch._functorch.config
from attention_cases import EPS, OUT_SCALE, ROOT, Report, load_kernel, make_inputs, milliseconds, relative
from attention_peers import CAUSAL_ONLY, PACKED_ONLY, library, ways

import kernels_hub
from modeling_motif2 import Motif2Config, attention_measurement, modeling_motif2

PEAK = 989e12
NAMES = ("out", "signal_query", "noise_query", "key", "value", "lambda", "weight")
GROUPS, RATIO, DIM = 8, 4, 128
# Largest relative error of a value and of a gradient against float64 in bfloat16.
LIMITS = (1.5e-2, 3e-2)
DRAWS = 16  # of inputs that errors are of


def values_and_gradients(function: Callable, inputs: list, dout: torch.Tensor, **intervals) -> list[torch.Tensor]:
    """The output and the gradients of all six inputs."""
    out = function(inputs, **intervals)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout.to(out.dtype))]


# Queries, keys, warps, stages.
SWEEP = (
    (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 3),
    (32, 64, 8, 2), (32, 64, 4, 2), (64, 32, 4, 2), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 4),
    (128, 32, 8, 4), (128, 128, 8, 2),
)  # fmt: skip


def with_tile(launch, plan, kernel: str, tile):
    """The plan with another tile; a tile of `key` has as many keys as one of `query` has queries."""
    plan = plan._replace(**{kernel: tile})
    edge = plan.query.queries
    return plan._replace(key=plan.key._replace(keys=edge, queries=min(edge, plan.key.queries)))


def compile_tiles(kernel: str, tile: tuple[int, int, int, int]) -> None:
    """Compiles one variant into Triton's cache on disk; a variant that does not fit is met again by the sweep."""
    launch = load_kernel().ops.launch
    inputs = make_inputs(1, 256, 256, GROUPS, RATIO, DIM, torch.bfloat16, torch.device("cuda"), False)
    shipped = launch.plan(DIM, 2, inputs[2].device)
    plan = with_tile(launch, shipped, kernel, launch.Tiles(*tile))
    options = (None, None, DIM**-0.5, EPS, OUT_SCALE)
    with contextlib.suppress(Exception):
        out, raw, lse, _ = launch.forward(*inputs, *options, True, tiles=plan.forward)
        if kernel != "forward":
            launch.backward(out, *inputs, None, None, raw, lse, *options[2:], tiles=plan)


class Suite:
    """The sections; sizes shrink where `tiny`."""

    def __init__(self, report: Report, device: torch.device, tiny: bool, everything: bool):
        self.report, self.device, self.tiny = report, device, tiny
        self.kernel = load_kernel()
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.heads = (2, 2, 16) if tiny else (GROUPS, RATIO, DIM)
        self.cases = [(2, 40), (1, 70)] if tiny else [(2, 4096), (1, 16384)]
        self.ways = ways(self.kernel, DIM, device, everything)
        self.wrong: set[str] = set()

    def inputs(self, batch: int, tokens: int, gradients: bool = True, dtype: torch.dtype | None = None) -> list:
        return make_inputs(batch, tokens, tokens, *self.heads, dtype or self.dtype, self.device, gradients)

    def packed(self, tokens: int) -> dict[str, torch.Tensor]:
        """Intervals of a row of documents of uneven length, about an eighth of it each."""
        shares = torch.tensor([0.02, 0.21, 0.05, 0.13, 0.24, 0.01, 0.19], device=self.device)
        ends = (shares.cumsum(0) * tokens).int()
        cumulative = torch.cat((ends.new_zeros(1), ends, ends.new_tensor([tokens])))
        first, last = self.kernel.packed_intervals(cumulative, tokens)
        return {"first": first, "last": last}

    def check(self) -> None:
        """Value and all gradients of every way against float64, causal and packed, at an odd length, over draws."""
        torch.manual_seed(0)
        tokens, draws = (30, 2) if self.tiny else (1357, DRAWS)
        for shape, intervals in (("causal", {}), ("packed", self.packed(tokens))):
            ways = {
                name: way
                for name, way in self.ways.items()
                if name not in (CAUSAL_ONLY if intervals else PACKED_ONLY) and f"{name} {shape}" not in self.wrong
            }
            errors, lambdas = {name: [] for name in ways}, {name: [] for name in ways}
            for _ in range(draws):
                inputs = self.inputs(1, tokens)
                exact = [each.detach().double().requires_grad_() for each in inputs]
                with torch.no_grad():
                    dout = torch.randn_like(library(None, False)(exact, **intervals))
                wanted = values_and_gradients(library(None, False), exact, dout, **intervals)
                for name, way in ways.items():
                    found = self.found(name, shape, way, inputs, dout, intervals)
                    if found is not None:
                        errors[name].append([relative(*pair) for pair in zip(found, wanted, strict=True)])
                        place = NAMES.index("lambda")
                        lambdas[name].append(torch.stack([found[place].double(), wanted[place]]))
            for name in ways:
                if f"{name} {shape}" not in self.wrong:
                    self.judge(name, f"{shape} T{tokens}", errors[name], torch.stack(lambdas[name]))
        if any(name.startswith("ours") for name in self.wrong):
            raise AssertionError(f"our kernel differs from float64: {sorted(self.wrong)}")

    def found(self, name: str, shape: str, way: Callable, inputs: list, dout: torch.Tensor, intervals: dict):
        """What one way gives, or None where it fails, now or before."""
        if f"{name} {shape}" in self.wrong:
            return None
        try:
            return values_and_gradients(way, inputs, dout, **intervals)
        except Exception as error:
            self.wrong.add(f"{name} {shape}")
            print(f"{name} {shape}: {type(error).__name__}: {str(error)[:200]}")
            return None

    def judge(self, name: str, shape: str, errors: list[list[float]], lambdas: torch.Tensor) -> None:
        """Reports one way's errors (draws, parts), medians and range; notes it where the worst are too large.

        lambda's gradient is one number a draw, which may come near 0: it is reported, not judged, and once more with
        all draws as one vector. `lambdas` is (draws, 2), found and exact.
        """
        worst = {}
        for part, found in zip(NAMES, zip(*errors, strict=True), strict=True):
            worst[part], note = max(found), f"{len(found)} draws, {min(found):.3g} to {max(found):.3g}"
            self.report.add("check", name, shape, part, statistics.median(found), "error", note=note)
        together = relative(*lambdas.unbind(1))
        self.report.add("check", name, shape, "lambda, draws as one", together, "error", note=f"{len(errors)} draws")
        gradients = max(error for part, error in worst.items() if part not in ("out", "lambda"))
        if not (worst["out"] < LIMITS[0] and gradients < LIMITS[1]):
            self.wrong.add(f"{name} {shape.split()[0]}")

    def operations(self, batch: int, tokens: int, backward: bool) -> float:
        """Operations of one pass: 3 units of D a visible pair and head forward, 7 backward."""
        groups, ratio, dim = self.heads
        return (7 if backward else 3) * 2 * dim * batch * groups * (ratio + 1) * tokens * (tokens + 1) / 2

    def time_way(self, section: str, name: str, way: Callable, batch: int, tokens: int, **intervals) -> None:
        """Forward without gradients, and the backward, of one way at one size."""
        shape = f"B{batch} T{tokens}"
        if f"{name} {'packed' if intervals else 'causal'}" in self.wrong:
            print(f"{name} {shape}: not timed, its check failed")
            return
        sets = [self.inputs(batch, tokens) for _ in range(2)]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

        def forward(inputs):
            with torch.no_grad():
                way(inputs, **intervals)

        graphs = [(way(inputs, **intervals), inputs) for inputs in sets]
        douts = [torch.randn_like(out) for out, _ in graphs]
        calls = [(*graph, dout) for graph, dout in zip(graphs, douts, strict=True)]

        def backward(call):
            torch.autograd.grad(*call[:2], call[2], retain_graph=True)

        for direction, function, arguments in (("forward", forward, sets), ("backward", backward, calls)):
            times = milliseconds(function, arguments, 3 if self.tiny else 9, self.device)
            more = {}
            if not intervals:
                rate = self.operations(batch, tokens, direction == "backward") / times["value"] * 1e3
                more = {"share": rate / PEAK, "note": f"{rate / 1e12:.0f} TFLOP/s"}
            peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
            self.report.add(section, name, shape, direction, times.pop("value"), "ms", peak_gib=peak, **times, **more)

    def operator(self) -> None:
        """Every way at the sizes of the table."""
        for (batch, tokens), (name, way) in itertools.product(self.cases, self.ways.items()):
            if name in PACKED_ONLY:
                continue
            try:
                self.time_way("operator", name, way, batch, tokens)
            except Exception as error:
                print(f"{name} B{batch} T{tokens}: {type(error).__name__}: {str(error)[:200]}")
        self.compare()

    def compare(self) -> None:
        """Prints forward, backward and both of every way, and how many times as long each other takes as ours."""
        times = {}
        for row in self.report.rows:
            if row["section"] == "operator":
                times.setdefault((row["shape"], row["name"]), {})[row["direction"]] = float(row["value"])
        for shape in dict.fromkeys(shape for shape, _ in times):
            here = {name: found for (where, name), found in times.items() if where == shape and len(found) == 2}
            best = min((sum(found.values()) for name, found in here.items() if name.startswith("ours")), default=0.0)
            print(f"\n{shape:26} {'forward':>9} {'backward':>9} {'both, ms':>9} {'times our best':>15}")
            for name, found in here.items():
                both = sum(found.values())
                ratio = f"{both / best:15.2f}" if best else ""
                print(f"{name:26} {found['forward']:9.3f} {found['backward']:9.3f} {both:9.3f} {ratio}")

    def packs(self) -> None:
        """One row of documents; SDPA goes over the whole square."""
        tokens = self.cases[-1][1]
        for name in ("ours", *PACKED_ONLY, "flex x4", "sdpa cudnn x4" if self.device.type == "cuda" else "sdpa"):
            if name not in self.ways:
                continue
            try:
                self.time_way("packed", name, self.ways[name], 1, tokens, **self.packed(tokens))
            except Exception as error:
                print(f"{name} packed: {type(error).__name__}: {str(error)[:200]}")

    def sweep(self) -> None:
        """Tiles of the forward and of the backward's large passes at the first size, the others as shipped."""
        launch = self.kernel.ops.launch
        if launch is None or (self.device.type == "cpu" and not launch.INTERPRETED):
            print("no sweep: outside a GPU the kernels run in Triton's interpreter only (TRITON_INTERPRET=1)")
            return
        batch, tokens = self.cases[0]
        inputs = [each.detach() for each in self.inputs(batch, tokens)]
        scaling = self.heads[2] ** -0.5
        options = (None, None, scaling, EPS, OUT_SCALE)
        shipped = launch.plan(self.heads[2], inputs[2].element_size(), inputs[2].device)
        out, raw, lse, _ = launch.forward(*inputs, *options, True)
        dout = torch.randn_like(out)
        tiles = [launch.Tiles(*each) for each in SWEEP] if not self.tiny else [shipped.forward]
        jobs = list(itertools.product(("forward", "query", "value"), SWEEP))
        if self.device.type == "cuda":
            with ProcessPoolExecutor(min(12, os.cpu_count()), mp_context=get_context("spawn")) as pool:
                list(pool.map(compile_tiles, *zip(*jobs, strict=True)))
        for kernel, tile in itertools.product(("forward", "query", "value"), tiles):
            plan = with_tile(launch, shipped, kernel, tile)

            def call(_, kernel=kernel, plan=plan):
                if kernel == "forward":
                    launch.forward(*inputs, *options, True, tiles=plan.forward)
                else:
                    saved = (None, None, raw, lse, scaling, EPS, OUT_SCALE)
                    launch.backward(dout, *inputs, *saved, tiles=plan)

            name = f"{tile.queries}x{tile.keys} w{tile.warps} s{tile.stages}"
            try:
                times = milliseconds(call, [None] * 2, 3, self.device)
            except Exception as error:  # out of shared memory or registers
                print(f"{kernel} {name}: {type(error).__name__}: {str(error)[:120]}")
                continue
            direction = "forward" if kernel == "forward" else "backward"
            self.report.add(
                "sweep", name, f"B{batch} T{tokens} {kernel}", direction, times.pop("value"), "ms", **times
            )

    def layer(self) -> None:
        """One decoder layer of Motif-2-12.7B (random weights), forward and backward, by `attn_implementation`."""
        small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 6, "num_key_value_heads": 4}
        small |= {"num_noise_heads": 2, "head_dim": 16, "vocab_size": 64}
        config = Motif2Config(num_hidden_layers=1, **(small if self.tiny else {}))
        config._attn_implementation = "sdpa"
        layer = modeling_motif2.Motif2DecoderLayer(config, 1).to(self.device, self.dtype)
        rotary = modeling_motif2.Motif2RotaryEmbedding(config).to(self.device)
        kernels_hub.use_polynorm(layer, "torch" if self.device.type == "cpu" else "auto")
        for (batch, tokens), name in itertools.product(self.cases, ("sdpa", "gda_fastest", "gda_kernel")):
            kernels_hub.use_gda_attention(layer, "local")
            layer.self_attn.config._attn_implementation = name
            states = [
                torch.randn(batch, tokens, config.hidden_size, device=self.device, dtype=self.dtype).requires_grad_()
                for _ in range(2)
            ]
            positions = torch.arange(tokens, device=self.device)[None]
            arguments = {"position_embeddings": rotary(states[0], positions), "position_ids": positions}
            weights = list(layer.parameters())

            def forward(inputs, arguments=arguments):
                with torch.no_grad():
                    layer(inputs, attention_mask=None, **arguments)

            def step(inputs, arguments=arguments, weights=weights):
                out = layer(inputs, attention_mask=None, **arguments)
                torch.autograd.grad(out, [inputs, *weights], out.detach())

            for direction, function in (("forward", forward), ("step", step)):
                times = milliseconds(function, states, 3 if self.tiny else 7, self.device)
                chosen = attention_measurement.latest_way("causal", direction == "step", False)
                note = chosen.name if chosen is not None and name == "gda_fastest" else ""
                shape, value = f"B{batch} T{tokens}", times.pop("value")
                self.report.add("layer", name, shape, direction, value, "ms", note=note, **times)
        for situation, choice in attention_measurement.choices().items():
            print(f"chosen: {choice.name} of {choice.milliseconds}, refused {choice.refused}, for {situation}")


def main() -> int:
    """Runs the sections that were asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default="check,operator,packed,layer")
    parser.add_argument("--all_ways", action="store_true", help="the slower libraries too")
    parser.add_argument("--output", default=os.environ.get("OUT") or ROOT / "benchmarks" / "results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to prove the script without a GPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU: use --tiny to try the script")
    torch._functorch.config.donated_buffer = False  # one graph's backward is timed again and again
    torch._dynamo.config.recompile_limit = 64  # FlexAttention runs uncompiled beyond it
    report = Report(options.output / ("gda_attention_tiny.csv" if options.tiny else "gda_attention.csv"), device)
    suite = Suite(report, device, options.tiny, options.all_ways)
    sections = {"check": suite.check, "operator": suite.operator, "packed": suite.packs}
    sections |= {"sweep": suite.sweep, "layer": suite.layer}
    for name in options.sections.split(","):
        report.section(name, sections[name])
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
