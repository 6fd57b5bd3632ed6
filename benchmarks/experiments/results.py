"""What finished runs leave: `runs.csv`, a line a run, and `curves.csv`, a line a value."""

import csv
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.experiments.recipe import CUT, Run

RUNS, CURVES = "runs.csv", "curves.csv"
FIRST = ("key", "arm", "learning_rate", "seed", "status", "parameters", "flops_per_token", "tokens", "seconds")
CURVE_FIELDS = ("key", "tokens", "measure", "value")


def all_results(folder: Path) -> list["Results"]:
    """The results of every recipe in `folder`."""
    return [Results(path.parent) for path in sorted(folder.glob(f"*/{RUNS}"))]


class Results:
    """The finished runs of one recipe, on disk after every run.

    Args:
        folder: of the two files; runs that they hold are not made again, unless they were cut.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.records: dict[str, dict] = {}
        self.curves: dict[str, list[tuple[int, str, float]]] = {}
        if (folder / RUNS).is_file():
            self.records = {row["key"]: {k: v for k, v in row.items() if v != ""} for row in _read(folder / RUNS)}
            for row in _read(folder / CURVES):
                point = (int(row["tokens"]), row["measure"], float(row["value"]))
                self.curves.setdefault(row["key"], []).append(point)

    @property
    def finished(self) -> dict[str, dict]:
        """The records of all runs that were not cut, by key."""
        return {key: record for key, record in self.records.items() if record["status"] != CUT}

    def take(self, other: "Results") -> int:
        """Keep another machine's runs too; returns how many were new. A run that is finished here stays."""
        new = [key for key in other.records if key not in self.finished]
        for key in new:
            self.records[key], self.curves[key] = other.records[key], other.curves.get(key, [])
        self.save()
        return len(new)

    def adopt(self, runs_of: Callable[[dict], list[Run]], others: Iterable["Results"]) -> None:
        """Keep runs that others have finished, also of another recipe with the same settings.

        Args:
            runs_of: all runs that are known by the records of the finished ones; those found may make more known.
            others: where to look.
        """
        found = True
        while found:
            found = {}
            for run in runs_of(self.finished):
                for other in others if run.key not in self.finished else ():
                    if run.key in other.finished:
                        found[run.key] = other.finished[run.key] | {"arm": run.arm, "curve": other.curves[run.key]}
            for record in found.values():
                self.add(record)

    def add(self, record: dict) -> None:
        """Keep a run; what an earlier, cut one left makes way."""
        record = dict(record)
        self.curves[record["key"]] = record.pop("curve")
        self.records[record["key"]] = record
        self.save()

    def save(self) -> None:
        """Write both files, each complete or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        columns = [*FIRST, *sorted({name for row in self.records.values() for name in row} - set(FIRST))]
        rows = [{name: _short(value) for name, value in row.items()} for row in self.records.values()]
        _write(self.folder / RUNS, columns, rows)
        points = [
            dict(zip(CURVE_FIELDS, (key, *point), strict=True))
            for key, points in self.curves.items()
            for point in points
        ]
        _write(self.folder / CURVES, CURVE_FIELDS, points)


def _short(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def _read(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _write(path: Path, columns, rows: list[dict]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
