"""The demo in miniature: every part runs, and what it writes is what it promises."""

import contextlib
import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.demo.report import text_table
from recipes.demo.run import Demo, DemoConfig, main

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["data", "untrained", "pre-training", "stage 1", "stage 2", "stage 3", "use"]
DOMAINS = {"general", "code", "math"}


def run_demo(folder: Path) -> str:
    """What a demo prints that is started as `make demo` starts it."""
    command = [sys.executable, "-m", "recipes.demo.run", "--miniature", "--output_dir", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """Folder of a finished demo and what it printed. It runs in this process, which has imported everything."""
    folder = tmp_path_factory.mktemp("demo")
    output, level = io.StringIO(), logging.getLogger("transformers").level
    with contextlib.redirect_stdout(output):
        main(["--miniature", "--output_dir", str(folder)])
    logging.getLogger("transformers").setLevel(level)
    return folder, output.getvalue()


@pytest.mark.timeout(600)
def test_every_part_runs_and_is_measured(demo):
    folder, output = demo
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == PARTS
    assert 0.9e6 < results["untrained"]["parameters"] < 10e6
    for part in PARTS[1:-1]:
        assert set(results[part]["heldout"]) == DOMAINS
        assert 0 <= results[part]["arithmetic"] <= 1
        assert f"\n{part} " in output
    losses = results["pre-training"]
    assert all(losses["last_eval"][name] < losses["first_eval"][name] for name in DOMAINS)
    assert results["pre-training"]["tokens"] == 6144


@pytest.mark.timeout(600)
def test_pre_training_that_was_interrupted_while_it_was_scored_goes_on(demo, monkeypatch):
    folder, _ = demo
    before = json.loads((folder / "results.json").read_text())["pre-training"]
    monkeypatch.setattr(
        Demo, "_score_folder", lambda self, model_dir, chat: {"model": (model_dir / "config.json").is_file()}
    )
    again = Demo(DemoConfig(output_dir=str(folder), miniature=True)).pretrain()
    assert again.pop("model")
    assert again == {name: before[name] for name in again}


@pytest.mark.timeout(600)
def test_exported_model_answers_without_this_project(demo):
    folder, _ = demo
    answers = json.loads((folder / "results.json").read_text())["use"]["answers"]
    assert len(answers) == 2
    assert all(answer["class"].startswith("transformers_modules.") for answer in answers)


@pytest.mark.timeout(600)
def test_report_stands_on_its_own(demo):
    folder, _ = demo
    page = (folder / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:image/png;base64,)', page)
    assert page.count("<img") == len(list((folder / "pictures").glob("*.png"))) == 7
    for name in ("Mixture over time", "Lambda by layer", "Maximum attention logits", "Learning rate"):
        assert name in page


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_command_does_the_same_and_a_second_start_repeats_nothing(demo, tmp_path):
    folder, _ = demo
    assert all(f"\n{part} " in run_demo(tmp_path) for part in PARTS[1:-1])
    first, second = (json.loads((each / "results.json").read_text()) for each in (folder, tmp_path))
    assert all(first[part]["heldout"] == second[part]["heldout"] for part in PARTS[1:-1])
    before = (folder / "results.json").read_text()
    assert run_demo(folder).count("done before") == len(PARTS)
    assert (folder / "results.json").read_text() == before


@pytest.mark.timeout(600)
def test_other_settings_and_other_folders_are_refused(demo, tmp_path):
    folder, _ = demo
    with pytest.raises(SystemExit, match="other settings"):
        main(["--output_dir", str(folder)])
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="no demo"):
        main(["--output_dir", str(tmp_path), "--overwrite"])
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_bad_settings_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--num_problem", "3"])
    assert "did you mean 'num_problems'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="train_bytes is 0"):
        DemoConfig(train_bytes=0)


def test_text_table_is_aligned():
    lines = text_table([["a", "bb"], ["ccc", "d"]]).splitlines()
    assert lines == ["a    bb", "---  --", "ccc   d"]
