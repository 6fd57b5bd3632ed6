"""A false equation that stands alone is found; a true text in which a part looks false is not taken for one."""

import pytest

from sft.data import read_rows
from sft.equations import false_equation, value_of
from trainer.data.arithmetic import generate_problems

MUST_GO = {
    "2 + 2 = 5": "2 + 2 = 5",
    "First, 2 + 2 = 5. Then 5 * 3 = 15. So \\boxed{15}.": "2 + 2 = 5",
    "2+2=5, so four is wrong": "2+2=5",
    "It is $3 × 4 = 13$ in all": "3 × 4 = 13",
    "We have \\(3 - 5 = 2\\).": "3 - 5 = 2",
    "x = 2 + 3 = 6": "2 + 3 = 6",
    "2 + 3 = 5\n5 * 4 = 21\n#### 21": "5 * 4 = 21",
    "1. 7 - 9 = -3": "7 - 9 = -3",
    "3 - 2 * 4 = 4": "3 - 2 * 4 = 4",
    "-3 - -2 = -5; no, that is": None,
    "so -3 - -2 = -5": None,
    "so (-3 - -2 = -5)": "-3 - -2 = -5",
    "It costs 1,000 in all. 4 + 4 = 9.": "4 + 4 = 9",
}
MUST_STAY = (
    "10 / 2 + 3 = 8.\n#### 8",
    "10 ÷ 2 + 3 = 8",
    "10 \\div 2 + 3 = 8",
    "10 −2 + 3 = 11, and 10 − 2 + 3 = 11",
    "Here 1,000 + 5 = 1,005, whose last digit is 5, and 5 + 1 = 6.\n#### 6",
    "1 000 + 5 = 1 005",
    "$450,\\!000-500=449,\\!500$ and $450{,}000-500=449{,}500$",
    "7⁄8 × 40 = 35",
    "2.5 + 1 = 3.5, doubled 7.\n#### 7",
    "2 + 1.5 = 3.5",
    "First there are 4 + 4 = 8 apples. At $2 each, she pays $16.\n#### 16",
    "30 + 30 = 1 hour",
    "7 + 8 = 3 mod 12, or 7 + 8 = 3 (mod 12), or 7 + 8 = 3 \\pmod{12}",
    "11:30 + 2 = 1:30 and 9 + 4 = 1:00",
    "half of 10 + 4 = 9",
    "twice 2 + 3 = 7",
    "5 and 3 + 2 = 10",
    "3 x 4 + 2 = 14",
    "2x + 3 = 9, so 2x = 6",
    "x2 + 3 = 9",
    "x + 2 + 3 = 9",
    "2^3 + 1 = 9 and 2 ^ 3 + 1 = 9",
    "(2 + 3) * 2 = 10",
    "4(1 + 1) = 8 and 4 (1 + 1) = 8",
    "(4 + 1) 2 + 3 = 13",
    "1 + 2 + ... + 9 + 10 = 55",
    "1 + 2 … 9 + 10 = 55",
    "100 *\n2 + 3 = 203",
    "5 * 2 = 4 + 6 = 10",
    "2 + 4 = 3!",
    "2 + 4 = 12 / 2",
    "1 + 1 = 0b10",
    "3 + 4 = 7 and 2 - 5 = -3\n#### -3",
    "2 - -5 = 7 * 1",
    "100% of 3 + 2 = 5, 50% 4 + 2 = 4",
    "x -2 + 3 = x + 1, n -2 + 3 = 9",
    "2 + 2 == 5",
    "",
)


@pytest.mark.parametrize("text", MUST_GO)
def test_false_equations_are_found(text):
    assert false_equation(text) == MUST_GO[text]


@pytest.mark.parametrize("text", MUST_STAY)
def test_parts_of_true_texts_are_not(text):
    assert false_equation(text) is None


def test_generated_solutions_are_true():
    for problem in generate_problems(seed=4, count=300):
        assert false_equation(problem.solution) is None, problem.solution


def test_answers_of_people_are_hardly_ever_called_false(shared_data):
    answers = [row["messages"][-1]["content"] for _, row in read_rows(shared_data / "sft" / "math.parquet")]
    assert len(answers) > 10_000
    assert sum(false_equation(answer) is not None for answer in answers) < len(answers) / 500


@pytest.mark.parametrize("piece", ["1", "1 + ", "1 ", "9 * 9 = ", "-"])
def test_long_texts_are_read_once(piece):
    assert false_equation(piece * (200_000 // len(piece))) is None
    assert false_equation("9" * 5000 + " + 1 = 2") is None


@pytest.mark.parametrize(
    ("expression", "value"),
    [("7", 7), ("-2 + 3", 1), ("4 + 3 - 2 * 3", 1), ("2 - 3 * 4 + 5", -5), ("-2 * -3", 6), ("2 × 5 - -1", 11)],
)
def test_products_come_before_sums(expression, value):
    assert value_of(expression) == value
