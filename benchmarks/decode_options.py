"""The compiled decode step of the 12.7B under Inductor's options, on slices of 2 and 6 layers, 40 by extrapolation.

    python benchmarks/decode_options.py [--variants "own combo,tuned combo"] [--layers 2,6] [--seconds 180] [--tiny]

Batch 1 after 1,024 tokens. Every variant has a process of its own, and must be as near to float32 as the eager step;
files tell the kernels that one step launches. "own" is with `kernels_hub.use_decode_products`, "tuned" Inductor's
coordinate descent (which makes the products itself), "combo" its combined small kernels, "early" its programmatic
dependent launch.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import decode
import torch
from attention_cases import ROOT, Report, graph_milliseconds
from decode_cases import full_size_model

import kernels_hub
from modeling_motif2 import Motif2Config, Motif2ForCausalLM

TUNED, COMBO, EARLY = (
    {"coordinate_descent_tuning": True}, {"combo_kernels": True}, {"triton.enable_pdl": True},
)  # fmt: skip
# Name: Inductor's options (None: not compiled), and whether the products are in. The most telling first.
VARIANTS = {
    "own combo": (COMBO, True),
    "tuned combo": (TUNED | COMBO, False),
    "combo": (COMBO, False),
    "own tuned combo": (TUNED | COMBO, True),
    "own late combo": (COMBO, True),
    "tuned": (TUNED, False),
    "own combo early": (COMBO | EARLY, True),
    "tuned combo early": (TUNED | COMBO | EARLY, False),
    "own": ({}, True),
    "own eager": (None, True),
    "plain": ({}, False),
    "eager": (None, False),
}
LAYERS = 40
CONTEXT = 1024


def slice_of(layers: int, suite: decode.Suite) -> Motif2ForCausalLM:
    """The first layers of the 12.7B with its embedding and head, random weights."""
    model = full_size_model(suite.tiny, suite.device, suite.dtype, num_hidden_layers=layers)
    suite.prepare(model, "gda_kernel")
    return model


def kernels_of(function, path: Path) -> tuple[int, float]:
    """Number and microseconds of the kernels of one call, and a file that lists them."""
    with torch.profiler.profile() as profiler:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA if torch.cuda.is_available() else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == on_device]
    events.sort(key=lambda event: -event.self_device_time_total)
    lines = (f"{e.self_device_time_total:9.1f} us {e.count:5d} x {e.key[:160]}" for e in events)
    path.write_text("\n".join(lines) + "\n")
    return sum(event.count for event in events), sum(event.self_device_time_total for event in events)


def one(name: str, counts: list[int], report: Report, suite: decode.Suite) -> None:
    """Checks and times one variant."""
    options, own = VARIANTS[name]
    context = 20 if suite.tiny else CONTEXT
    times = {}
    for layers in counts:
        model = slice_of(layers, suite)
        if own:
            namespace = kernels_hub.use_decode_products(model, "local")
            if "late" in name and suite.device.type == "cuda":
                sys.modules[namespace].ops.launch._starts_early = lambda device: False
        with torch.no_grad():
            step, read, cache = suite.one_step(model, 1, context)
            if options is not None:
                step = suite.compiled("options", name, model, step, cache, context, options)
            found = graph_milliseconds(step, suite.new_tokens, suite.device)
            times[layers] = found["value"]
            shape = f"{layers} layers"
            share = read / suite.bandwidth / found["value"] * 1e3
            report.add("options", name, shape, "step", found.pop("value"), "ms", share=share, **found)
        if layers != counts[-1]:
            del model, cache, step
    a_layer = (times[counts[-1]] - times[counts[0]]) / (counts[-1] - counts[0])
    whole = times[counts[0]] + (LAYERS - counts[0]) * a_layer
    config = Motif2Config()
    hidden, width = config.hidden_size, config.head_dim * config.num_groups
    weights = LAYERS * hidden * ((config.num_signal_heads_per_group * 3 + 5) * width + 3 * config.intermediate_size)
    read = 2 * (weights + config.vocab_size * hidden) + CONTEXT * LAYERS * 8 * width
    report.add("options", name, "40 layers", "step", whole, "ms", share=read / suite.bandwidth / whole * 1e3,
               note=f"extrapolated; a layer {1e3 * a_layer:.1f} us")  # fmt: skip
    with torch.no_grad():
        number, busy = kernels_of(step, report.path.with_name(f"kernels_{name.replace(' ', '_')}.txt"))
    report.add("options", name, shape, "step", number, "kernels", note=f"{busy:.0f} us of their own")


def main() -> int:
    """Runs one variant, or each in a process of its own while time is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, help="this one alone, in this process")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--layers", default="2,6")
    parser.add_argument("--seconds", type=float, default=180, help="start no further variant after")
    parser.add_argument("--output", default=os.environ.get("OUT") or ROOT / "benchmarks" / "results", type=Path)
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to prove the script without a GPU")
    options = parser.parse_args()
    if options.variant:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        report = Report(options.output / f"decode_options_{options.variant.replace(' ', '_')}.csv", device)
        suite = decode.Suite(report, device, options.tiny)
        counts = [int(each) for each in options.layers.split(",")]
        report.section(options.variant, lambda: one(options.variant, counts, report, suite))
        return report.finish()
    started = time.perf_counter()
    for name in options.variants.split(","):
        left = options.seconds - (time.perf_counter() - started)
        if left < 10:
            print(f"no time for {name}")
            continue
        command = [sys.executable, __file__, "--variant", name, "--layers", options.layers]
        command += ["--output", str(options.output)] + ["--tiny"] * options.tiny
        try:
            subprocess.run(command, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name}: out of time", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
