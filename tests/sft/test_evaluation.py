"""The table compares the same rows before and after, grows from stage to stage, and says what became worse."""

import json
from pathlib import Path

import pytest

from eval_harness.statistics import PairedDifference
from sft.evaluation import render_table, verdict
from sft.train import main
from trainer.data.arithmetic import generate_problems


def paired(low: float, high: float) -> PairedDifference:
    return PairedDifference((low + high) / 2, low, high, p_value=0.01, better=1, worse=1, rows=10)


@pytest.mark.parametrize(
    ("metric", "interval", "expected"),
    [
        ("exact_match", (0.1, 0.2), "better"),
        ("exact_match", (-0.2, -0.1), "worse"),
        ("exact_match", (-0.1, 0.1), "no difference shown"),
        ("bits_per_byte", (0.1, 0.2), "worse"),
        ("byte_perplexity", (-0.2, -0.1), "better"),
    ],
)
def test_verdict_follows_the_interval_and_the_metric(metric, interval, expected):
    assert verdict(metric, paired(*interval)) == expected


def test_a_worse_stage_is_said_plainly():
    row = {"task": "sums", "metric": "exact_match", "rows": 9, "before": 0.5, "after": 0.25, "difference": -0.25}
    row |= {"low": -0.4, "high": -0.1, "verdict": "worse"}
    text = render_table([row | {"stage": "stage1"}, row | {"stage": "stage2"}])
    assert text.endswith("\nstage2 made the model worse at sums (exact_match).\n")
    assert "| stage1 | sums | exact_match | 9 | 0.5000 | 0.2500 | -0.2500 | -0.4000 to -0.1000 | worse |" in text


def test_table_grows_over_two_stages(settings, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    problems = generate_problems(seed=5, count=4, split="heldout")
    lines = [json.dumps({"question": problem.question, "answer": problem.solution}) + "\n" for problem in problems]
    (data / "arithmetic.jsonl").write_text("".join(lines))
    evaluation = {"eval_tasks": ["motif2_arithmetic"], "eval_data_dir": str(data), "eval_limit": 2, "max_steps": 1}
    first = settings("stage1", **evaluation)
    second = settings("stage2", model_name_or_path=f"{first.output_dir}/model", **evaluation)
    for config in (first, second):
        config.save(tmp_path / "recipe.yaml")
        main(["--config", str(tmp_path / "recipe.yaml")])
    assert "| stage2 | motif2_arithmetic |" in capsys.readouterr().out
    rows = json.loads((Path(second.output_dir) / "evaluation" / "table.json").read_text())
    assert [row["stage"] for row in rows] == ["stage1"] * (len(rows) // 2) + ["stage2"] * (len(rows) // 2)
    assert all(row["rows"] == 2 for row in rows)
    assert not (Path(second.output_dir) / "evaluation" / "before").exists(), "taken over from the stage before"
