"""Verification of candidate answers. Only checked ones are kept, with where they come from.

A math answer is compared with the known one by math-verify, a program is run against tests in the evaluation sandbox,
and a composed task has its answer by construction.
"""

import ast
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from eval_harness.code_tasks import code_block, names_needed
from eval_harness.math_tasks import final_expression, same_object
from eval_harness.sandbox import Program, Sandbox
from sft.data import row_problem
from sft.tasks import Task

MATH_INSTRUCTION = "\nThink step by step. End with the answer in \\boxed{}."
CODE_INSTRUCTION = "\nGive the program in one ```python block."


@dataclass
class Verified:
    """Conversations of one task that verified, and how many candidates were rejected for which reason."""

    rows: list[dict] = field(default_factory=list)
    rejected: Counter = field(default_factory=Counter)


def user_turn(task: Task) -> dict:
    """The task as a message, with how its answer is to be given."""
    instruction = MATH_INSTRUCTION if task.domain == "math" else CODE_INSTRUCTION
    return {"role": "user", "content": task.question + instruction}


def verify_candidates(
    task: Task, candidates: Sequence[str], model: str, keep: int = 1, sandbox: Sandbox | None = None
) -> Verified:
    """Keep the candidates that verify.

    Args:
        task: what was asked.
        candidates: answers.
        model: who wrote them, for provenance.
        keep: verified answers kept, different ones, shortest first.
        sandbox: runs programs; a code task needs it.

    Returns:
        Verified: conversations with provenance, and what was rejected.
    """
    result = Verified()
    texts = list(dict.fromkeys(text.strip() for text in candidates))
    reasons = verify_all(task, texts, sandbox)
    verified = sorted((text for text, reason in zip(texts, reasons, strict=True) if reason is None), key=len)
    result.rejected.update(reason for reason in reasons if reason is not None)
    for text in verified:
        row = _row(task, text, model, len(texts), len(verified))
        if problem := row_problem(row):
            result.rejected[problem] += 1
        elif len(result.rows) < keep:
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
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: brackets without end
        return None
    return Program(source, task.tests, tuple(names_needed(task.tests)))


def _outcome_problem(outcome) -> str | None:
    return None if outcome.passed else "tests failed"


def _row(task: Task, text: str, model: str, sampled: int, verified: int) -> dict:
    return {
        "messages": [user_turn(task), {"role": "assistant", "content": text}],
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
