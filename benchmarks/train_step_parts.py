"""Parts of a training step that train_step.py times by themselves: products in FP8, the head's loss, a CPU's step."""

import importlib.util
import statistics
import time
from dataclasses import replace

import torch

from benchmarks import train_step_cases as cases
from benchmarks.train_step_cases import OurRun, Shape, Timing, Variant
from benchmarks.train_step_peers import trainer_run
from trainer.flops import count_parameters
from trainer.head_loss import HeadLoss

FP8_RECIPES = ("rowwise_with_gw_hp",)  # compiled, "rowwise" is refused
PRODUCT_ROWS = (2, 4, 5, 8)  # at once
CPU_VARIANTS = (
    Variant("Motif-2"),
    Variant("Motif-2, compiled", compiled=True),
    Variant("Motif-2, compiled, attention in plain products", compiled=True, attention="eager"),
)
FP8_BOUND = 0.15  # assumption: e4m3 rounds to 2^-4 of a value, and a gradient goes through two such products


def missing_library(variant: Variant) -> str | None:
    """The package that a variant needs and this machine lacks."""
    return "torchao" if variant.fp8 != "none" and importlib.util.find_spec("torchao") is None else None


def time_linear_part(bench, shape: Shape) -> None:
    """A decoder layer's products, forward and backward, compiled, in bfloat16 and in FP8; values first."""
    device = torch.device("cuda" if bench.cuda else "cpu")
    matrices = count_parameters(replace(shape, layers=1).motif())["matrices"]
    base = wanted = None
    for fp8 in ("none", *FP8_RECIPES):
        if missing_library(Variant("", fp8=fp8)):
            bench.note(f"linear part, {fp8}", "not run: torchao is not installed")
            continue
        layer, rows = cases.linear_layers(shape, fp8, device)
        gradient = 1e-6 * torch.randn(rows.shape, generator=torch.Generator(device).manual_seed(2), device=device)
        times = []
        for repeat in range(bench.arguments.warm_ups + 4 * bench.arguments.repeats):
            rows.grad = None
            layer.zero_grad()
            cases.synchronize()
            started = cases.mark()
            with torch.autocast(device.type, torch.bfloat16, enabled=bench.cuda):
                output = layer.forward(rows)
            output.backward(gradient.to(output.dtype))
            stopped = cases.mark()
            cases.synchronize()
            if repeat >= bench.arguments.warm_ups:
                times.append(cases.between(started, stopped))
        found = [
            output.detach(),
            rows.grad,
            *(parameter.grad for parameter in layer.parameters() if parameter.grad is not None),
        ]
        wanted = wanted or found
        error = max(float((one - other).norm() / other.norm()) for one, other in zip(found, wanted, strict=True))
        if not error <= FP8_BOUND:
            bench.note(f"linear part, {fp8}", f"off bfloat16 by {error:.1e}, so it is not timed")
            continue
        timing = Timing(times, len(rows), 6 * matrices * len(rows), matrices)
        base = base or statistics.median(times)
        note = f"{base / statistics.median(times):.3f} times as fast as bfloat16; off it by {error:.1e}"
        columns = {"fp8": fp8, "compiled": bench.cuda, "note": note}
        bench.report("linear part", f"products of a layer, {fp8}", timing, shape.micro_rows, **columns)
        bench.clean(fp8)


