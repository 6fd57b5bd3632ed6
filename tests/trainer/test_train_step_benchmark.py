"""The benchmark of the training step, in miniature: it checks, times and writes, on one rank and on two."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks/train_step.py"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_main_step_is_timed_on_one_and_two_ranks_and_compared(tmp_path):
    command = [sys.executable, str(PROGRAM), "--tiny", "--repeats", "1", "--warm_ups", "1", "--unprofiled"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(tmp_path), "--ranks", "1", "2"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, ranks in (("train_step.csv", 1), ("train_step_x2.csv", 2)):
        rows = list(csv.DictReader((tmp_path / name).open()))
        (step,) = (row for row in rows if row["row"] == "Motif-2")
        assert float(step["seconds"]) > 0
        assert step["world_size"] == str(ranks)
        assert "off the eager step by" in step["note"]
        assert not [row for row in rows if row["note"].startswith("failed")]
    (scaling,) = (row for row in rows if row["row"] == "scaling")
    assert scaling["note"].endswith("% of 2 times one rank")
