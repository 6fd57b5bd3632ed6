"""A benchmark's file of results: a partial run replaces what it measured again, and nothing else."""

import csv

import torch

from benchmarks.attention_cases import Report


def new_report(path, commit: str, device: str = "this") -> Report:
    report = Report(path, torch.device("cpu"))
    report.common |= {"commit": commit, "device": device}
    return report


def values(path) -> list[int]:
    with path.open(newline="") as file:
        return sorted(int(row["value"]) for row in csv.DictReader(file))


def test_a_partial_run_keeps_the_other_rows_of_its_sections(tmp_path):
    path = tmp_path / "results.csv"
    new_report(path, "first", "another").add("models", "llama", "B1", "step", 1, "ms")
    first = new_report(path, "first")
    first.add("copy", "bandwidth", "", "", 2, "TB/s")
    places = [
        ("models", "llama", "B1", "step"),
        ("models", "llama", "B64", "step"),
        ("models", "llama", "B1", "prefill"),
    ]
    places += [("models", "motif2", "B1", "step"), ("kernel", "llama", "B1", "step")]
    for value, place in enumerate(places, start=3):
        first.add(*place, value, "ms")
    assert values(path) == [1, 2, 3, 4, 5, 6, 7]

    second = new_report(path, "second")
    second.add("copy", "bandwidth", "", "", 20, "TB/s")  # the first one stays: its rows' shares are of it
    second.add("models", "llama", "B1", "step", 30, "ms")
    second.add("models", "llama", "B1", "step", 31, "ms")  # one run may measure twice
    assert values(path) == [1, 2, 4, 5, 6, 7, 20, 30, 31]

    new_report(path, "second").add("copy", "bandwidth", "", "", 21, "TB/s")
    assert values(path) == [1, 2, 4, 5, 6, 7, 21, 30, 31]
