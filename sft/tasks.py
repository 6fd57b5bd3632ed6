"""Tasks whose solution can be checked: composed ones, whose answer is known by construction, and rows of data sets."""

import ast
import random
from collections.abc import Iterable
from dataclasses import dataclass

from sft.data import NOT_UNICODE, DataReport, is_unicode


@dataclass(frozen=True)
class Task:
    """Something to solve whose solution can be checked.

    Args:
        identifier: names the task in provenance.
        question: what is asked.
        domain: "math" or "code".
        answer: the known answer of a math task.
        tests: assertions that a program of a code task must pass.
        skill: what it exercises, for diversity later.
        license: of the question.
    """

    identifier: str
    question: str
    domain: str
    answer: str = ""
    tests: str = ""
    skill: str = ""
    license: str = "CC0-1.0"

    def __post_init__(self):
        needed = {"math": "answer", "code": "tests"}.get(self.domain)
        if needed is None:
            raise ValueError(f"task {self.identifier} has domain {self.domain!r}; use math or code")
        if not getattr(self, needed).strip():
            raise ValueError(
                f"{self.domain} task {self.identifier} has no {needed}; nothing could verify its solution"
            )


_STEPS = {
    "add": ("add {n} to it", lambda value, n: value + n),
    "double": ("multiply it by {n}", lambda value, n: value * n),
    "take": ("subtract {n} from it", lambda value, n: value - n),
    "square": ("square it", lambda value, n: value * value),
    "rest": ("take its remainder on division by {n}", lambda value, n: value % n),
}


def compose_tasks(seed: int, count: int, depth: int = 3) -> list[Task]:
    """Chains of small operations whose answer is known by construction.

    Args:
        seed: fixes the whole list.
        count: tasks.
        depth: operations a task.

    Returns:
        list[Task]: math tasks with skill `compose-<depth>`.

    Raises:
        ValueError: `depth` is below 1.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; use 1 or more operations")
    rng = random.Random(f"compose/{seed}/{depth}")
    tasks = []
    for number in range(count):
        value = start = rng.randint(2, 30)
        phrases, squared = [], False
        for _ in range(depth):
            name = rng.choice([name for name in _STEPS if not (squared and name == "square")])
            squared |= name == "square"
            operand = rng.randint(2, 12)
            phrase, apply = _STEPS[name]
            phrases.append(phrase.format(n=operand))
            value = apply(value, operand)
        question = f"Start with {start}. Then {', then '.join(phrases)}. What is the result?"
        tasks.append(Task(f"compose-{depth}/{seed}/{number}", question, "math", str(value), skill=f"compose-{depth}"))
    return tasks


def tasks_from_rows(
    rows: Iterable[tuple[str, object]],
    report: DataReport,
    name: str = "row",
    license: str = "unknown",
    bad_rows: str = "skip",
) -> list[Task]:
    """Tasks from rows of a data set.

    A math row has `question` and `answer`; a row of code has MBPP's form, `test_list` with `text` or, as in its
    sanitized part, `prompt`, and may have `test_setup_code` and `test_imports`.

    Args:
        rows: (place, row), as `sft.data.read_rows` gives them.
        report: counts the rows that are no task.
        name: of the data set; begins every task's identifier.
        license: of the questions, where a row has no `license`.
        bad_rows: "skip" or "refuse".

    Raises:
        ValueError: a row is no task, and `bad_rows` is "refuse".
    """
    tasks = []
    for number, (place, row) in enumerate(rows):
        report.rows += 1
        task = _task(row, f"{name}/{number}", license)
        if isinstance(task, Task):
            tasks.append(task)
        elif bad_rows == "refuse":
            raise ValueError(f"row {place} is no task: {task}; mend it, or set bad_rows: skip")
        else:
            report.drop(task, place)
    return tasks


def _task(row: object, identifier: str, license: str) -> Task | str:
    """The task of a row, or why it has none."""
    if not isinstance(row, dict):
        return "not a JSON object"
    if not isinstance(row.get("license"), str | None):
        return "license is not text"
    is_code = "test_list" in row
    question = next((row[name] for name in ("question", "text", "prompt") if row.get(name) is not None), None)
    if not isinstance(question, str) or not question.strip():
        return "no question: no text in question (math), or in text or prompt (code)"
    found = _code_task(row, question) if is_code else _math_task(row, question)
    if isinstance(found, str):
        return found
    if not is_unicode(found):
        return NOT_UNICODE
    return Task(identifier, license=row.get("license") or license, **found)


def _math_task(row: dict, question: str) -> dict | str:
    answer = row.get("answer")
    if not isinstance(answer, str | int | float) or isinstance(answer, bool):
        return "neither an answer (math) nor a test_list (code)"
    answer = str(answer).rpartition("####")[2].strip()
    if not answer:
        return "an empty answer"
    return {"question": question, "domain": "math", "answer": answer, "skill": "word-problem"}


def _code_task(row: dict, question: str) -> dict | str:
    tests, before = _texts(row["test_list"]), _texts(row.get("test_imports")) + _texts(row.get("test_setup_code"))
    if not tests:
        return "no tests in test_list"
    program = "\n".join([*before, *tests])
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "tests that are no Python"
    shown = "\n".join([*before, tests[0]])
    question = f"{question}\nYour program must pass:\n{shown}"
    return {"question": question, "domain": "code", "tests": program, "skill": "program"}


def _texts(value: object) -> list[str]:
    """The texts of a list, or of one that came as plain text; what is empty or no text is left out."""
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.strip()]
