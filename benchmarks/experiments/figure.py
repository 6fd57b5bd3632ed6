"""A recipe's figure: what its arms' measures were over tokens or compute."""

import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.experiments.recipe import Recipe
from benchmarks.experiments.results import Results

TITLES = {"heldout": "loss,", "recall_accuracy": "recall,", "forgotten": "forgotten,", "best": "best head,"}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart without red and green too
# Ends of an entry of a recipe's plot: the axis is FLOPs in place of tokens; the curves are differences from the first
# arm's, paired by seed.
OVER_COMPUTE, DIFFERENCE = " over compute", " difference"


def draw(recipe: Recipe, results: Results, chosen: Mapping[str, dict[int, dict]], picture: Path) -> None:
    """The recipe's curves: the mean over seeds, and the range of the seeds around it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {measure for key in results.records for _, measure, _ in results.curves[key]}
    shown = [entry for entry in recipe.plot if measure_of(entry) in measured]
    columns = 2 if len(shown) > 3 else max(1, len(shown))  # four in a row would be too small to read
    rows = max(1, math.ceil(len(shown) / columns))
    size = (4.6 * columns, 3.4 * rows)
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    for axes, entry in zip(panels.flat, shown, strict=False):
        measure, compute, difference = measure_of(entry), entry.endswith(OVER_COMPUTE), entry.endswith(DIFFERENCE)
        for color, arm in zip(COLORS, recipe.arms, strict=False):
            curves = arm_curves(recipe, results, chosen, arm, measure, difference)
            tokens = sorted(set.intersection(*map(set, curves))) if curves else []
            tokens = [count for count in tokens if count] or tokens  # untrained models would press the rest together
            if not tokens:
                continue
            values = [[curve[count] for curve in curves] for count in tokens]
            record = next(iter(chosen[arm].values()))
            spent = [flops_spent(record, count) / 1e12 if compute else count / 1e6 for count in tokens]
            axes.plot(spent, [statistics.mean(v) for v in values], color=color, label=recipe.arms[arm].label)
            axes.fill_between(spent, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2)
        if measure == "max_logit":
            axes.set_yscale("log")
        minus = f", minus {recipe.arms[next(iter(recipe.arms))].label}" if difference else ""
        axes.set_title(title(measure) + minus, fontsize=10)
        axes.set_xlabel("TFLOPs, the small model's included" if compute else "millions of tokens")
        axes.set_ylabel("nats a token" if measure.startswith("heldout") else "")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e8eb")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(picture, dpi=100)
    plt.close(figure)


def measure_of(entry: str) -> str:
    """The measure that an entry of a recipe's plot shows."""
    return entry.removesuffix(OVER_COMPUTE).removesuffix(DIFFERENCE)


def arm_curves(
    recipe: Recipe, results: Results, chosen: Mapping[str, dict], arm: str, measure: str, difference: bool
) -> list[dict[int, float]]:
    """An arm's curves, one a seed: a measure by tokens, or its difference from the first arm's run of that seed."""
    curves = {seed: dict(curve_of(results, record, measure)) for seed, record in chosen[arm].items()}
    if difference:
        first = chosen[next(iter(recipe.arms))]
        others = {seed: dict(curve_of(results, record, measure)) for seed, record in first.items()}
        curves = {
            seed: {tokens: value - others[seed][tokens] for tokens, value in curve.items() if tokens in others[seed]}
            for seed, curve in curves.items()
            if seed in others
        }
    return [curve for curve in curves.values() if curve]


def curve_of(results: Results, record: dict, measure: str) -> list[tuple[int, float]]:
    return [(tokens, value) for tokens, name, value in results.curves.get(record["key"], []) if name == measure]


def flops_spent(record: dict, tokens: float) -> float:
    """Training FLOPs of a run up to so many tokens of its own, with those of the small model that it grew from."""
    return float(record.get("source_flops") or 0) + float(record["flops_per_token"]) * tokens


def title(measure: str) -> str:
    """A measure in a table."""
    for start, words in TITLES.items():
        if measure == start or measure.startswith(f"{start}_"):
            rest = measure.removeprefix(start).strip("_").replace("_", "-" if start == "recall_accuracy" else " ")
            return f"{words} {rest or 'all'}" + (" pairs" if start == "recall_accuracy" and rest else "")
    return measure.replace("_", " ")
