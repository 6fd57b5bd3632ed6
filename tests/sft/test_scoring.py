"""Each score puts cases in the order a reader would, and selection keeps the best of every domain."""

from dataclasses import replace

import pytest

from sft.data import read_rows
from sft.scoring import (
    Score,
    question_and_answer,
    reasoning_density,
    response_completeness,
    score_conversation,
    select_by_quality,
    structural_consistency,
)

WORKED = "First, 48/2 = 24 clips in May. Therefore 48 + 24 = 72 clips in all.\n#### 72"
CHATTY = "What a lovely question about clips and friends! Natalia is really a wonderful seller, and spring is lovely."
CODE = "```python\ndef add(a, b):\n    total = a + b\n    return total\n```"


def test_worked_solutions_are_denser_than_chatter():
    assert reasoning_density(WORKED) > 0.9
    assert reasoning_density(CODE) > 0.9
    assert reasoning_density(CHATTY) < 0.2
    assert reasoning_density("72") < reasoning_density(WORKED)


@pytest.mark.parametrize(
    ("answer", "domain", "least", "most"),
    [
        (WORKED, "math", 1.0, 1.0),
        (r"Hence $x = 3$, so the value is \boxed{3}.", "math", 0.9, 1.0),
        ("48/2 = 24 clips in May. Therefore 48 + 24 =", "math", 0.0, 0.3),
        (CODE, "code", 0.9, 1.0),
        ("```python\ndef add(a, b):\n    return", "code", 0.0, 0.4),
        ("Water boils sooner on a mountain because the air presses less.", "general", 0.9, 1.0),
        ("Water boils sooner on a mountain because the", "general", 0.0, 0.3),
        ("As an AI, I cannot help with that.", "general", 0.0, 0.0),
        (" ", "general", 0.0, 0.0),
        ("Paris", "general", 0.8, 1.0),
        ("New York City", "general", 0.8, 1.0),
        ("- red\n- green\n- blue", "general", 0.8, 1.0),
        ("Here are the first seven of them all:\n1. red\n2. green\n3. blue and yellow", "general", 0.9, 1.0),
        ("42", "math", 0.8, 1.0),
        ("$1,250.50", "math", 0.8, 1.0),
        ("水在山上沸騰得更早，因為那裡的空氣壓力較小。", "general", 0.9, 1.0),
        ("SELECT *\nFROM employees\nWHERE salary > 50000;", "code", 0.9, 1.0),
        ("def shout(text):\n    return text.upper()", "code", 0.8, 1.0),
        ("6\n3\n2\n1", "code", 0.8, 1.0),
        ("const shout = (text) => {\n  return text +", "code", 0.0, 0.4),
        ("Use `upper`; then", "code", 0.0, 0.5),
        ("He could not come, and I can't help but wonder why; I cannot help asking.", "general", 0.9, 1.0),
        ("I can't help with that.", "general", 0.0, 0.0),
        ("Paris and", "general", 0.0, 0.4),
        ("Water boils sooner on a mountain because there air", "general", 0.0, 0.5),
        ("It is forty two, I think", "math", 0.0, 0.5),
    ],
)
def test_answers_that_arrive_score_high(answer, domain, least, most):
    assert least <= response_completeness("Why?", answer, domain) <= most


@pytest.mark.parametrize(
    ("answer", "consistency"),
    [
        (WORKED, 1.0),
        ("1. a\n2. b\n3. c", 1.0),
        ("1. a\n2. b\n\n1. again\n2. b", 1.0),
        ("1. a\n2. b\n5. c", 0.75),
        ("```python\nx = (1", 0.5),
        ("This very sentence is here once more.\n" * 4, 0.75),
        ("1) add\n2) divide\n3) done", 1.0),
        ("Either a) add, or b) divide, or ii) ask (me).", 1.0),
        ("Nice :) and sad :( and ;-)", 1.0),
        ("x lies in [0, 1)", 1.0),
        ("f(a, b) is (1, 2)", 1.0),
        ("f(a, (b) is odd", 0.75),
        ("so a) it is (b", 1.0),
        ("it is so)", 0.75),
        ("1000. a\n" + "9" * 5000 + ". b", 1.0),
    ],
)
def test_faults_of_structure_are_counted(answer, consistency):
    assert structural_consistency(answer) == consistency


