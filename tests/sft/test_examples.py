"""The built-in conversations are well-formed, honest about held-out text, and pruned for the reasons given."""

import pytest

from sft.data import row_problem
from sft.examples import (
    arithmetic_conversations,
    docstring_conversations,
    prune_worked_examples,
    worked_solution_problem,
    write_conversations,
)
from trainer.data.arithmetic import generate_problems
from trainer.data.machine_corpus import machine_documents


@pytest.mark.slow
def test_docstring_conversations_train_on_nothing_held_out():
    rows = docstring_conversations(300, seed=1)
    assert len(rows) == 300
    assert not any(row_problem(row) for row in rows)
    heldout = "\n".join(document["text"] for document in machine_documents("general", "heldout", 1 << 40))
    answers = [row["messages"][1]["content"] for row in rows]
    assert all(len(answer) <= 400 for answer in answers)
    leaked = [answer for answer in answers if len(answer) > 80 and answer in heldout]
    assert len(leaked) <= 3, "only text that the library itself repeats may stand on both sides"
    assert rows == docstring_conversations(300, seed=1)
    assert rows != docstring_conversations(300, seed=2)


def test_every_generated_solution_is_found_true():
    for problem in generate_problems(seed=3, count=400):
        assert worked_solution_problem(problem.solution) is None, problem.solution


@pytest.mark.parametrize(
    ("solution", "problem"),
    [
        ("4 + 3 = 7\n#### 7", None),
        ("4 + 3 - 2 * 3 = 1\n#### 1", None),
        ("2 - 5 = -3\n#### -3", None),
        ("4 + 3 = 7", "malformed"),
        ("seven\n#### 7", "malformed"),
        ("4 + 3 = 8\n#### 8", "incoherent"),
        ("4 + 3 = 7\n#### 9", "incoherent"),
    ],
)
def test_solutions_are_checked(solution, problem):
    assert worked_solution_problem(solution) == problem


def test_pruning_gives_each_row_one_reason_and_keeps_every_kind():
    rows = arithmetic_conversations(generate_problems(seed=0, count=200))
    broken = {**rows[0], "messages": [rows[0]["messages"][0], {"role": "assistant", "content": "1 + 1 = 3\n#### 3"}]}
    pruned = prune_worked_examples([broken, *rows, rows[5]], keep_share=0.5)
    reasons = [reason for _, reason in pruned.dropped]
    assert len(pruned.kept) + len(pruned.dropped) == 202
    assert reasons.count("incoherent") == 1
    assert (rows[5], "redundant") in pruned.dropped
    assert {row["kind"] for row in pruned.kept} == {row["kind"] for row in rows}

    def lengths(chosen):
        return [len(row["messages"][1]["content"]) for row in chosen if row["kind"] == "add"]

    low = [row for row, reason in pruned.dropped if reason == "low utility"]
    assert min(lengths(pruned.kept)) >= max(lengths(low)) - 4, "the longest workings of a kind stay"


@pytest.mark.parametrize("share", [0, -1, 1.1])
def test_share_out_of_range_is_named(share):
    with pytest.raises(ValueError, match=f"keep_share is {share}"):
        prune_worked_examples([], keep_share=share)


def test_written_rows_are_read_back(tmp_path, arithmetic_rows):
    from sft.data import read_rows

    path = write_conversations(arithmetic_rows[:5], tmp_path / "deep" / "rows.jsonl")
    assert [row for _, row in read_rows(path)] == arithmetic_rows[:5]
