"""The report's tables are complete, sourced, and each row runs or says why not."""

import csv

import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from eval_harness.loading import TASKS_DIR
from eval_harness.suites import REPORT_MODEL, SUITES_DIR, load_suite, suite_names

HEADLINES = {
    ("base", "gsm8k_8shot"): 94.92,
    ("base", "math"): 73.62,
    ("base", "humaneval"): 65.9,
    ("base", "mbpp"): 81.5,
    ("base", "mmlu"): 78.1,
    ("instruct", "gsm8k"): 96.13,
    ("instruct", "humaneval"): 93.2,
}


@pytest.mark.parametrize("name", suite_names())
def test_every_row_runs_or_says_why_not_and_has_the_report_s_figure(name):
    suite = load_suite(name)
    assert len({row.name for row in suite.rows}) == len(suite.rows) >= 16
    for row in suite.rows:
        assert bool(row.task) != bool(row.why_not), row.name
        assert bool(row.task) == bool(row.metric), row.name
        assert 0 < row.published[REPORT_MODEL] <= 100
        assert all("arXiv" in source for source in row.sources.values())


def test_headline_figures():
    for (suite, name), score in HEADLINES.items():
        (row,) = [row for row in load_suite(suite).rows if row.name == name]
        assert row.published[REPORT_MODEL] == score


def test_no_figure_is_left_without_a_row():
    with (SUITES_DIR / "published.csv").open() as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        assert line["row"] in {row.name for row in load_suite(line["suite"]).rows}
    assert len({(line["suite"], line["row"], line["model"]) for line in lines}) == len(lines)


def test_our_tasks_of_the_suites_exist():
    ours = TaskManager(include_path=str(TASKS_DIR), include_defaults=False).all_tasks
    rows = [row for name in suite_names() for row in load_suite(name).rows]
    assert {row.task for row in rows if row.task.startswith("motif2_")} <= set(ours)


def settings_of(manager: TaskManager, name: str) -> tuple[dict, dict]:
    """Settings of a task or group as lm-eval states them, and those of its first task (its own for a task)."""
    entry = manager.task_index[name]
    if entry.yaml_path is None:  # a tag: tasks that name it
        tagged = next(other for other in manager.task_index.values() if name in other.tags and other.yaml_path)
        return {}, settings_of(manager, tagged.name)[1]
    settings = load_yaml(entry.yaml_path, resolve_func=False)
    part = settings["task"]
    while isinstance(part, list):
        part = part[0]["task"] if isinstance(part[0], dict) else part[0]
    return settings, settings if part == name else settings_of(manager, part)[1]


@pytest.mark.slow
def test_lm_eval_has_the_other_tasks_with_these_metrics_and_decoding():
    manager = TaskManager()
    rows = [(name, row) for name in suite_names() for row in load_suite(name).rows]
    rows = [(name, row) for name, row in rows if row.task and not row.task.startswith("motif2_")]
    assert len(rows) > 15
    for suite, row in rows:
        settings, task = settings_of(manager, row.task)
        metric, _, chosen = row.metric.partition(",")
        assert metric in [entry["metric"] for entry in task["metric_list"]], row.name
        if chosen:
            assert chosen in [entry["name"] for entry in task["filter_list"]], row.name
        if "aggregate_metric_list" in settings:
            assert (metric, chosen) in [
                (entry["metric"], entry["filter_list"]) for entry in settings["aggregate_metric_list"]
            ], row.name
        generation = {**task.get("generation_kwargs", {}), **load_suite(suite).generation, **row.generation}
        if suite == "base" and task["output_type"] == "generate_until":
            assert not generation.get("do_sample"), row.name
            assert generation.get("max_gen_toks", 256) >= (1024 if row.prompting == "chain of thought" else 1), (
                row.name
            )
        if suite == "instruct":
            assert (generation["temperature"], generation["max_gen_toks"]) == (0.6, 32768), row.name


def test_our_tasks_decode_and_prompt_as_their_rows_say():
    for name in suite_names():
        suite = load_suite(name)
        for row in suite.rows:
            if not row.task.startswith("motif2_"):
                continue
            (path,) = [path for path in TASKS_DIR.glob("*.yaml") if f": {row.task}\n" in path.read_text()]
            settings = load_yaml(path, resolve_func=False)
            assert settings["num_fewshot"] == row.shots, row.name
            generation = {**settings.get("generation_kwargs", {}), **suite.generation}
            assert bool(generation.get("do_sample")) == (name == "instruct"), row.name
            assert row.metric in [entry["metric"] for entry in settings["metric_list"]], row.name


def test_rows_are_chosen_by_name_or_benchmark():
    suite = load_suite("base")
    assert [row.name for row in suite.choose(["gsm8k", "math"])] == ["gsm8k_4shot", "gsm8k_8shot", "math"]
    assert [row.name for row in suite.choose(["gsm8k_4shot"])] == ["gsm8k_4shot"]
    assert all(row.task for row in suite.choose([]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_suite("instrct"), "did you mean 'instruct'"),
        (lambda: load_suite("base").choose(["humanevl"]), "did you mean 'humaneval'"),
        (lambda: load_suite("instruct").choose(["bfcl"]), "cannot be run: it is scored by its own package"),
    ],
)
def test_bad_names_are_explained(call, message):
    with pytest.raises(ValueError, match=message):
        call()
