"""A report's intervals belong to the score beside them: of the same reading, over all parts, in the score's unit."""

import json

import pytest

from eval_harness.report import report_lines
from eval_harness.statistics import standard_error, wilson_interval
from eval_harness.suites import load_suite


def write_samples(folder, task, filters):
    """Samples of a finished run: filter -> a score a row."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    rows = [{"filter": name, "acc": value} for name, values in filters.items() for value in values]
    (folder / "samples" / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def results(metrics, groups):
    return {"metrics": metrics, "num_samples": {}, "skipped": [], "raw": {"group_subtasks": groups}}


def test_intervals_of_two_readings_over_the_parts_of_a_group(tmp_path):
    write_samples(tmp_path, "law", {"answer": [1.0, 0.0, 1.0], "flexible": [1.0, 1.0, 1.0]})
    write_samples(tmp_path, "arts", {"answer": [1.0], "flexible": [0.0]})
    found = report_lines(
        tmp_path, results({"all": {"acc": 0.75, "acc,flexible": 0.75}}, {"all": ["law", "arts"]}), rows=[]
    )
    assert [(line.metric, line.score, line.rows, line.percent) for line in found] == [
        ("acc", 75.0, 4, True), ("acc,flexible", 75.0, 4, True)
    ]  # fmt: skip
    for line in found:
        assert (line.low / 100, line.high / 100) == pytest.approx(wilson_interval(3, 4))


def test_intervals_of_shares_and_scores_that_are_none(tmp_path):
    shares = [0.5, 0.9, 0.4, 0.8] * 25
    write_samples(tmp_path, "drop", {"none": shares})
    write_samples(tmp_path, "length", {"none": [12.0, 30.0]})
    drop, length = report_lines(tmp_path, results({"drop": {"acc": 0.65}, "length": {"acc": 21.0}}, {}), rows=[])
    assert (drop.high - drop.score, drop.score - drop.low) == pytest.approx(
        (196 * standard_error(shares),) * 2, rel=1e-3
    )
    assert (length.score, length.low, length.percent) == (21.0, None, False)


def test_a_published_figure_stands_beside_its_own_metric_alone(tmp_path):
    (row,) = load_suite("base").choose(["humaneval"])
    metrics = {"motif2_humaneval": {"pass@1": 0.5, "pass@10": 0.75}}
    lines = report_lines(tmp_path, results(metrics, {}), rows=[row])
    assert [(line.metric, line.score, bool(line.published)) for line in lines] == [
        ("pass@1", 0.5, True), ("pass@10", 0.75, False)
    ]  # fmt: skip
