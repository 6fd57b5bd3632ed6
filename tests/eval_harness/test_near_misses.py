"""Near misses are near, and wrong."""

import ast
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.near_misses import continuation, differs, mutants, near_expression, near_number
from eval_harness.sandbox import INSTALL, Program, Sandbox

SOURCE = 'def total(n):\n    """Sum below n."""\n    s = 0\n    for i in range(n):\n        s += i\n    return s\n'


@given(st.integers(-(10**9), 10**9), st.integers(0, 9))
def test_near_numbers_are_other_numbers(value, row):
    near = near_number(str(value), row)
    assert int(near) != value
    assert sum(a != b for a, b in zip(near.lstrip("-"), str(abs(value)), strict=True)) <= 1


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize(
    "expression", ["0", "-7", "19", r"\frac{1}{2}", r"\text{Evelyn}", "x", r"\pi", "(2,5)", r"\emptyset"]
)
def test_near_expressions_differ(expression, row):
    assert near_expression(expression, row) != expression


def test_mutants_are_valid_and_end_with_the_moved_result():
    found = list(mutants(SOURCE, "total"))
    assert len(found) == len(set(found)) >= 3
    for source in found:
        ast.parse(source)
    assert "range(n - 1)" in found[0]
    space: dict = {}
    exec(found[-1], space)
    assert space["total"](4) == 7


def test_a_continuation_is_what_follows_the_prompt():
    body = continuation(SOURCE, "total")
    prompt = 'def total(n):\n    """Sum below n."""\n'
    space: dict = {}
    exec(prompt + body, space)
    assert space["total"](4) == 6
    assert '"""' not in body


@pytest.mark.skipif(shutil.which("bwrap") is None, reason=INSTALL)
def test_the_oracle_tells_equivalent_changes_from_real_ones():
    program = Program(SOURCE, "assert total(4) == 6\nassert total(0) == 0", ("total",))
    sandbox = Sandbox(timeout_seconds=30)
    assert sandbox.run(differs(SOURCE, SOURCE.replace("range(n)", "range(n - 1)"), program)).passed
    assert not sandbox.run(differs(SOURCE, SOURCE.replace("s += i", "s = s + i"), program)).passed
