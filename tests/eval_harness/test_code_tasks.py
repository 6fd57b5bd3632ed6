"""Responses of base and chat models become programs, and programs become pass@k."""

import shutil

import pytest

from eval_harness.code_tasks import (
    code_block,
    humaneval_program,
    judge_humaneval,
    judge_mbpp,
    mbpp_program,
    names_needed,
    score,
)
from eval_harness.sandbox import INSTALL

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason=INSTALL)

DOUBLE = {
    "task_id": "HumanEval/0",
    "prompt": 'def helper(x):\n    return x + x\n\n\ndef double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return helper(x)\n",
    "test": "def check(candidate):\n    assert candidate(4) == helper(4)\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
SQUARE = {
    "task_id": 1,
    "text": "Square a number.",
    "code": "def square(x):\r\n    return x * x",
    "test_list": ["assert square(3) == 9", "assert math.isclose(square(0.5), 0.25)"],
    "test_setup_code": "",
}


@needs_bubblewrap
def test_base_and_chat_responses_of_humaneval():
    responses = {
        "    return helper(x)\n": True,
        "    return x\n": False,
        "Sure:\n```python\ndef double(x):\n    return 2 * x\n```\nDone.": True,
        "<think>```python\ndef double(x): return 0\n```</think>```python\ndef double(x):\n    return 2 * x\n```": True,
        "def double(x):\n    return 2 * x\n": True,
        "```python\ndef other(x):\n    return 2 * x\n```": False,
        "def helper(x):\n    return 0\ndef double(x):\n    return 0\n": False,
        "```python\ndef double(x):\n    return 2 * x\n```\nIt prints\n```\n4\n```": True,
        "1. Code:\n   ```python\n   def double(x):\n       return 2 * x\n   ```": True,
        "": False,
    }
    verdicts = judge_humaneval([[text] for text in responses], [DOUBLE] * len(responses))
    assert [verdict[0]["passed"] for verdict in verdicts] == list(responses.values())
    assert "AssertionError" in verdicts[1][0]["reason"]


@needs_bubblewrap
def test_base_and_chat_responses_of_mbpp():
    responses = {
        SQUARE["code"] + "\n[DONE]\nmore": True,
        "```python\ndef square(x):\n    return x ** 2\n```": True,
        "def square(x):\n    return x + x": False,
        "```python\ndef square(x):\n    return x ** 2\n```\nFor example\n```\n>>> square(3)\n9\n```": True,
        "[BEGIN]\ndef square(x):\n    return x ** 2\n[DONE]": True,
        "\n[BEGIN] \ndef square(x):\n    return x ** 2\n[DONE]": True,
        "```python\n[BEGIN]\ndef square(x):\n    return x ** 2\n[DONE]\n```": True,
        "```python\n[BEGIN]\ndef square(x):\n    return x + 2\n[DONE]\n```": False,
        "import math\nmath.isclose = lambda *a: True\ndef square(x):\n    return 9": False,
    }
    verdicts = judge_mbpp([[text] for text in responses], [SQUARE] * len(responses))
    assert [verdict[0]["passed"] for verdict in verdicts] == list(responses.values())


@needs_bubblewrap
def test_several_samples_of_a_problem_stay_together():
    verdicts = judge_mbpp([[SQUARE["code"], "nonsense("], ["nonsense(", "nonsense("]], [SQUARE, SQUARE])
    assert [[verdict["passed"] for verdict in row] for row in verdicts] == [[True, False], [False, False]]


def test_pass_at_k_of_a_row():
    verdicts = [{"passed": index < 3, "reason": ""} for index in range(10)]
    assert score({}, [verdicts]) == {"pass@1": pytest.approx(0.3), "pass@10": 1.0}
    assert score({}, [verdicts * 10]).keys() == {"pass@1", "pass@10", "pass@100"}


def test_the_judge_imports_modules_itself_and_takes_only_the_asked_names_from_the_program():
    program = mbpp_program("anything", SQUARE)
    assert (program.names, program.setup) == (("square",), "import math")
    prepared = mbpp_program("anything", SQUARE | {"test_setup_code": "n = 3", "test_list": ["assert square(n) == 9"]})
    assert (prepared.names, prepared.tests) == (("square",), "n = 3\nassert square(n) == 9")
    assert humaneval_program("", DOUBLE).names == ("double",)


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        ("assert f(g(1)) == set([x for x in [2]])", ["f", "g"]),
        ("import cmath\nassert cmath.isclose(f(1), 2)", ["f"]),
        ("assert sum(10, 15) == 6", ["sum"]),
        ("root = Node(1)\nroot.left = Node(2)\nassert deep(root) == 2", ["Node", "deep"]),
    ],
)
def test_names_that_only_the_program_can_define(tests, names):
    assert names_needed(tests) == names


def test_code_blocks():
    assert code_block("a\n```\none\n```\n```py\ntwo\n```") == "two"
    assert code_block("```python\nx = 1") == "x = 1"
    assert code_block("``` python title=a\none\n```\ntext") == "one"
    assert code_block("```python\nreturn 1```") == "return 1"
    assert code_block('```python\n"""Quotes ``` here."""\nx = 1\n```') == '"""Quotes ``` here."""\nx = 1'
    assert code_block("- item\n    ```\n    if x:\n        y\n    ```") == "if x:\n    y"
    assert code_block("```\n```\ntext\n```\none\n```") == "one"
    assert code_block("none") is None
