"""What QK-clip's maximum logits cost in a training step: not taken, behind the threshold's gate, exact everywhere.

`bench` is train_step.py's `Bench`. The three ways take turns in one process, so that what drifts cancels.
"""

import statistics
from dataclasses import replace

import torch

from benchmarks import train_step_cases as cases
from benchmarks.train_step_cases import OurRun, Shape, Timing, Variant

THRESHOLD = 100.0
WAYS = {"none": None, "gate at the threshold": THRESHOLD, "exact everywhere": 0.0}  # gates; no logits at all for None
LOSS_BOUND = 1e-3  # assumption: the ways are compiled apart, and bfloat16 rounds to .4%
LOGIT_BOUND = 2e-2  # assumption: between attention's own maxima and separate products, both of bfloat16


def take(run: OurRun, gate: float | None) -> None:
    """Let all layers take their maximum logits behind a gate, or not at all."""
    for attention in run.step.attentions:
        device = run.accelerator.device
        heads = attention.num_groups * (attention.num_signal_heads_per_group + 1)
        attention.max_logits = None if gate is None else torch.full((heads,), -torch.inf, device=device)
        attention.max_logits_gate = gate


def check_ways(run: OurRun) -> list[float]:
    """One step of each way on the same batch without changing a weight; the largest logit of each layer.

    Raises:
        RuntimeError: loss or norm depend on the way, or a gate hides what exceeds it.
    """
    batch = run.loader.next_batch()
    found = {}
    for way, gate in WAYS.items():
        take(run, gate)
        found[way] = run.step.run(batch, 0.0)
    base, gated, exact = found.values()
    error = max(
        abs(getattr(other, name) / getattr(base, name) - 1)
        for other in (gated, exact)
        for name in ("loss", "grad_norm")
    )
    if not error <= LOSS_BOUND or base.max_logits:
        raise RuntimeError(f"the ways differ by {error:.1e} in loss or norm, so they are not timed")
    pairs = list(zip(gated.max_logits, exact.max_logits, strict=True))
    if not pairs or any(bound < logit * (1 - LOGIT_BOUND) or bound > max(THRESHOLD, logit) for bound, logit in pairs):
        raise RuntimeError(f"largest logits by layer, gated and exact: {pairs}, so they are not timed")
    return exact.max_logits


def time_max_logits(bench, shape: Shape, variant: Variant) -> None:
    """Steps of the three ways in turns; each way's row says what share of the plain step it adds."""
    run = OurRun(shape, replace(variant, micro_rows=variant.micro_rows or shape.micro_rows))
    logits = check_ways(run)
    first = bench.largest_logits.setdefault("of the first", logits)
    error = max(abs(one / other - 1) for one, other in zip(logits, first, strict=True))
    if not error <= LOGIT_BOUND:
        raise RuntimeError(f"largest logits {logits} are off another attention's by {error:.1e}, so it is not timed")
    timings: dict[str, list[Timing]] = {way: [] for way in WAYS}
    for turn in range(bench.arguments.repeats + 1):
        for way, gate in WAYS.items():
            take(run, gate)
            timing = run.time(0, 1)
            if turn:  # the first warms up
                timings[way].append(timing)
    run.close()
    plain = [timing.seconds[0] for timing in timings["none"]]
    for way, of_turns in timings.items():
        seconds = [timing.seconds[0] for timing in of_turns]
        shares = sorted(one / other - 1 for one, other in zip(seconds, plain, strict=True))
        merged = replace(of_turns[-1], seconds=seconds, wait_seconds=statistics.mean(t.wait_seconds for t in of_turns))
        note = f"largest logit {max(logits):.2f}; turns from {shares[0]:+.2%} to {shares[-1]:+.2%}"
        columns = cases.describe(variant) | {"note": note, "logits": way, "logits_share": statistics.median(shares)}
        bench.report("maximum logits", f"{variant.name}, {way}", merged, run.shape.micro_rows, **columns)
        bench.say(f"    adds {statistics.median(shares):+.2%} to the step")
        bench.save()
