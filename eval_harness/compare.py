"""`motif2-eval compare A B`: whether the second run is really better, row by row.

Only rows that both runs scored are compared, each with itself: much of a benchmark's spread is rows that are hard for
everyone, and it cancels. A group (MATH, MMLU) is compared over the rows of all its parts.
"""

import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from eval_harness.evaluate import RESULTS_FILE, file_name, leaf_tasks
from eval_harness.statistics import PairedDifference, paired_difference
from trainer.cli import parse_recipe

USAGE = """Compare two finished runs row by row: `motif2-eval compare runs/eval_a runs/eval_b`.

For each benchmark: the difference of the second run to the first with its paired bootstrap interval, how many rows
became right and wrong, and the p-value of the exact sign test on those.
"""


@dataclass
class CompareConfig:
    """One comparison."""

    first: str = field(default="", metadata={"help": "output folder of a run (the first word will do)"})
    second: str = field(default="", metadata={"help": "output folder of the run that may be better (the second word)"})
    parts: bool = field(default=False, metadata={"help": "also compare each part of a group, such as MMLU's subjects"})
    output: str | None = field(default=None, metadata={"help": "also write the comparison as JSON to this file"})

    def __post_init__(self):
        for name in ("first", "second"):
            if not getattr(self, name):
                raise ValueError(f"the {name} run is not given; write `motif2-eval compare FOLDER FOLDER`")


@dataclass(frozen=True)
class Scores:
    """What a finished run scored.

    Attributes:
        rows: (task or group, metric) -> row -> score, of the metrics that are a number a row. A row's name is made of
            its number and its content.
        prompts: task or group -> row -> digest of its prompt.
        tops: names of groups and tasks that are in no group.
    """

    rows: dict[tuple[str, str], dict[str, float]]
    prompts: dict[str, dict[str, str]]
    tops: set[str]


def compare(first: str | Path, second: str | Path, parts: bool = False) -> dict[tuple[str, str], PairedDifference]:
    """Paired differences of every task, group and metric that both runs hold.

    Args:
        first, second: output folders of finished runs.
        parts: also the parts of groups.

    Returns:
        dict: (task, metric) -> second minus first.

    Raises:
        FileNotFoundError: a folder holds no finished run.
        ValueError: the runs share no row.
    """
    left, right = read_scores(first), read_scores(second)
    found = {}
    for key in sorted(left.rows.keys() & right.rows.keys()):
        shared = sorted(left.rows[key].keys() & right.rows[key].keys())
        if shared and (parts or key[0] in left.tops):
            found[key] = paired_difference([left.rows[key][r] for r in shared], [right.rows[key][r] for r in shared])
    if not found:
        raise ValueError(
            f"{first} and {second} share no row with a score of its own (whole texts have none): they ran "
            f"{_tasks(left)} and {_tasks(right)}"
        )
    return found


def asked_differently(first: str | Path, second: str | Path) -> dict[str, int]:
    """Task or group -> rows that both runs scored and asked with another prompt."""
    left, right = read_scores(first).prompts, read_scores(second).prompts
    counts = {
        task: sum(left[task][row] != right[task][row] for row in left[task].keys() & right[task].keys())
        for task in left.keys() & right.keys()
    }
    return {task: count for task, count in sorted(counts.items()) if count}


def read_scores(folder: str | Path) -> Scores:
    """Scores of a finished run, row by row.

    Raises:
        FileNotFoundError: the folder holds none.
    """
    folder = Path(folder)
    if not (folder / RESULTS_FILE).exists():
        raise FileNotFoundError(
            f"{folder} holds no finished run: {RESULTS_FILE} is missing; run motif2-eval --output {folder}"
        )
    raw = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))["raw"]
    children = raw.get("group_subtasks", {})
    inside = {file_name(child) for group in children for child in children[group]}
    owners: dict[str, list[str]] = {}
    for group in children:
        for leaf in leaf_tasks(children, group):
            owners.setdefault(file_name(leaf), []).extend([file_name(group)] if leaf != group else [])
    scores: dict[tuple[str, str], dict[str, float]] = {}
    prompts: dict[str, dict[str, str]] = {}
    for path in sorted((folder / "samples").glob("*.jsonl")):
        for row in map(json.loads, path.open(encoding="utf-8")):
            row_name = f"{path.stem}/{row['doc_id']}:{row['doc_hash']}"
            for task in (path.stem, *owners.get(path.stem, ())):
                prompts.setdefault(task, {})[row_name] = row["prompt_hash"]
                for metric in row["metrics"]:
                    if isinstance(row[metric], float | int):
                        full = metric if row["filter"] in ("none", "answer") else f"{metric},{row['filter']}"
                        scores.setdefault((task, full), {})[row_name] = float(row[metric])
    return Scores(scores, prompts, set(prompts) - inside)


def as_markdown(found: dict[tuple[str, str], PairedDifference], differently: dict[str, int]) -> str:
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
    others = [f"{task} ({count} rows)" for task, count in differently.items() if any(task == key[0] for key in found)]
    if others:
        lines.append(f"\nAsked with different prompts, so that the protocol differs too: {', '.join(others)}.")
    return "\n".join(lines)


def _tasks(scores: Scores) -> str:
    return ", ".join(sorted(scores.tops)) or "nothing"


def main(argv: list[str]) -> None:
    """Print the comparison of two finished runs."""
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if len(folders) > 2:
        raise ValueError(f"{len(folders)} folders are given ({', '.join(folders)}); two are compared")
    named = [word for pair in zip(("--first", "--second"), folders, strict=False) for word in pair]
    (config,) = parse_recipe(CompareConfig, description=USAGE, argv=[*named, *argv[len(folders) :]])
    found = compare(config.first, config.second, config.parts)
    differently = asked_differently(config.first, config.second)
    print(as_markdown(found, differently))
    if config.output:
        lines = [
            {"task": task, "metric": metric, **asdict(paired), "other_prompts": differently.get(task, 0)}
            for (task, metric), paired in found.items()
        ]
        Path(config.output).write_text(json.dumps(lines, indent=1), encoding="utf-8")