def time_products(bench, shape: Shape) -> None:
    """All 21 products of a decoder layer's step in bfloat16, one after the other until the device is warm, by rows."""
    device = torch.device("cuda" if bench.cuda else "cpu")
    with torch.device("meta"):
        layer = cases.Motif2ForCausalLM(replace(shape, layers=1).motif()).model.layers[0]
    sizes = [tuple(module.weight.shape) for module in layer.modules() if isinstance(module, torch.nn.Linear)]
    matrices = sum(width * depth for width, depth in sizes)
    for micro_rows in PRODUCT_ROWS:
        rows = micro_rows * shape.length
        operands = [
            [torch.randn(*size, device=device).bfloat16() for size in ((width, depth), (rows, depth), (rows, width))]
            for width, depth in sizes
        ]
        times, started = [], time.perf_counter()
        while not times or time.perf_counter() - started < bench.arguments.product_seconds:
            start = cases.mark()
            for weight, inputs, gradient in operands:
                _ = inputs @ weight.T, gradient @ weight, gradient.T @ inputs
            end = cases.mark()
            cases.synchronize()
            times.append(cases.between(start, end))
        timing = Timing(times[len(times) // 3 :], rows, 6 * matrices * rows, matrices)
        bench.report("products alone", f"products of a layer alone, {rows:,} rows", timing, micro_rows)


def time_head(bench, shape: Shape, vocabulary: int) -> None:
    """The loss over a large vocabulary, forward and backward, at once and in chunks."""
    device = torch.device("cuda" if bench.cuda else "cpu")
    tokens = shape.micro_rows * shape.length
    targets = torch.randint(0, vocabulary, (1, tokens), device=device)
    outcomes = {}
    for kind in ("full", "chunked"):
        if kind == "chunked" and (
            importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None
        ):
            bench.note("loss in chunks", "not run: trl (and datasets, which it imports) are not installed")
            continue
        torch.manual_seed(0)
        head = torch.nn.Linear(shape.hidden, vocabulary, bias=False, device=device)
        hidden = torch.randn(1, tokens, shape.hidden, device=device, requires_grad=True)
        loss = HeadLoss(head, kind)
        times = []
        for repeat in range(bench.arguments.warm_ups + bench.arguments.repeats):
            head.weight.grad = hidden.grad = None
            cases.synchronize(reset_peak=True)
            started = time.perf_counter()
            with loss.targets(targets), torch.autocast(device.type, torch.bfloat16, enabled=bench.cuda):
                losses = head(hidden)
            losses.mean().backward()
            cases.synchronize()
            if repeat >= bench.arguments.warm_ups:
                times.append(time.perf_counter() - started)
        outcomes[kind] = (losses.detach().mean(), head.weight.grad, hidden.grad)
        timing = Timing(
            times, tokens, 6 * vocabulary * shape.hidden * tokens, vocabulary * shape.hidden, cases.peak_bytes()
        )
        bench.report("loss", f"head and loss over {vocabulary} words, {kind}", timing, shape.micro_rows, loss=kind)
    if len(outcomes) == 2:
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(outcomes["chunked"], outcomes["full"], strict=True)]
        bench.note(
            "loss in chunks", f"off by {', '.join(f'{e:.1e}' for e in errors)} in loss, weight and input gradient"
        )


def cpu_mark(bench, shape: Shape) -> None:
    """A 10M model's step beside a Llama of the same size, in turns, on one thread, and what the arithmetic allows."""
    torch.set_num_threads(1)
    peer = "Llama by transformers' Trainer"
    timings: dict[str, list[Timing]] = {variant.name: [] for variant in CPU_VARIANTS} | {peer: []}
    runs = {variant.name: OurRun(shape, variant, backend="inductor") for variant in CPU_VARIANTS}
    for run in runs.values():
        run.time(1, 1)  # compiles
    for _ in range(bench.arguments.rounds):
        for name, run in runs.items():
            timings[name].append(run.time(0, bench.arguments.repeats))
        timings[peer].append(trainer_run(shape, "Llama", 1, bench.arguments.repeats))
        cases.make_accelerator("bf16")  # the Trainer's run ended with accelerate's state
    config = run.config
    for run in runs.values():
        run.close()
    taken = {}
    for name, of_rounds in timings.items():
        merged = replace(of_rounds[0], seconds=[second for timing in of_rounds for second in timing.seconds])
        columns = next((cases.describe(variant) for variant in CPU_VARIANTS if variant.name == name), {})
        taken[name] = bench.report("cpu mark", f"{name}, 10M", merged, shape.micro_rows, **columns)["seconds"]
    model = timings[CPU_VARIANTS[0].name][0].flops / timings[peer][0].flops
    optimizer = trainer_optimizer_flops(config) / timings[peer][0].flops
    ratios = ", ".join(f"{name} {seconds / taken[peer]:.3f}" for name, seconds in taken.items() if name != peer)
    bench.note(
        "cpu mark",
        f"CPU seconds over the Llama's: {ratios}; arithmetic's ratio {model + optimizer:.3f} (model {model:.3f}, "
        f"Newton-Schulz {optimizer:.3f})",
    )


def trainer_optimizer_flops(config) -> int:
    """FLOPs of Newton-Schulz over all matrices, as the optimizer runs it on a CPU."""
    from trainer.optim.orthogonalise import Orthogonaliser

    with torch.device("meta"):
        model = cases.Motif2ForCausalLM(config)
    flops = Orthogonaliser("gram", "motif", "auto").kernels.newton_schulz_flops
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    return sum(flops(*matrix.shape, method="gram", symmetric=False) for matrix in matrices)
