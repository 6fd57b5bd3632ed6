"""Conversations that need no download: questions on the standard library, worked arithmetic, and a simple pruning.

They let all three stages run on any machine with Python. The wordings, and what counts as low utility, are ours
(assumption); the form is the one every stage reads: `{"messages": [...], "domain", "source", "license", "origin"}`.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft.equations import value_of
from sft.files import write_lines
from trainer.data.arithmetic import Problem
from trainer.data.machine_corpus import library_docstrings, machine_documents

DOCSTRING_QUESTIONS = (
    "What does `{name}` do?",
    "Explain `{name}` from the Python standard library.",
    "Give the documentation of `{name}`.",
    "How is `{name}` described?",
)
_ALL_BYTES = 1 << 40
_NUMBER = r"-?\d+"
_EQUATION = re.compile(rf"((?:{_NUMBER})(?: [-+*] {_NUMBER})+) = ({_NUMBER})")
_FINAL_ANSWER = re.compile(rf"\n#### ({_NUMBER})$")


@dataclass(frozen=True)
class Pruned:
    """What `prune_worked_examples` decided: rows that stay, and (row, reason) of each that goes."""

    kept: list[dict]
    dropped: list[tuple[dict, str]]


def docstring_conversations(count: int, seed: int = 0, max_characters: int = 400) -> list[dict]:
    """Questions on names of the standard library, answered with the first paragraphs of their docstrings.

    Docstrings that the machine corpus holds out are left out, so that held-out loss stays honest.

    Args:
        count: conversations; fewer when the library has fewer.
        seed: of the choice and the wording.
        max_characters: longest answer; whole paragraphs are kept up to it.

    Returns:
        list[dict]: rows with two turns each.
    """
    trained_on = {document["text"] for document in machine_documents("general", "train", _ALL_BYTES)}
    rng = random.Random(seed)
    entries = [entry for entry in library_docstrings() if f"{entry[0]}\n\n{entry[1]}".strip() in trained_on]
    rng.shuffle(entries)
    rows = []
    for name, docstring in entries:
        answer = _first_paragraphs(docstring, max_characters)
        if answer and len(rows) < count:
            question = rng.choice(DOCSTRING_QUESTIONS).format(name=name)
            rows.append(_row(question, answer, "general", "Python standard library", "PSF-2.0", "human"))
    return rows


def arithmetic_conversations(problems: Iterable[Problem]) -> list[dict]:
    """Worked problems as conversations; the answer ends with `#### <number>`.

    Args:
        problems: from `trainer.data.arithmetic.generate_problems`.

    Returns:
        list[dict]: rows with two turns each and their `kind`.
    """
    return [
        _row(problem.question, problem.solution, "math", "generated", "CC0-1.0", "program") | {"kind": problem.kind}
        for problem in problems
    ]


def prune_worked_examples(rows: Sequence[dict], keep_share: float = 0.5) -> Pruned:
    """Keep the part of the worked examples that teaches most, evenly over their kinds.

    In this order: malformed (no final `#### <number>`), incoherent (an equation is false, or the last one does not
    give the answer), redundant (the question was there before), low utility (the shortest workings of a kind, until
    `keep_share` of what was left of that kind remains: they have the fewest steps and carries).

    Args:
        rows: two-turn conversations with a `kind`.
        keep_share: share of each kind that stays after the first three rules, from above 0 to 1.

    Returns:
        Pruned: rows that stay in their order, and each other row with its reason.

    Raises:
        ValueError: `keep_share` is out of range.
    """
    if not 0 < keep_share <= 1:
        raise ValueError(f"keep_share is {keep_share}; use a share above 0 and up to 1")
    dropped, by_kind, seen = [], defaultdict(list), set()
    for position, row in enumerate(rows):
        question, solution = (row["messages"][index]["content"] for index in (0, -1))
        reason = worked_solution_problem(solution) or ("redundant" if question in seen else None)
        if reason:
            dropped.append((row, reason))
            continue
        seen.add(question)
        by_kind[row["kind"]].append((-len(_EQUATION.findall(solution)), -len(solution), position))
    kept = []
    for ranked in by_kind.values():
        ranked.sort()
        limit = max(1, round(keep_share * len(ranked)))
        kept += [position for *_, position in ranked[:limit]]
        dropped += [(rows[position], "low utility") for *_, position in ranked[limit:]]
    return Pruned([rows[position] for position in sorted(kept)], dropped)


def worked_solution_problem(solution: str) -> str | None:
    """Why a solution of our generator's form cannot be trusted ("malformed" or "incoherent"), or None.

    Its last equation gives the answer; for equations in any text there is `sft.equations.false_equation`.
    """
    final = _FINAL_ANSWER.search(solution)
    equations = _EQUATION.findall(solution)
    if final is None or not equations:
        return "malformed"
    true = all(value_of(left) == int(right) for left, right in equations)
    return None if true and equations[-1][1] == final[1] else "incoherent"


def write_conversations(rows: Iterable[dict], path: str | Path) -> Path:
    """Write rows as JSON lines, all of them or none; returns the path."""
    write_lines(rows, path)
    return Path(path)


def _first_paragraphs(docstring: str, max_characters: int) -> str:
    answer = ""
    for paragraph in docstring.split("\n\n"):
        longer = f"{answer}\n\n{paragraph}".strip()
        if len(longer) > max_characters:
            break
        answer = longer
    return answer


def _row(question: str, answer: str, domain: str, source: str, license_name: str, origin: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": domain, "source": source, "license": license_name, "origin": origin}
