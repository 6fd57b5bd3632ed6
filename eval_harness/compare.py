"""`motif2-eval compare A B`: whether the second run is really better, row by row.

Only rows that both runs scored are compared, each with itself: much of a benchmark's spread is rows that are hard for
everyone, and it cancels.
"""

import argparse
import json
from pathlib import Path

from eval_harness.evaluate import RESULTS_FILE
from eval_harness.statistics import PairedDifference, paired_difference


def compare(first: str | Path, second: str | Path) -> dict[tuple[str, str], PairedDifference]:
    """Paired differences of every task and metric that both runs hold.

    Args:
        first, second: output folders of finished runs.

    Returns:
        dict: (task, metric) -> second minus first.

    Raises:
        FileNotFoundError: a folder holds no finished run.
        ValueError: the runs share no row.
    """
    left, right = read_scores(first), read_scores(second)
    found = {}
    for key in left.keys() & right.keys():
        shared = sorted(left[key].keys() & right[key].keys())
        if shared:
            found[key] = paired_difference([left[key][r] for r in shared], [right[key][r] for r in shared])
    if not found:
        raise ValueError(f"{first} and {second} share no row: they ran {_tasks(left)} and {_tasks(right)}")
    return dict(sorted(found.items()))


def read_scores(folder: str | Path) -> dict[tuple[str, str], dict[str, float]]:
    """(task, metric) -> row -> score, of the metrics that are a number a row. A row is its number and its content."""
    folder = Path(folder)
    if not (folder / RESULTS_FILE).exists():
        raise FileNotFoundError(
            f"{folder} holds no finished run: {RESULTS_FILE} is missing; run motif2-eval --output {folder}"
        )
    scores: dict[tuple[str, str], dict[str, float]] = {}
    for path in sorted((folder / "samples").glob("*.jsonl")):
        for row in map(json.loads, path.open(encoding="utf-8")):
            for metric in row["metrics"]:
                if isinstance(row[metric], float | int):
                    name = metric if row["filter"] in ("none", "answer") else f"{metric},{row['filter']}"
                    scores.setdefault((path.stem, name), {})[f"{row['doc_id']}:{row['doc_hash']}"] = float(row[metric])
    return scores


def as_markdown(found: dict[tuple[str, str], PairedDifference]) -> str:
    """The comparison as a table; scores in percent."""
    lines = [
        "| task | metric | rows | difference | 95% interval | better | worse | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, metric), paired in found.items():
        interval = f"{100 * paired.low:+.2f} to {100 * paired.high:+.2f}"
        lines.append(
            f"| {task} | {metric} | {paired.rows} | {100 * paired.difference:+.2f} | {interval} | {paired.better} "
            f"| {paired.worse} | {paired.p_value:.3g} |"
        )
    return "\n".join(lines)


def _tasks(scores: dict) -> str:
    return ", ".join(sorted({task for task, _ in scores})) or "nothing"


def main(argv: list[str]) -> None:
    """Print the comparison of two finished runs."""
    parser = argparse.ArgumentParser(prog="motif2-eval compare", description=__doc__.split("\n", 1)[0])
    parser.add_argument("first", help="output folder of a run")
    parser.add_argument("second", help="output folder of the run that may be better")
    options = parser.parse_args(argv)
    print(as_markdown(compare(options.first, options.second)))
