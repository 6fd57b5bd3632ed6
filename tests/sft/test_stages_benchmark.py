"""The benchmark of the three stages: what counts as an answer in format, the table, and every part in miniature."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sft_stages import FINAL, Run, plot
from benchmarks.sft_stages_data import TINY

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4 + 3 = 7.\n#### 7", "7"),
        ("#### -12", "-12"),
        ("#### $1,200", "1,200"),
        ("#### 7 apples", None),
        ("#### 7\nand more", None),
        ("the answer is 7", None),
    ],
)
def test_the_last_line_gives_the_answer(text, number):
    found = FINAL.search(text)
    assert (found and found[1]) == number


def test_table_compares_each_part_with_the_one_before(tmp_path):
    run = Run(tmp_path, tmp_path, tmp_path / "results", TINY)
    run.tabulate("one", {"loss_math": [2.0, 3.0, 4.0], "arithmetic_accuracy": [0.0, 0.0, 1.0]})
    run.tabulate("two", {"loss_math": [1.0, 2.0, 3.0], "arithmetic_accuracy": [0.0, 0.0, 1.0]})
    run.tabulate("three", {"loss_math": [1.5, 2.5, 3.5], "arithmetic_accuracy": [1.0, 1.0, 1.0]})
    verdicts = [(row["after"], row["metric"], row.get("verdict")) for row in run.rows]
    assert verdicts == [
        ("one", "loss_math", None),
        ("one", "arithmetic_accuracy", None),
        ("two", "loss_math", "better"),
        ("two", "arithmetic_accuracy", "no difference shown"),
        ("three", "loss_math", "worse"),
        ("three", "arithmetic_accuracy", "no difference shown"),
    ]
    plot(run.rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_part_that_fails_keeps_what_came_before(tmp_path, monkeypatch):
    run = Run(tmp_path, tmp_path, tmp_path / "results", TINY)
    monkeypatch.setattr(run, "pretrain", lambda: tmp_path)
    monkeypatch.setattr(run, "measure", lambda after, model_dir: run.tabulate(after, {"loss_math": [1.0, 2.0]}))
    monkeypatch.setattr(run, "fine_tune", lambda stage, model_dir: 1 / 0 if stage == 2 else model_dir)
    assert run.everything() == 1
    rows = list(csv.DictReader((tmp_path / "results" / "sft_stages.csv").open()))
    assert [row["after"] for row in rows] == ["pre-training", "stage 1"]
    assert json.loads((tmp_path / "results" / "sft_stages.json").read_text())["failures"] == ["stage 2"]
    assert "ZeroDivisionError" in (tmp_path / "results" / "sft_stages.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_in_miniature(shared_data, tmp_path):
    command = [sys.executable, "benchmarks/sft_stages.py", "--tiny", "--data_dir", str(tmp_path / "data")]
    env = os.environ | {"OUT": str(tmp_path / "out")}
    for words in (["--prepare", str(shared_data)], ["--work_dir", str(tmp_path / "work")]):
        done = subprocess.run([*command, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1700)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = list(csv.DictReader((tmp_path / "out" / "sft_stages.csv").open()))
    assert list(dict.fromkeys(row["after"] for row in rows)) == ["pre-training", "stage 1", "stage 2", "stage 3"]
    losses = [float(row["value"]) for row in rows if row["metric"] == "loss_general"]
    assert losses[-1] < losses[0]