def test_two_blocks_of_code_are_no_prose():
    prose = "word " * 60
    first, second = "```python\nx = 1\nlet = so\n```", "```python\ny = 2\nif then\n```"
    apart, together = f"{prose}{first}\ntext\n{second}", f"{prose}{first}\n{second}\ntext"
    assert reasoning_density(apart) == reasoning_density(together)


@pytest.mark.parametrize("text", ["\n", " ", "\t", "1. ", "``` ", "- ", ", ", "a = ", "x\n\n", "substitut", "(", ":"])
def test_long_answers_are_scored_in_one_pass(text):
    answer = text * (200_000 // len(text)) + "b"
    assert 0 <= reasoning_density(answer) <= 1
    assert 0 <= response_completeness("Why?", answer, "math") <= 1
    assert 0 <= structural_consistency(answer) <= 1


def test_a_call_is_a_whole_answer():
    row = conversation("It goes on and")
    assert score_conversation(row).completeness < 0.5
    row["messages"][-1] |= {"content": None, "tool_calls": [{"name": "look", "arguments": {"at": "it"}}]}
    assert score_conversation(row).completeness == 1.0
    row["messages"][-1] |= {"reasoning_content": "Let us look."}
    assert question_and_answer(row) == ("How?", "Let us look.\nlook\nit")


def conversation(answer: str, domain: str = "math") -> dict:
    return {
        "messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": answer}],
        "domain": domain,
    }


def test_judge_counts_half():
    alone = Score(0.5, 1.0, 0.75)
    assert alone.total == pytest.approx(0.4 * 0.5 + 0.35 * 1.0 + 0.25 * 0.75)
    assert replace(alone, judge=0.0).total == pytest.approx(alone.total / 2)
    assert replace(alone, judge=1.0).total == pytest.approx((alone.total + 1) / 2)


def test_selection_keeps_the_best_of_each_domain_and_drops_the_unfinished():
    rows = [conversation("", "math")] * 5 + [conversation("", "code")] * 2
    scores = [Score(value, 0.9, 1.0) for value in (0.1, 0.9, 0.5, 0.7)] + [Score(1.0, 0.2, 1.0)]
    scores += [Score(0.2, 0.9, 1.0), Score(0.3, 0.9, 1.0)]
    kept, dropped = select_by_quality(rows, scores, keep_share=0.4)
    assert kept == [1, 3, 6]
    reasons = dict(dropped)
    assert set(reasons) == {0, 2, 4, 5}
    assert reasons[4].startswith("incomplete (0.20")
    assert "below the best 40% of code" in reasons[5]


def test_the_share_is_of_all_of_a_domain_and_no_domain_goes():
    rows = [conversation("", "math")] * 4 + [conversation("", "rare")]
    scores = [Score(0.1, 0.2, 1.0)] * 2 + [Score(0.5, 0.9, 1.0)] * 2 + [Score(0.1, 0.9, 1.0)]
    assert select_by_quality(rows, scores, keep_share=0.5)[0] == [2, 3, 4]
    assert select_by_quality(rows, scores, keep_share=0.4)[0] == [2, 3, 4]
    assert select_by_quality(rows, scores, keep_share=0.1)[0] == [2, 4]


def test_selection_refuses_bad_settings():
    with pytest.raises(ValueError, match="keep_share is 0"):
        select_by_quality([], [], keep_share=0)
    with pytest.raises(ValueError, match="1 rows and 0 scores"):
        select_by_quality([conversation("")], [], keep_share=0.5)


def test_real_solutions_arrive_and_cut_ones_do_not(shared_data):
    rows = [row for _, row in read_rows(shared_data / "sft" / "math.parquet") if row["source"] == "gsm8k/train"][:300]
    whole = [score_conversation(row) for row in rows]
    cut = []
    for row in rows:
        answer = row["messages"][1]["content"]
        cut.append(score_conversation(conversation(answer[: len(answer) // 2])))
    assert sum(score.completeness >= 0.8 for score in whole) > 290
    assert sum(after.total < before.total for before, after in zip(whole, cut, strict=True)) > 290
