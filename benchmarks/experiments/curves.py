"""From the metrics of a run to its curves and last values; without torch, for the process that hands out runs."""

import json
import statistics
from pathlib import Path

from benchmarks.experiments.recipe import RECALL

CURVE_POINTS = 40  # of the measures that every step has


def read_steps(path: Path) -> list[dict]:
    """The lines of a run's metrics; the last line of a run that was stopped may be cut, and is left out."""
    steps = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            steps.append(json.loads(line))
        except ValueError:
            break
    return steps


def summarise(steps: list[dict]) -> dict:
    """Final and extreme values of a run's metrics."""
    evaluations = [row for row in steps if "eval" in row]
    training = [row for row in steps if "loss" in row]
    found = {"tokens": training[-1]["tokens"] if training else 0, "steps": len(training)}
    if training:
        found["tokens_per_second"] = round(statistics.median(row["tokens_per_second"] for row in training))
        found["clipped_heads"] = sum(row["clipped_heads"] for row in training)
        found["clipped_steps"] = sum(row["clipped_heads"] > 0 for row in training)
        logits = [max_logit for row in training if (max_logit := _exact_logit(row)) is not None]
        if logits:
            found |= {"max_logit": max(logits), "last_max_logit": logits[-1]}
    if len(evaluations) > 1:
        losses = evaluations[-1]["eval"]
        text = [name for name in losses if name != RECALL] or list(losses)
        found["heldout_mean"] = statistics.mean(losses[name] for name in text)
        found["start_mean"] = statistics.mean(evaluations[0]["eval"][name] for name in text)
        for name, loss in losses.items():
            found[f"heldout_{name}"] = loss
            found[f"forgotten_{name}"] = loss - min(row["eval"][name] for row in evaluations)
    return found


def curve(steps: list[dict]) -> list[tuple[int, str, float]]:
    """Held-out losses of every evaluation; training loss and exact maximum logits, thinned."""
    points = []
    training = [row for row in steps if "loss" in row]
    exact = [row for row in training if _exact_logit(row) is not None]
    for row in training[:: -(-len(training) // CURVE_POINTS) or 1]:
        points.append((row["tokens"], "train_loss", row["loss"]))
    for row in exact[:: -(-len(exact) // CURVE_POINTS) or 1]:
        points.append((row["tokens"], "max_logit", _exact_logit(row)))
    for row in steps:
        if "eval" in row:
            text = [loss for name, loss in row["eval"].items() if name != RECALL] or list(row["eval"].values())
            points += [(row["tokens"], f"heldout_{name}", loss) for name, loss in row["eval"].items()]
            points.append((row["tokens"], "heldout_mean", statistics.mean(text)))
    return [(tokens, measure, float(f"{value:.5g}")) for tokens, measure, value in points if value is not None]


def _exact_logit(row: dict) -> float | None:
    """Largest attention logit of a step that took them exactly, else None."""
    logits = [logit for logit in row.get("max_logits") or [] if logit is not None]
    return max(logits) if logits and row.get("max_logits_exact") else None
