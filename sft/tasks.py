"""Tasks whose solution can be checked: composed ones, whose answer is known by construction, and rows of data sets."""

import random
from collections.abc import Iterable
from dataclasses import dataclass


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


def tasks_from_rows(rows: Iterable[dict], name: str = "row", license: str = "unknown") -> list[Task]:
    """Tasks from rows with `question` and `answer` (math), or `text`, `test_list` (MBPP's form of code).

    Args:
        rows: rows of a data set.
        name: of the data set; begins every task's identifier.
        license: of the questions, where a row has no `license`.

    Raises:
        ValueError: a row has neither form.
    """
    tasks = []
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {name} is no object: {row!r:.100}")
        license_name = row.get("license") or license
        if "test_list" in row:
            tests = "\n".join(row["test_list"])
            question = f"{row['text']}\nYour program must pass:\n{row['test_list'][0]}"
            task = Task(f"{name}/{number}", question, "code", tests=tests, skill="program", license=license_name)
        elif "question" in row and "answer" in row:
            answer = str(row["answer"]).rpartition("####")[2].strip()
            task = Task(
                f"{name}/{number}", row["question"], "math", answer, skill="word-problem", license=license_name
            )
        else:
            raise ValueError(
                f"row {number} of {name} has the fields {sorted(row)}; give question and answer, or text and test_list"
            )
        tasks.append(task)
    return tasks
