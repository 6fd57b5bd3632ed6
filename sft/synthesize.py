"""Stage 2: synthetic reasoning that verifies itself. Only checked answers are kept, with where they come from.

A math answer is compared with the known one by math-verify, a program is run against tests in the evaluation sandbox,
and a composed task has its answer by construction.
"""

import ast
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from eval_harness.code_tasks import code_block, names_needed
from eval_harness.math_tasks import final_expression, same_object
from eval_harness.sandbox import Program, Sandbox
from sft.data import row_problem
from sft.samplers import Sampler

MATH_INSTRUCTION = "\nThink step by step. End with the answer in \\boxed{}."
CODE_INSTRUCTION = "\nGive the program in one ```python block."


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


@dataclass
class Synthesis:
    """Verified conversations, and how many candidates were rejected for which reason."""

    rows: list[dict] = field(default_factory=list)
    rejected: Counter = field(default_factory=Counter)
    unsolved: list[str] = field(default_factory=list)


def synthesize(
    tasks: Iterable[Task],
    sampler: Sampler,
    candidates: int = 4,
    keep_per_task: int = 1,
    sandbox: Sandbox | None = None,
) -> Synthesis:
    """Sample candidates for every task and keep those that verify.

    Args:
        tasks: what to solve.
        sampler: answers conversations.
        candidates: answers sampled a task.
        keep_per_task: verified answers kept a task, different ones, shortest first.
        sandbox: runs programs; made when the first code task comes.

    Returns:
        Synthesis: conversations with provenance, and what was rejected.

    Raises:
        ValueError: `candidates` or `keep_per_task` is below 1.
        SandboxUnavailable: there is a code task and programs cannot be confined here.
    """
    if candidates < 1 or keep_per_task < 1:
        raise ValueError(f"candidates is {candidates} and keep_per_task {keep_per_task}; use 1 or more of both")
    result = Synthesis()
    for task in tasks:
        instruction = MATH_INSTRUCTION if task.domain == "math" else CODE_INSTRUCTION
        question = {"role": "user", "content": task.question + instruction}
        texts = list(dict.fromkeys(text.strip() for text in sampler.sample([question], candidates)))
        if task.domain == "code" and sandbox is None:
            sandbox = Sandbox()
        reasons = verify_all(task, texts, sandbox)
        verified = sorted((text for text, reason in zip(texts, reasons, strict=True) if reason is None), key=len)
        result.rejected.update(reason for reason in reasons if reason is not None)
        if not verified:
            result.unsolved.append(task.identifier)
        for text in verified[:keep_per_task]:
            row = _row(task, question, text, sampler.name, len(texts), len(verified))
            if problem := row_problem(row):
                result.rejected[problem] += 1
            else:
                result.rows.append(row)
    return result


def verify_all(task: Task, texts: Sequence[str], sandbox: Sandbox | None) -> list[str | None]:
    """Why each candidate is rejected; None for one that verifies."""
    if task.domain == "math":
        return [_math_problem(task, text) for text in texts]
    programs = [_program(task, text) for text in texts]
    outcomes = iter(sandbox.run_many([program for program in programs if program is not None]))
    return ["no program" if program is None else _outcome_problem(next(outcomes)) for program in programs]


def _math_problem(task: Task, text: str) -> str | None:
    if "\\boxed" not in text:
        return "no boxed answer"
    return None if same_object(task.answer, final_expression(text)) else "wrong answer"


def _program(task: Task, text: str) -> Program | None:
    source = code_block(text)
    if source is None:
        return None
    try:
        ast.parse(source)
    except (SyntaxError, ValueError):
        return None
    return Program(source, task.tests, tuple(names_needed(task.tests)))


def _outcome_problem(outcome) -> str | None:
    return None if outcome.passed else "tests failed"


def _row(task: Task, question: dict, text: str, model: str, sampled: int, verified: int) -> dict:
    return {
        "messages": [question, {"role": "assistant", "content": text}],
        "domain": task.domain,
        "source": f"synthetic/{task.skill or task.domain}",
        "license": task.license,
        "origin": model,
        "skill": task.skill,
        "provenance": {
            "task": task.identifier,
            "model": model,
            "verified_by": "math-verify" if task.domain == "math" else "tests in the sandbox",
            "answer": task.answer,
            "distinct_candidates": sampled,
            "verified_candidates": verified,
        },
    }


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


def tasks_from_rows(rows: Iterable[dict]) -> list[Task]:
    """Tasks from rows with `question` and `answer` (math), or `text`, `test_list` (MBPP's form of code).

    Raises:
        ValueError: a row has neither form.
    """
    tasks = []
    for number, row in enumerate(rows):
        license_name = row.get("license") or "unknown"
        if "test_list" in row:
            tests = "\n".join(row["test_list"])
            question = f"{row['text']}\nYour program must pass:\n{row['test_list'][0]}"
            task = Task(f"code/{number}", question, "code", tests=tests, skill="program", license=license_name)
        elif "question" in row and "answer" in row:
            answer = str(row["answer"]).rpartition("####")[2].strip()
            task = Task(f"math/{number}", row["question"], "math", answer, skill="word-problem", license=license_name)
        else:
            raise ValueError(
                f"row {number} has the fields {sorted(row)}; give question and answer, or text and test_list"
            )
        tasks.append(task)
    return tasks
