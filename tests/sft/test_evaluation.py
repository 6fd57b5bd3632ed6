"""The table compares the same rows before and after, grows from stage to stage, and says what became worse."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval_harness.statistics import PairedDifference
from sft import evaluation, publish, train
from sft.evaluation import render_table, verdict
from sft.stage import describe_stage, run_stage
from sft.train import main
from tests.distributed import run_distributed
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


@pytest.fixture
def arithmetic(tmp_path) -> dict:
    """Settings of a stage of one update with an evaluation on two of four held-out problems."""
    (tmp_path / "data").mkdir()
    problems = generate_problems(seed=5, count=4, split="heldout")
    lines = [json.dumps({"question": problem.question, "answer": problem.solution}) + "\n" for problem in problems]
    (tmp_path / "data" / "arithmetic.jsonl").write_text("".join(lines))
    rows = {"eval_tasks": ["motif2_arithmetic"], "eval_data_dir": str(tmp_path / "data")}
    return rows | {"eval_limit": 2, "max_steps": 1}


@pytest.mark.slow
def test_table_grows_over_two_stages(settings, arithmetic, tmp_path, capsys):
    first = settings("stage1", **arithmetic)
    second = settings("stage2", model_name_or_path=f"{first.output_dir}/model", **arithmetic)
    for config in (first, second):
        config.save(tmp_path / "recipe.yaml")
        main(["--config", str(tmp_path / "recipe.yaml")])
    assert "| stage2 | motif2_arithmetic |" in capsys.readouterr().out
    rows = json.loads((Path(second.output_dir) / "evaluation" / "table.json").read_text())
    assert [row["stage"] for row in rows] == ["stage1"] * (len(rows) // 2) + ["stage2"] * (len(rows) // 2)
    assert all(row["rows"] == 2 for row in rows)
    (key,) = (path for path in (Path(second.output_dir) / "evaluation").iterdir() if path.is_dir())
    assert (key / "after").is_dir()
    assert not (key / "before").exists(), "taken over from the stage before"


@pytest.fixture
def evaluated(monkeypatch) -> list[Path]:
    """The folders that an evaluation wrote to, oldest first; no model is asked, and its tasks are all worse."""
    folders = []

    def write(config, name, folder):
        folders.append(folder)
        folder.mkdir(parents=True)
        metrics = {task: {} for task in config.eval_tasks}
        (folder / evaluation.RESULTS_FILE).write_text(json.dumps({"metrics": metrics}))

    def compare(before, after):
        tasks = json.loads((after / evaluation.RESULTS_FILE).read_text())["metrics"]
        return {(task, "exact_match"): paired(-0.2, -0.1) for task in tasks}

    monkeypatch.setattr(evaluation, "_evaluate", write)
    monkeypatch.setattr(evaluation, "compare", compare)
    return folders


def scores_of(config, side: str) -> Path:
    """Where the scores of one side of a stage lie."""
    key = evaluation._digest([evaluation.check_evaluation(config)])
    return Path(config.output_dir, "evaluation", key, side)


@pytest.mark.parametrize("change", [{}, {"eval_limit": 3}, {"dtype": "bfloat16"}, {"rows": "other"}])
def test_scores_of_the_stage_before_are_taken_over_only_if_they_are_of_the_same(
    settings, arithmetic, evaluated, tmp_path, change
):
    first = settings("stage1", **arithmetic)
    evaluation.evaluate_stage(first)
    if change.pop("rows", None):
        with (tmp_path / "data" / "arithmetic.jsonl").open("a") as file:
            file.write('{"question": "1 + 1?", "answer": "#### 2"}\n')
        change = {"eval_limit": 2}
    same = not change
    second = settings("stage2", **(arithmetic | change | {"model_name_or_path": f"{first.output_dir}/model"}))
    evaluation.evaluate_stage(second)
    before = [] if same else [scores_of(second, "before")]
    assert evaluated[2:] == [*before, scores_of(second, "after")]


def test_an_interrupted_evaluation_goes_on_with_the_side_that_is_missing(settings, arithmetic, evaluated):
    config = settings(**arithmetic)
    evaluation.evaluate_stage(config)
    before, after = scores_of(config, "before"), scores_of(config, "after")
    shutil.rmtree(after)
    evaluation.evaluate_stage(config)
    assert evaluated == [before, after, after]


def test_other_tasks_are_added_to_the_table_and_another_limit_replaces_the_row(settings, arithmetic, evaluated):
    def rows(config):
        evaluation.evaluate_stage(config)
        table = json.loads(Path(config.output_dir, "evaluation", "table.json").read_text())
        return [(row["stage"], row["task"]) for row in table]

    first = settings("stage1", **arithmetic)
    sums, other = ("stage1", "motif2_arithmetic"), ("stage1", "motif2_heldout_math")
    assert rows(first) == [sums]
    assert rows(replace(first, eval_limit=1)) == [sums]
    Path(arithmetic["eval_data_dir"], "heldout_math.jsonl").write_text('{"text": "x"}\n')
    assert rows(replace(first, eval_tasks=[other[1]])) == [sums, other]
    second = settings("stage2", **(arithmetic | {"model_name_or_path": f"{first.output_dir}/model"}))
    assert rows(second) == [sums, other, ("stage2", "motif2_arithmetic")]
    assert len(evaluated) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eval_tasks": ["motif2_arithmetik"]}, "unknown task 'motif2_arithmetik'; did you mean 'motif2_arithmetic'"),
        ({"eval_data_dir": "absent"}, "arithmetic.jsonl does not exist; check data_dir"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(settings, arithmetic, change, message):
    config = settings(**(arithmetic | change))
    with pytest.raises(ValueError, match=message):
        run_stage(config)
    assert not list(Path(config.output_dir).iterdir())
    with pytest.raises(ValueError, match=message):
        describe_stage(config)


def test_a_finished_stage_is_evaluated_later(settings, arithmetic, evaluated, capsys):
    config = settings(max_steps=1)
    run_stage(config)
    with Path(config.output_dir, "config.yaml").open("a") as file:
        file.write("setting_of_an_earlier_version: 1\n")
    words = ["--run_dir", config.output_dir, "--evaluate"]
    with pytest.raises(SystemExit, match="eval_tasks is empty; name the tasks"):
        publish.main(words)
    publish.main([*words, "--eval_tasks", "motif2_arithmetic", "--eval_data_dir", arithmetic["eval_data_dir"]])
    assert [folder.name for folder in evaluated] == ["before", "after"]
    assert Path(config.output_dir, "evaluation", "table.md").is_file()
    assert capsys.readouterr().out.rstrip().endswith("README.md")
    with pytest.raises(SystemExit):
        publish.main(["--run_dir", config.output_dir, "--eval_limit", "3"])
    assert "are for evaluate; set that too" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_ranks_train_and_one_evaluates(settings, arithmetic, tmp_path):
    """lm-eval shares the rows with the other processes where it sees several accelerators: they must not be asked."""
    config = settings(gradient_accumulation_steps=1, **(arithmetic | {"eval_limit": 1}))
    config.save(tmp_path / "recipe.yaml")

    def rank_main(rank):
        finish = train.finish

        def finish_with_accelerators(config):
            torch.cuda.device_count = lambda: 2  # what lm-eval asks
            finish(config)

        train.finish = finish_with_accelerators
        main(["--config", str(tmp_path / "recipe.yaml")])
        return True

    assert run_distributed(rank_main, 2) == [True, True]
    (row,) = json.loads((Path(config.output_dir) / "evaluation" / "table.json").read_text())
    assert (row["task"], row["rows"]) == ("motif2_arithmetic", 1)
    assert "motif2_arithmetic" in (Path(config.output_dir) / "model" / "README.md").read_text()
