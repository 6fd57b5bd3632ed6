"""The report's tables as data: what each row runs, and what was published for it."""

import csv
from dataclasses import dataclass
from pathlib import Path

import yaml

from eval_harness.loading import nearest

SUITES_DIR = Path(__file__).with_name("suites")
REPORT_MODEL = "Motif-2-12.7B"


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: how the row is chosen on the command line.
        label: the benchmark's name.
        shots: worked examples in the prompt.
        prompting: how the model is asked.
        task: ours or lm-eval's; empty where the row cannot be run.
        metric: which of the task's metrics the table shows.
        generation: what the row changes in the task's generation settings.
        why_not: why the row cannot be run.
        assumption: a choice that the report leaves open.
        published: model -> score in percent.
        sources: model -> where that was published.
    """

    name: str
    label: str
    shots: int
    prompting: str
    task: str
    metric: str
    generation: dict
    why_not: str
    assumption: str
    published: dict[str, float]
    sources: dict[str, str]


@dataclass(frozen=True)
class Suite:
    """One table: its rows and how its models are asked."""

    name: str
    title: str
    chat: bool
    decoding: str
    generation: dict
    rows: tuple[Row, ...]

    def choose(self, names: list[str]) -> list[Row]:
        """Rows by name, or by the benchmark's name (`gsm8k` means each of its rows); all that can be run by default.

        Raises:
            ValueError: an unknown name (the nearest is named), or a row that cannot be run (with the reason).
        """
        if not names:
            return [row for row in self.rows if row.task]
        chosen: list[Row] = []
        for name in names:
            rows = [row for row in self.rows if name in (row.name, row.label.lower().replace(" ", "_"))]
            known = sorted({row.name for row in self.rows} | {row.label.lower() for row in self.rows})
            if not rows:
                raise ValueError(f"suite {self.name!r} has no row {name!r}{nearest(name, known)}")
            if not any(row.task for row in rows):
                raise ValueError(f"row {name!r} of suite {self.name!r} cannot be run: {rows[0].why_not}")
            chosen += [row for row in rows if row not in chosen]
        return chosen


def suite_names() -> list[str]:
    """Names of the suites."""
    return sorted(path.stem for path in SUITES_DIR.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """Read a suite and the figures published for it.

    Raises:
        ValueError: an unknown suite; the nearest is named.
    """
    if name not in suite_names():
        raise ValueError(
            f"unknown suite {name!r}; the suites are {', '.join(suite_names())}{nearest(name, suite_names())}"
        )
    content = yaml.safe_load((SUITES_DIR / f"{name}.yaml").read_text(encoding="utf-8"))
    published, sources = _published(name)
    rows = tuple(
        Row(
            name=row["name"],
            label=row["label"],
            shots=row["shots"],
            prompting=row["prompting"],
            task=row.get("task", ""),
            metric=row.get("metric", ""),
            generation=row.get("generation", {}),
            why_not=row.get("why_not", ""),
            assumption=row.get("assumption", ""),
            published=published.get(row["name"], {}),
            sources=sources.get(row["name"], {}),
        )
        for row in content["rows"]
    )
    return Suite(name, content["title"], content["chat"], content["decoding"], content["generation"], rows)


def _published(suite: str) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, str]]]:
    scores: dict[str, dict[str, float]] = {}
    sources: dict[str, dict[str, str]] = {}
    with (SUITES_DIR / "published.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["suite"] == suite:
                scores.setdefault(line["row"], {})[line["model"]] = float(line["score"])
                sources.setdefault(line["row"], {})[line["model"]] = line["source"]
    return scores, sources
