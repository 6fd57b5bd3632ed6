"""Worked problems are right to the last column, and no held-out operands are ever trained on."""

import re

import pytest

from trainer.data.arithmetic import KINDS, generate_problems, is_heldout


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_equation_in_a_solution_holds(split):
    for problem in generate_problems(3, 2000, split):
        equations = re.findall(r"([\d+*\- ]+) = (\d+)", problem.solution)
        assert equations
        for left, right in equations:
            left = re.sub(r"\b0(\d)", r"\1", left)  # a column of 08 is 8
            assert eval(left) == int(right), problem.solution
        assert problem.solution.endswith(f"\n#### {problem.answer}")
        assert f"= {problem.answer}." in problem.solution
        assert problem.answer >= 0


def test_splits_share_no_operands():
    operands = {
        split: {(p.kind, *map(int, re.findall(r"\d+", p.question))) for p in generate_problems(5, 4000, split)}
        for split in ("train", "heldout")
    }
    assert not operands["train"] & operands["heldout"]
    mirrored = {(kind, b, a) for kind, a, b in (o for o in operands["heldout"] if o[0] == "add")}
    assert not operands["train"] & mirrored


def test_no_step_of_a_training_solution_is_held_out():
    kinds = {"+": "add", "-": "subtract", "*": "multiply"}
    steps = 0
    for problem in generate_problems(2, 2000):
        for a, sign, b in re.findall(r"^(\d+) ([-+*]) (\d+):", problem.solution, re.MULTILINE):
            assert not is_heldout(kinds[sign], (int(a), int(b))), problem.solution
            steps += 1
    assert steps == 2500  # two in each fourth problem


def test_about_a_tenth_is_held_out():
    share = sum(is_heldout("subtract", (a, b)) for a in range(1, 100) for b in range(1, a + 1)) / 4950
    assert 0.08 < share < 0.12


def test_seed_fixes_the_list_and_kinds_come_in_equal_parts():
    problems = generate_problems(11, 400)
    assert problems == generate_problems(11, 400)
    assert problems != generate_problems(12, 400)
    assert [sum(p.kind == kind for p in problems) for kind in KINDS] == [100] * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split is 'test'"),
        ({"kinds": ("divide",)}, "divide"),
        ({"max_operand": 3}, "max_operand 3"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        generate_problems(0, 1, **options)


def test_formulas_of_two_digits_all_have_the_same_columns():
    problems = generate_problems(7, 300, kinds=("add",), min_operand=10, words=False)
    lengths = {len(problem.solution.split(", so ")[0]) for problem in problems}
    assert lengths == {len("27 + 48: 7 + 8 + 0 = 15, 2 + 4 + 1 = 07")}
    assert all(problem.question.startswith("What is ") for problem in problems)
