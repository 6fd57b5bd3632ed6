r"""MATH's answers are found in every usual closing, and compared as text and as mathematics."""

import pytest
from datasets import Dataset

from eval_harness.answers import INVALID
from eval_harness.math_tasks import add_answers, final_expression, same_object, score


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        ("The final answer is positive, so it is\nFinal Answer: The final answer is $7$. I hope it is correct.", "7"),
        ("The final answer is $90\\text{ square\nunits}$. I hope it is correct.", "90\\text{ square\nunits}"),
        (r"so \boxed{5} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"The final answer is \boxed{x^2}.", "x^2"),
        ("The answer is $12$.", "12"),
        (r"<think>\boxed{3}</think> it is \boxed{4}", "4"),
        ("The final answer is 1. I hope it is correct. No: the final answer is 2. I hope it is correct.", "2"),
        (
            r"Final answer is \boxed{1}. I hope it is correct. No: final answer is \boxed{2}. I hope it is correct.",
            "2",
        ),
        ("Thus the final answer is:\n\n\\[\n\\boxed{5}\n\\]", "5"),
        ("The final answer is 5. This is because 2 + 3 = 5.", "5"),
        ("So the answer is:\n\\[\n\\frac{1}{2}\n\\]\nDone.", r"\frac{1}{2}"),
        (r"The answer is \(x = 5\).", "x = 5"),
        (r"It is \boxed{5}, which I put within \boxed{}.", "5"),
        ("The answer is $x+1$, as asked.\nThe answer is $x+1$,", "x+1"),
        ("The answer is $$5$$", "5"),
        ("**Final Answer:** $3.5$", "3.5"),
        ("**Answer**: **7**.", "7"),
        ("The answer is $a$ or $b$.", "$a$ or $b$"),
        ("no answer at all", INVALID),
    ],
)
def test_final_expression(text, expression):
    assert final_expression(text) == expression


@pytest.mark.parametrize(
    ("gold", "stated", "exact", "same"),
    [
        (r"\frac{1}{2}", r"\dfrac12", 0.0, 1.0),
        (r"\frac{1}{2}", "0.5", 0.0, 1.0),
        ("1,000", "1000", 1.0, 1.0),
        (r"2\sqrt{3}", r"\sqrt{12}", 0.0, 1.0),
        ("(1,2)", "(1, 2)", 1.0, 1.0),
        ("(1,2)", "(2,1)", 0.0, 0.0),
        ("x+1", "1+x", 0.0, 1.0),
        ("7", "-7", 0.0, 0.0),
        ("12_3", "12_4", 0.0, 0.0),
        ("12_{3}", "12_3", 0.0, 1.0),
        ("12_3", "11_3", 0.0, 0.0),
        ("12_3", "12", 0.0, 1.0),
        (r"\frac \pi4 + 2 - \sqrt2", r"\frac \pi4 + 2 - \sqrt3", 0.0, 0.0),
        (r"\frac \pi4 + 2", r"2 + \frac{\pi}{4}", 0.0, 1.0),
        ("7", "8", 0.0, 0.0),
        (r"\frac{1}{2}", r"\frac{1}{2}.", 1.0, 1.0),
        ("7", "$7$", 1.0, 1.0),
        ("10,000", r"10\,000", 0.0, 1.0),
        ("10,000", r"10\,001", 0.0, 0.0),
        ("9240", r"9{,}240\,\text{cm}", 0.0, 1.0),
        ("9240", r"9,\!241\,\text{cm}", 0.0, 0.0),
        ("9,240", r"9,\!240\,\text{cm}^2", 0.0, 1.0),
        ("x+1", r"x+1\,", 0.0, 1.0),
        (r"\sin x", r"\sin\,x", 0.0, 1.0),
        (r"-\frac{5}{3}.", r"-\frac{5}{3}", 1.0, 1.0),
        (r"11 \frac{2}{3}", "11 2/3", 0.0, 1.0),
        (r"11 \frac{2}{3}", "112/3", 0.0, 0.0),
        (r"\text{Evelyn}", r"\text{Evelyn}", 1.0, 1.0),
        (r"\text{Evelyn}", r"\text{Evelyq}", 0.0, 0.0),
    ],
)
def test_both_metrics(gold, stated, exact, same):
    found = score({"answer": gold}, [f"It is \\boxed{{{stated}}}."])
    assert found == {"exact_match": exact, "math_verify": same}


def test_no_answer_is_never_right_not_even_where_the_solution_boxes_none():
    assert score({"answer": INVALID}, ["no idea"]) == {"exact_match": 0.0, "math_verify": 0.0}


def test_an_equation_states_its_end_and_is_not_stated_by_it():
    assert same_object("7", "3 + 4 = 7")
    assert not same_object("3 + 4 = 7", "7")


def test_rows_get_the_answer_that_their_solution_boxes_last():
    rows = Dataset.from_list([{"solution": r"\boxed{1} so \boxed{2}"}, {"solution": r"thus $\boxed {x}$"}])
    assert add_answers(rows)["answer"] == ["2", "x"]
