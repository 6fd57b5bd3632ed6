"""Where the time of a training step goes: by kind of kernel, by kernel, and what the device waits for."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.flops import count_parameters

CEILING = 0.8  # share of the peak that a large bfloat16 product reaches on an H100 (780-800 of 989 TFLOP/s)
LARGEST_KERNELS, LARGEST_WAITS, NAME_LENGTH = 30, 12, 110
# Kernels of this repository, by the function's name.
TRITON_KERNELS = {
    "PolyNorm": (
        "forward_kernel",
        "backward_kernel",
        "long_forward_kernel",
        "long_backward_kernel",
        "sum_partials_kernel",
    ),
    "Newton-Schulz": ("symmetric_product_kernel", "square_sums_kernel", "normalise_kernel"),
    "maximum logits": ("_kernel",),
    "momentum and update": (
        "_nesterov_kernel",
        "_apply_update_kernel",
        "_scale_rows_kernel",
        "_mark_not_finite_kernel",
    ),
}
KINDS = {  # other kernels, by words in their name in lower case; the first match wins
    "fused by the compiler": ("triton_",),
    "attention": ("flash", "fmha", "sdpa", "attention", "gda"),
    "communication": ("nccl",),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "::addmm", "::bmm", "_scaled_mm", "wgmma"),
    "momentum and update": ("adam",),
}
ANNOTATIONS = ("ProfilerStep", "FSDP", "Torch-Compiled", "Compiled", "## Call", "Optimizer.", "autograd::", "nccl:")


class Span(NamedTuple):
    """One run of a kernel, or of an operator where there is no device; seconds."""

    name: str
    start: float
    end: float


def record(step: Callable[[], None], cuda: bool) -> list[Span]:
    """What ran during a call of `step`, in order of time.

    Args:
        step: the work; it waits for the device before it returns.
        cuda: kernels of the device; else the CPU's operators, each without the operators that it calls.
    """
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as recorded:
        step()
    events = recorded.events()
    ours = {  # operators and kernels of PolyNorm and attention share names
        (kernel.name, kernel.duration) for event in events if "::gda_" in event.name for kernel in event.kernels
    }
    spans = []
    for event in events:
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device != cuda or event.name.startswith(ANNOTATIONS) or getattr(event, "is_user_annotation", False):
            continue
        start = 1e-6 * event.time_range.start
        taken = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
        name = f"gda {event.name}" if (event.name, taken) in ours else event.name
        spans.append(Span(name, start, start + 1e-6 * taken))
    return sorted(spans, key=lambda span: span.start)


def kind_of(kernel: str) -> str:
    """What a kernel or operator is part of, by its name."""
    ours = (kind for kind, names in TRITON_KERNELS.items() if kernel in names)
    others = (kind for kind, words in KINDS.items() if any(word in kernel.lower() for word in words))
    return next(ours, None) or next(others, "other elementwise and copies")


def describe(spans: list[Span], config, timing, tokens: int, ranks: int, peak_tflops: float | None) -> list[str]:
    """The report's lines.

    Args:
        spans: of one step, see `record`.
        config: of the model.
        timing: of the same step without the profiler.
        tokens: of the step, over all ranks.
        ranks: that share it.
        peak_tflops: of a device, where known.
    """
    wall = statistics.median(timing.seconds)
    by_kind, by_name = _sums(spans, lambda span: kind_of(span.name)), _sums(spans, lambda span: span.name)
    busy = sum(seconds for seconds, _ in by_kind.values())
    products = 6 * (count_parameters(config)["matrices"] + config.vocab_size * config.hidden_size) * tokens / ranks
    flops = {"products": products, "attention": timing.flops - products}
    ceiling = peak_tflops and CEILING * peak_tflops * 1e12
    lines = [
        "| kind | seconds | share of the step | TFLOP/s | seconds at the limit | lost |",
        "|---|---|---|---|---|---|",
    ]
    for kind, (seconds, _) in by_kind.items():
        rate = limit = lost = ""
        if kind in flops:
            rate = f"{flops[kind] / seconds / 1e12:.1f}"
            if ceiling:
                least = flops[kind] / ceiling
                limit, lost = f"{least:.4f}", f"{(seconds - least) / wall:.1%} of the step"
        lines.append(f"| {kind} | {seconds:.4f} | {seconds / wall:.1%} | {rate} | {limit} | {lost} |")
    lines += [
        f"| device idle, or work at once | {wall - busy:.4f} | {1 - busy / wall:.1%} | | 0 | {1 - busy / wall:.1%} |",
        "",
        "Products include Newton-Schulz where it runs as plain products: their rate counts the model's FLOPs alone. "
        f"The limit is {CEILING:.0%} of {peak_tflops or 'unknown'} TFLOP/s, what a large product reaches.",
        f"Parts of the step: {', '.join(f'{part} {share:.1%}' for part, share in (timing.parts or {}).items())}; "
        f"waiting for data {timing.wait_seconds / wall:.2%}.",
        "",
        f"## The {LARGEST_KERNELS} largest kernels",
        "",
        "| kernel | kind | runs | seconds | share of the step |",
        "|---|---|---|---|---|",
    ]
    for name, (seconds, runs) in list(by_name.items())[:LARGEST_KERNELS]:
        lines.append(f"| `{_short(name)}` | {kind_of(name)} | {runs} | {seconds:.4f} | {seconds / wall:.1%} |")
    lines += ["", "## What the device waits for", "", "| next kernel | gaps | seconds, profiled |", "|---|---|---|"]
    for name, (seconds, gaps) in list(_waits(spans).items())[:LARGEST_WAITS]:
        lines.append(f"| `{_short(name)}` | {gaps} | {seconds:.4f} |")
    return [*lines, ""]


def _sums(spans: list[Span], key: Callable[[Span], str]) -> dict[str, tuple[float, int]]:
    """Seconds and number of the spans of each key, the largest first."""
    sums: dict[str, tuple[float, int]] = {}
    for span in spans:
        seconds, runs = sums.get(key(span), (0.0, 0))
        sums[key(span)] = (seconds + span.end - span.start, runs + 1)
    return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def _waits(spans: list[Span]) -> dict[str, tuple[float, int]]:
    """Seconds in which nothing ran, and the number of such gaps, by the kernel that ended them."""
    gaps, busy_until = [], spans[0].end if spans else 0.0
    for span in spans[1:]:
        if span.start > busy_until:
            gaps.append(Span(span.name, busy_until, span.start))
        busy_until = max(busy_until, span.end)
    return _sums(gaps, lambda gap: gap.name)


def _short(name: str) -> str:
    return name.replace("|", "/").replace("\n", " ")[:NAME_LENGTH]
