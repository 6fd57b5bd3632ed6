"""Finished runs are compared over groups within groups, and only where rows have scores of their own."""

import json

import pytest

from eval_harness.compare import compare


def write_run(folder, scores, groups, content="h"):
    """A finished run: task -> a score a row; rows with another `content` are other rows."""
    (folder / "samples").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"raw": {"group_subtasks": groups}}))
    for task, values in scores.items():
        rows = [
            {
                "doc_id": n,
                "doc_hash": f"{content}{n}",
                "prompt_hash": "p",
                "filter": "none",
                "metrics": ["acc"],
                "acc": value,
            }
            for n, value in enumerate(values)
        ]
        (folder / "samples" / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_groups_within_groups(tmp_path):
    groups = {"all": ["stem", "law"], "stem": ["physics", "biology"], "alone": []}
    scores = {"physics": [0.0, 0.0], "biology": [0.0], "law": [1.0], "alone": [1.0]}
    first = write_run(tmp_path / "a", scores, groups)
    second = write_run(tmp_path / "b", scores | {"physics": [1.0, 0.0]}, groups)
    found = compare(first, second)
    assert {task: (paired.rows, paired.better) for (task, _), paired in found.items()} == {
        "all": (4, 1),
        "alone": (1, 0),
    }
    parts = compare(first, second, parts=True)
    assert {task: paired.rows for (task, _), paired in parts.items()} == {
        "all": 4, "stem": 3, "physics": 2, "biology": 1, "law": 1, "alone": 1
    }  # fmt: skip


def test_scores_of_whole_texts_are_not_compared(tmp_path):
    runs = [write_run(tmp_path / name, {"heldout": [[-3.0, 8]]}, {"heldout": []}) for name in "ab"]
    with pytest.raises(ValueError, match=r"no row with a score of its own .* they ran heldout and heldout"):
        compare(*runs)


def test_rows_of_other_content_are_other_rows(tmp_path):
    runs = [write_run(tmp_path / name, {"law": [1.0]}, {"law": []}, content=name) for name in "ab"]
    with pytest.raises(ValueError, match="share no row"):
        compare(*runs)


def test_other_readings_of_the_same_answers_stay_apart(tmp_path):
    runs = [write_run(tmp_path / name, {"law": [0.0, float(name == "b")]}, {"law": []}) for name in "ab"]
    for run in runs:
        path = run / "samples" / "law.jsonl"
        rows = [json.loads(line) | {"filter": "flexible-extract", "acc": 1.0} for line in path.open()]
        path.write_text(path.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    found = {metric: paired.difference for (_, metric), paired in compare(*runs).items()}
    assert found == {"acc": 0.5, "acc,flexible-extract": 0.0}
