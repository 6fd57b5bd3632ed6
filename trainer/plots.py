"""Pictures of a training run, drawn from the `metrics.jsonl` that it writes."""

import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_SIZE_INCHES = (7.2, 3.6)
_DPI = 120
_PALETTE = ("#3b6fb6", "#d1792c", "#4a9a5b", "#8b5fb0", "#b0483f", "#5f6b76", "#c2a23a", "#3d9c9c")
_LAYER_COLORS = "viridis"
_MEAN_STEPS = 20


def read_metrics(path: str | Path) -> list[dict]:
    """Lines of a metrics file, one dict a step.

    Raises:
        ValueError: a line is not JSON; its number is named.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}, is not JSON ({error.msg}); was the file cut short?") from error
    return rows


def plot_run(metrics_path: str | Path, output_dir: str | Path) -> list[Path]:
    """Draw loss, mixture, learning rate, lambda and maximum logits over the tokens seen.

    Args:
        metrics_path: `metrics.jsonl` of a pre-training run.
        output_dir: where the PNG files go.

    Returns:
        list[Path]: the files written, in the order a reader wants them.

    Raises:
        ValueError: the file holds no training step.
    """
    rows = read_metrics(metrics_path)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "eval" in row]
    if not steps:
        raise ValueError(f"{metrics_path} holds no training step; did the run stop before its first one?")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _plot_loss(steps, evaluations, folder / "loss.png"),
        _plot_mixture(steps, folder / "mixture.png"),
        _plot_learning_rate(steps, folder / "learning_rate.png"),
        _plot_layers(steps, "lambdas", "λ", "lambda by layer", folder / "lambda.png"),
        _plot_layers(
            steps, "max_logits", "largest attention logit", "maximum logits by layer", folder / "max_logits.png"
        ),
    ]


def plot_stage_losses(losses: dict[str, list[tuple[int, float]]], path: str | Path) -> Path:
    """Draw the training loss of several stages one after the other.

    Args:
        losses: (optimizer step, loss) pairs by the stage's name.
        path: PNG file to write.
    """
    figure, axes = _axes("fine-tuning loss", "optimizer step, stages in a row", "loss (nats a token)")
    start = 0
    for color, (name, points) in zip(itertools.cycle(_PALETTE), losses.items(), strict=False):
        axes.plot([start + step for step, _ in points], [loss for _, loss in points], color=color, label=name)
        start += max((step for step, _ in points), default=0)
    axes.legend(frameon=False)
    return _save(figure, path)


def plot_scores(stages: list[str], scores: list[float], errors: list[float], ylabel: str, path: str | Path) -> Path:
    """Draw one bar a stage with its standard error."""
    figure, axes = _axes(ylabel + " after each stage", "", ylabel)
    axes.bar(range(len(stages)), scores, yerr=errors, capsize=4, color=_PALETTE[0], width=0.6)
    for position, score in enumerate(scores):
        axes.annotate(f"{score:.1%}", (position, score), xytext=(8, 4), textcoords="offset points", ha="left")
    axes.set_xticks(range(len(stages)), stages)
    highest = max((score + error for score, error in zip(scores, errors, strict=True)), default=1)
    axes.set_ylim(0, max(1.15 * highest, 0.05))
    return _save(figure, path)


def _plot_loss(steps: list[dict], evaluations: list[dict], path: Path) -> Path:
    figure, axes = _axes("loss", "tokens seen", "loss (nats a token)")
    tokens = [row["tokens"] for row in steps]
    axes.plot(tokens, [row["loss"] for row in steps], color="#c4c9cf", linewidth=1, label="training")
    for color, domain in zip(itertools.cycle(_PALETTE), _domains(evaluations, "eval"), strict=False):
        points = [(row["tokens"], row["eval"][domain]) for row in evaluations if domain in row["eval"]]
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=f"held-out {domain}")
    axes.legend(frameon=False)
    return _save(figure, path)


def _plot_mixture(steps: list[dict], path: Path) -> Path:
    figure, axes = _axes("mixture", "tokens seen", "share of tokens")
    tokens = [row["tokens"] for row in steps]
    domains = _domains(steps, "mixture")
    shares = [[row["mixture"].get(domain, 0.0) for row in steps] for domain in domains]
    axes.stackplot(tokens, shares, labels=[f"{domain}, scheduled" for domain in domains], colors=_PALETTE, alpha=0.75)
    boundary = [0.0] * len(steps)
    for position, domain in enumerate(domains[:-1]):
        realised = _running_mean([row["realised"].get(domain, 0.0) for row in steps])
        boundary = [low + share for low, share in zip(boundary, realised, strict=True)]
        label = f"realised, mean of {_MEAN_STEPS} steps" if position == 0 else None
        axes.plot(tokens, boundary, color="black", linewidth=1, linestyle="--", label=label)
    axes.set_ylim(0, 1)
    axes.margins(x=0)
    axes.legend(loc="lower left", framealpha=0.85)
    return _save(figure, path)


def _plot_learning_rate(steps: list[dict], path: Path) -> Path:
    figure, axes = _axes("learning rate", "tokens seen", "learning rate")
    axes.plot([row["tokens"] for row in steps], [row["learning_rate"] for row in steps], color=_PALETTE[0])
    axes.set_ylim(bottom=0)
    return _save(figure, path)


def _plot_layers(steps: list[dict], key: str, ylabel: str, title: str, path: Path) -> Path:
    figure, axes = _axes(title, "tokens seen", ylabel)
    rows = [row for row in steps if row.get(key) and (key != "max_logits" or row.get("max_logits_exact", True))]
    num_layers = len(rows[0][key]) if rows else 0
    colors = plt.get_cmap(_LAYER_COLORS)
    for layer in range(num_layers):
        color = colors(layer / max(num_layers - 1, 1))
        label = f"layer {layer}" if num_layers <= 8 or layer in (0, num_layers - 1) else None
        axes.plot([row["tokens"] for row in rows], [row[key][layer] for row in rows], color=color, label=label)
    if rows:
        axes.legend(frameon=False, ncols=2)
    return _save(figure, path)


def _running_mean(values: list[float]) -> list[float]:
    """Mean of each value and the `_MEAN_STEPS - 1` around it, fewer at the ends."""
    half = _MEAN_STEPS // 2
    windows = [values[max(0, index - half) : index + half] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _domains(rows: list[dict], key: str) -> list[str]:
    """Names in `rows[*][key]`, in order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row[key]))


def _axes(title: str, xlabel: str, ylabel: str):
    figure, axes = plt.subplots(figsize=_SIZE_INCHES, layout="constrained")
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure, path: str | Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return Path(path)
