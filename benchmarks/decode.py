"""Decoding and prefill on one GPU: our kernel's step beside SDPA, Motif-2 beside Llama and DiffLlama, and the 12.7B.

    python benchmarks/decode.py [--sections check,kernel,models,…] [--models "llama sdpa,…"] [--output DIR] [--tiny]

Steps run from a static cache as a captured CUDA graph, with a mask made before, as `generate` does it. "share" is that
of a copy's bandwidth in the same run, by the bytes a step must read: the cache (keys of both maps and values, once)
and, for models, the weights but the embedding. "compiled" is the step as one graph of Inductor's, which must be as
near to float32 as the eager step first, "products" with `kernels_hub.use_decode_products`. Weights are random. A cache
that leaves no room runs with fewer layers, twice, and the whole step is extrapolated: the note says so.
`--tiny` runs every section on a CPU with toy sizes, to prove the script.

Shapes: B rows, S keys (the context), G groups, r signal heads a group, D head dimension.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from attention_cases import (
    EPS,
    OUT_SCALE,
    ROOT,
    Report,
    copy_bandwidth,
    graph_milliseconds,
    load_kernel,
    make_inputs,
    relative,
)
from decode_cases import (
    by_sdpa,
    by_sdpa_halves,
    filled_cache,
    first_layers,
    full_size_model,
    in_float32,
    models_of_one_size,
    parameters_read,
)
from decode_prompts import generations, prompt_milliseconds
from transformers import StaticCache
from transformers.masking_utils import create_masks_for_generate

import kernels_hub
from modeling_motif2 import Motif2ForCausalLM

GROUPS, RATIO, DIM = 8, 4, 128
CONTEXTS, BATCHES = (1024, 16384, 32768), (1, 8, 64)
LIMIT = 1.5e-2  # relative error in bfloat16
ROUND_SECONDS = 0.25  # about what a round of steps may take (assumption)
LARGEST_RATIO = 1.5  # of a compiled step's error against float32 to the eager step's (assumption)
# Of the memory beside the weights; a larger cache runs with fewer layers (assumption: what else a step needs).
CACHE_SHARE = 0.6
# Combo kernels put small kernels that do not depend on each other into one launch; with coordinate descent Inductor
# makes and tiles a product with one row itself, else cuBLAS does.
COMBO = {"combo_kernels": True}
TUNED = {"coordinate_descent_tuning": True, "combo_kernels": True}
COMPILED = ("llama sdpa", "motif2 gda_kernel")


class Suite:
    """The sections; sizes shrink where `tiny`."""

    def __init__(self, report: Report, device: torch.device, tiny: bool, names: list[str] | None = None):
        self.report, self.device, self.tiny, self.names = report, device, tiny, names
        self.kernel = load_kernel()
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.heads = (2, 2, 16) if tiny else (GROUPS, RATIO, DIM)
        self.contexts, self.batches = ((20, 50), (1, 2)) if tiny else (CONTEXTS, BATCHES)
        self.bandwidth = copy_bandwidth(device)
        self.new_tokens = 2 if tiny else 16
        self.memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**17
        report.add("copy", "bandwidth", "", "", self.bandwidth / 1e12, "TB/s")

    def ours(self, inputs: list) -> torch.Tensor:
        return self.kernel.gda_decode(*inputs, out_scale=OUT_SCALE, eps=EPS)

    def check(self) -> None:
        """The kernel's step against float64, from short to long contexts."""
        for batch, context in itertools.product((1, 3), (1, 20, 77) if self.tiny else (1, 100, 1000, 16384)):
            inputs = make_inputs(batch, 1, context, *self.heads, self.dtype, self.device, False)
            error = relative(self.ours(inputs), by_sdpa([each.double() for each in inputs]))
            self.report.add("check", "ours", f"B{batch} S{context}", "step", error, "error")
            if not error < LIMIT:
                raise AssertionError(f"B{batch} S{context}: relative error {error:.1e} above {LIMIT:.0e}")

    def time_kernel(self) -> None:
        """One layer's attention by batch and context."""
        groups, _, dim = self.heads
        contenders = {"ours": self.ours, "sdpa wide x2": by_sdpa, "sdpa x4": by_sdpa_halves}
        for batch, context in itertools.product(self.batches, self.contexts):
            read = batch * context * groups * 4 * dim * self.dtype.itemsize
            inputs = make_inputs(batch, 1, context, *self.heads, self.dtype, self.device, False)
            for name, function in contenders.items():
                self.step("kernel", name, f"B{batch} S{context}", lambda f=function, i=inputs: f(i), read, batch)

    def timed(self, function: Callable) -> dict:
        """Median, 20th and 80th percentile of a step in a CUDA graph; long steps run fewer times."""
        with torch.no_grad():
            function()
            started = time.perf_counter()
            function()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            replays = max(1, min(self.new_tokens, int(ROUND_SECONDS / (time.perf_counter() - started))))
            return graph_milliseconds(function, replays, self.device)

    def step(self, section: str, name: str, shape: str, function: Callable, read: int, batch: int) -> None:
        """Times one step and adds its row; `read` bytes must come from memory."""
        try:
            self.add_step(section, name, shape, self.timed(function), read, batch)
        except Exception as error:
            self.report.leave_out(f"{section} {name} {shape}", error)

    def add_step(
        self, section: str, name: str, shape: str, times: dict, read: int, batch: int, note: str = ""
    ) -> None:
        """Adds a step's row."""
        value = times.pop("value")
        share = read / self.bandwidth / value * 1e3
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        note = f"{batch / value * 1e3:.0f} tokens/s{note}"
        self.report.add(section, name, shape, "step", value, "ms", share=share, peak_gib=peak, note=note, **times)

    def one_step(self, model, batch: int, context: int) -> tuple[Callable, int, StaticCache]:
        """A model's step from a filled cache, the bytes of weights and cache that it must read, and the cache."""
        cache = filled_cache(model, batch, context, context + 10 * self.new_tokens, self.device)
        ids = torch.ones(batch, 1, dtype=torch.long, device=self.device)
        positions = torch.full((batch, 1), context, device=self.device)
        make = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        embeds = torch.empty(batch, 1, 0, device=self.device, dtype=self.dtype)
        mask = make(config=model.config, inputs_embeds=embeds, attention_mask=None, past_key_values=cache)

        def step():
            arguments = {"past_key_values": cache, "position_ids": positions, "attention_mask": mask}
            return model(ids, **arguments, use_cache=True).logits

        return step, parameters_read(model) + batch * context * self.cache_bytes(model.config), cache

    def cache_bytes(self, config) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * config.num_key_value_heads * config.head_dim * self.dtype.itemsize * config.num_hidden_layers

    def compiled(
        self, section: str, name: str, model, step: Callable, cache: StaticCache, context: int, options: dict
    ) -> Callable:
        """The step as one graph of Inductor's, once its logits are as near to float32's as the eager step's."""
        torch._dynamo.reset()
        options = options if self.device.type == "cuda" else {}
        function = torch.compile(step, fullgraph=True, dynamic=False, options=options)

        def logits(each: Callable) -> torch.Tensor:
            for layer in cache.layers:
                layer.cumulative_length.fill_(context)
            return each().float().clone()

        with in_float32(model, cache):
            wanted = logits(step)
        eager = relative(logits(step), wanted)
        started = time.perf_counter()
        error = relative(logits(function), wanted)
        note = f"eager {eager:.2e}; compiled in {time.perf_counter() - started:.0f} s"
        self.report.add(section, name, f"B1 S{context}", "logits", error, "error", note=note)
        if not error <= LARGEST_RATIO * eager + 1e-6:
            raise AssertionError(f"compiled logits are {error:.1e} from float32, the eager step's {eager:.1e}")
        return function

    def decode_steps(
        self, section: str, name: str, model, batch: int, context: int, options: dict | None = None
    ) -> None:
        """Times a model's step, with `options` for Inductor compiled; what fails is left out."""
        shape = f"B{batch} S{context}"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            cache_bytes = batch * (context + 10 * self.new_tokens) * self.cache_bytes(model.config)
            room = CACHE_SHARE * (self.memory - parameters_read(model))
            if cache_bytes > room:
                fitting = int(room / cache_bytes * model.config.num_hidden_layers)
                self.by_fewer_layers(section, name, model, batch, context, max(fitting, 2))
                return
            with torch.no_grad():
                step, read, cache = self.one_step(model, batch, context)
                if options is not None:
                    name = f"{name} compiled"
                    step = self.compiled(section, name, model, step, cache, context, options)
                self.step(section, name, shape, step, read, batch)
        except Exception as error:
            self.report.leave_out(f"{section} {name} {shape}", error)

    def by_fewer_layers(self, section: str, name: str, model, batch: int, context: int, most: int) -> None:
        """Extrapolates a step from those of the first `most` layers and of half as many."""
        counts, found = (most // 2, most), []
        for count in counts:
            with torch.no_grad(), first_layers(model, count):
                function, _, cache = self.one_step(model, batch, context)
                found.append(self.timed(function)["value"])
            del function, cache
        a_layer = (found[1] - found[0]) / (counts[1] - counts[0])
        layers = model.config.num_hidden_layers
        value = found[1] + (layers - most) * a_layer
        read = parameters_read(model) + batch * context * self.cache_bytes(model.config)
        note = f"; extrapolated from {counts[0]} and {most} of {layers} layers"
        self.add_step(section, name, f"B{batch} S{context}", {"value": value}, read, batch, note)

    def profile(self) -> None:
        """Kernels that one step launches, and how long each kind runs: batch 1, the shortest context."""
        for name, make in self.makers().items():
            if name not in COMPILED:
                continue
            model = self.made(name, make)
            with torch.no_grad():
                context = self.contexts[0]
                step, _, cache = self.one_step(model, 1, context)
                compiled = self.compiled("profile", f"{name} compiled", model, step, cache, context, TUNED)
                for suffix, function in (("", step), (" compiled", compiled)):
                    for _ in range(3):
                        function()
                    with torch.profiler.profile() as profiler:
                        function()
                        if self.device.type == "cuda":
                            torch.cuda.synchronize()
                    self.report_kernels(name + suffix, profiler)

    def report_kernels(self, name: str, profiler) -> None:
        """Adds the number and time of a profile's kernels, and prints those that took longest."""
        on_device = torch.autograd.DeviceType.CUDA if self.device.type == "cuda" else torch.autograd.DeviceType.CPU
        kernels = [event for event in profiler.key_averages() if event.device_type == on_device]
        busy = sum(event.self_device_time_total for event in kernels) / 1e3
        self.report.add("profile", name, "B1", "step", sum(event.count for event in kernels), "kernels")
        self.report.add("profile", name, "B1", "step", busy, "ms", note="sum of the kernels' own times")
        for event in sorted(kernels, key=lambda event: -event.self_device_time_total)[:12]:
            print(f"    {event.self_device_time_total / 1e3:8.3f} ms  {event.count:5d} x {event.key[:110]}")

    def models(self) -> None:
        """Tokens a second of models of one size: Motif-2 by attention, Llama and DiffLlama with SDPA."""
        for name, make in self.makers().items():
            model = self.made(name, make)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            self.report.add("models", name, "", "size", parameters / 1e9, "B parameters")
            for batch, context in itertools.product(self.batches, self.contexts):
                self.decode_steps("models", name, model, batch, context)
            del model

    def compiled_models(self) -> None:
        """Those of them that are compiled, at batch 1: Motif-2 with the products too."""
        for name, make in self.makers().items():
            if name not in COMPILED:
                continue
            model = self.made(name, make)
            self.decode_steps("compiled", name, model, 1, self.contexts[0], COMBO)
            if isinstance(model, Motif2ForCausalLM):
                kernels_hub.use_decode_products(model, "local")
                self.decode_steps("compiled", f"{name} products", model, 1, self.contexts[0], COMBO)
            del model

    def makers(self) -> dict[str, Callable]:
        """What makes the models of one size that were asked for."""
        makers = models_of_one_size(self.tiny)
        return {name: makers[name] for name in self.names or makers}

    def made(self, name: str, make: Callable):
        """One of those, ready."""
        with self.device:
            model = make().to(self.dtype).eval()
        self.prepare(model, name.split()[-1])
        return model

    def prepare(self, model, attention: str) -> None:
        """Sets a model's attention and, for Motif-2, its kernels."""
        if isinstance(model, Motif2ForCausalLM):
            if attention == "gda_kernel":
                kernels_hub.use_gda_attention(model, "local")
            if self.device.type == "cuda":
                kernels_hub.use_polynorm(model, "auto", training=False)
        model.config._attn_implementation = attention

    def full_size(self) -> None:
        """Motif-2-12.7B in bfloat16, its own layers uncompiled: batches, ours and SDPA."""
        model = full_size_model(self.tiny, self.device, self.dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.report.add("full_size", "motif2", "", "size", parameters / 1e9, "B")
        for attention in ("gda_kernel", "sdpa"):
            self.prepare(model, attention)
            for batch, context in itertools.product((1, 2) if self.tiny else (1, 16), self.contexts[:2]):
                self.decode_steps("full_size", attention, model, batch, context)

    def one_token(self, name: str = "products", options: dict = COMBO) -> None:
        """The 12.7B's compiled step at batch 1: with our products, or without, by cuBLAS or Inductor."""
        model = full_size_model(self.tiny, self.device, self.dtype)
        self.prepare(model, "gda_kernel")
        kernels_hub.use_decode_products(model, "local" if name == "products" else "torch")
        for context in self.contexts[: 2 if name == "products" else 1]:
            self.decode_steps("one_token" if name == "products" else name, name, model, 1, context, options)

    def generate(self) -> None:
        """Time of a token in transformers' `generate` as a user calls it: static cache, compiled, CUDA graphs."""
        model = full_size_model(self.tiny, self.device, self.dtype)
        self.prepare(model, "gda_kernel")
        kernels_hub.use_decode_products(model, "local")
        prompt, tokens = (8, (3, 5)) if self.tiny else (1024, (32, 160))
        options = COMBO | {"triton.cudagraphs": True} if self.device.type == "cuda" else {}
        read = parameters_read(model) + (prompt + sum(tokens) // 2) * self.cache_bytes(model.config)
        for name, value, note in generations(model, prompt, tokens, options):
            note, share = f"{1e3 / value:.0f} tokens/s; {note}", read / self.bandwidth / value * 1e3
            self.report.add(
                "generate", f"products{name}", f"B1 S{prompt}", "step", value, "ms", share=share, note=note
            )

    def prefill(self) -> None:
        """Tokens a second of a prompt through the 12.7B, without a cache and into either kind, by attention."""
        model = full_size_model(self.tiny, self.device, self.dtype)
        sizes = ((1, 30),) if self.tiny else ((1, 4096), (4, 4096), (1, 16384))
        for attention, (batch, tokens) in itertools.product(("gda_kernel", "sdpa"), sizes):
            self.prepare(model, attention)
            for cache in ("", "static", "dynamic"):
                name, shape = attention + (cache and f", {cache} cache"), f"B{batch} T{tokens}"
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                try:
                    value = prompt_milliseconds(model, batch, tokens, cache)
                except Exception as error:
                    self.report.leave_out(f"prefill {name} {shape}", error)
                    continue
                peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
                note = f"{batch * tokens / value * 1e3:.0f} tokens/s"
                self.report.add("full_size", name, shape, "prefill", value, "ms", peak_gib=peak, note=note)


def main() -> int:
    """Runs the sections that were asked for; 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = "check,kernel,profile,models,compiled,full_size,prefill,one_token,generate,cublas,inductor"
    parser.add_argument("--sections", default=names)
    parser.add_argument("--models", help="of the sections models, compiled and profile: these alone, by name")
    parser.add_argument("--output", default=os.environ.get("OUT") or ROOT / "benchmarks" / "results", type=Path)
    parser.add_argument("--batches", help="of the sections kernel and models: these alone")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to prove the script without a GPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        parser.error("there is no GPU: use --tiny to try the script")
    report = Report(options.output / ("decode_tiny.csv" if options.tiny else "decode.csv"), device)
    suite = Suite(report, device, options.tiny, options.models and options.models.split(","))
    if options.batches:
        suite.batches = [int(each) for each in options.batches.split(",")]
    sections = {"check": suite.check, "kernel": suite.time_kernel}
    sections |= {"profile": suite.profile, "models": suite.models, "compiled": suite.compiled_models}
    sections |= {"full_size": suite.full_size, "prefill": suite.prefill}
    sections |= {"one_token": suite.one_token, "generate": suite.generate}
    sections |= {"cublas": lambda: suite.one_token("cublas"), "inductor": lambda: suite.one_token("inductor", TUNED)}
    for name in options.sections.split(","):
        if not report.section(name, sections[name]) and name == "check":
            break  # nothing is timed on a red check
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
