"""Stage 2: how good a sample is for learning to reason, by functions that can be read and tested, and selection by it.

Three scores from 0 to 1. Their definitions and weights are ours (assumption): the report names the criteria (reasoning
density, response completeness, structural consistency) and not how they were measured. `sft.curate` may add a model's
rating to them.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from sft.filters import message_text, words

_STEP = re.compile(
    r"\b(because|since|therefore|thus|hence|so|then|if|first|second|next|finally|let|suppose|assume|implies|means|"
    r"must|consider|recall|note|check|substitut\w+|simplif\w+|equals?)\b",
    re.IGNORECASE,
)
_EQUATION = re.compile(r"[\w)\]}]\s*(?:=|<|>|≤|≥|\\le|\\ge)\s*[\w(\[{\\$-]")
_NUMBERED = re.compile(r"^[ \t]*(\d{1,3})[.)]\s", re.MULTILINE)
_FINAL = re.compile(r"(####\s*\S|\\boxed\{|\b(?:the )?(?:final )?answer is\b|```\s*$)", re.IGNORECASE | re.MULTILINE)
_REFUSAL = re.compile(
    r"\b(as an ai\b|i (?:cannot|can't|am unable to) (?:help(?! (?:but|\w+ing)\b)|assist|answer))", re.IGNORECASE
)
_UNFINISHED = re.compile(r"(\.\.\.|…|[,:;=+*/-]|\b(?:and|or|the|a|of|to|is))\s*$", re.IGNORECASE)
_CODE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_NUMBER = re.compile(r"\s*[-+]?[$€£]?\d[\d.,]*(?:/\d+)?\s?%?\s*")
_LIST_LINE = re.compile(r"\s*(?:[-*+•|]|\d{1,3}[.)])\s")
# `a) … b) …` closes brackets that nothing opened, and so does a smile.
_CLOSED_ALONE = re.compile(r"(?<!\S)(?:\d{1,3}|[A-Za-z]|[ivx]{2,5})\)|[:;=]['-]?\)")
_OPENED_ALONE = re.compile(r"[:;=]['-]?\(")
_SENTENCE_ENDS = ".!?)\"'`。！？」"
_CODE_ENDS = ";)}]>"
# An answer of so few words needs no full stop (assumption).
FEW_WORDS = 6
# Marks of reasoning in a hundred words that count as full density (assumption).
FULL_DENSITY = 12.0
WEIGHTS = {"density": 0.4, "completeness": 0.35, "consistency": 0.25}


@dataclass(frozen=True)
class Score:
    """Scores of one conversation, each from 0 to 1; `judge` is None without a judge."""

    density: float
    completeness: float
    consistency: float
    judge: float | None = None

    @property
    def total(self) -> float:
        """Weighted mean; a judge, where there is one, counts as much as the three together."""
        own = sum(weight * getattr(self, name) for name, weight in WEIGHTS.items())
        return own if self.judge is None else (own + self.judge) / 2


def reasoning_density(answer: str) -> float:
    """Marks of reasoning (connectives, relations, numbered steps) a word, up to `FULL_DENSITY` in a hundred.

    A code block counts as what it is: its statements are steps, so lines stand for marks there.
    """
    code = "\n".join(_CODE.findall(answer))
    prose = _CODE.sub(" ", answer)
    marks = len(_STEP.findall(prose)) + len(_EQUATION.findall(prose)) + len(_NUMBERED.findall(prose))
    marks += sum(1 for line in code.splitlines() if line.strip() and not line.startswith("```"))
    count = max(len(words(answer)), 20)
    return min(1.0, 100 * marks / count / FULL_DENSITY)


def response_completeness(question: str, answer: str, domain: str) -> float:
    """Whether the answer arrives: a stated result (0.5), an end not cut off (0.3), some length (0.2); a refusal is 0.

    Args:
        question: not scored itself; a longer one wants a longer answer.
        answer: the assistant's text.
        domain: math and code need a result in their form, or a last line that is a number or the end of a program;
            elsewhere a last full sentence will do, a few words, or a list.
    """
    if not answer.strip() or _REFUSAL.search(answer):
        return 0.0
    last_line = answer.rstrip().rpartition("\n")[2]
    ends = answer.count("```") % 2 == 0 and not _UNFINISHED.search(answer)
    if domain == "code" and last_line[-1] in _CODE_ENDS:  # a program without a fence
        ends = stated = answer.count("```") % 2 == 0
    elif domain in ("math", "code"):
        stated = bool(_FINAL.search(answer) or _NUMBER.fullmatch(last_line))
    else:
        stated = ends and _has_an_end(answer, last_line)
    long_enough = min(1.0, len(words(answer)) / min(20, max(4, len(words(question)) // 2)))
    return 0.5 * stated + 0.3 * ends + 0.2 * long_enough


def _has_an_end(answer: str, last_line: str) -> bool:
    return last_line[-1] in _SENTENCE_ENDS or len(words(answer)) <= FEW_WORDS or bool(_LIST_LINE.match(last_line))


def structural_consistency(answer: str) -> float:
    """1, less a quarter for each of these that does not fit: fences, brackets, step numbers, repeated lines."""
    faults = int(answer.count("```") % 2)
    opened, closed = (sum(answer.count(bracket) for bracket in brackets) for brackets in ("([{", ")]}"))
    alone = len(_CLOSED_ALONE.findall(answer))
    faults += int(not -len(_OPENED_ALONE.findall(answer)) <= closed - opened <= alone)  # kinds mix: [0, 1) is a pair
    steps = [int(number) for number in _NUMBERED.findall(answer)]
    faults += int(bool(steps) and any(b not in (a + 1, 1) for a, b in pairwise(steps)))
    lines = [line.strip() for line in answer.splitlines() if len(line.strip()) > 20]
    faults += int(len(lines) - len(set(lines)) > max(1, len(lines) // 10))
    return 1.0 - faults / 4


def question_and_answer(row: dict) -> tuple[str, str]:
    """The last question of a well-formed row, and its answer: thinking, text and calls."""
    question = next(turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user")
    return question, message_text(row["messages"][-1])


def score_conversation(row: dict) -> Score:
    """Score a well-formed row by its last question and answer.

    Args:
        row: with `messages`, and `domain` where known.
    """
    question, answer = question_and_answer(row)
    called = bool(row["messages"][-1].get("tool_calls"))  # a well-formed call is a whole answer
    return Score(
        density=reasoning_density(answer),
        completeness=1.0 if called else response_completeness(question, answer, row.get("domain") or ""),
        consistency=structural_consistency(answer),
    )


def select_by_quality(
    rows: Sequence[dict], scores: Sequence[Score], keep_share: float, min_completeness: float = 0.5
) -> tuple[list[int], list[tuple[int, str]]]:
    """Keep the best share of each domain.

    Args:
        rows: conversations with `domain`.
        scores: one a row.
        keep_share: share of each domain's rows that stays, from above 0 to 1.
        min_completeness: answers that arrive less than this go whatever else they are.

    Returns:
        tuple: indices kept in rising order, and (index, reason) of the others.

    Raises:
        ValueError: `keep_share` is out of range, or scores and rows differ in number.
    """
    if not 0 < keep_share <= 1:
        raise ValueError(f"keep_share is {keep_share}; use a share above 0 and up to 1")
    if len(rows) != len(scores):
        raise ValueError(f"{len(rows)} rows and {len(scores)} scores; score every row once")
    dropped, by_domain, sizes = [], defaultdict(list), defaultdict(int)
    for index, (row, score) in enumerate(zip(rows, scores, strict=True)):
        domain = row.get("domain") or "unknown"
        sizes[domain] += 1
        if score.completeness < min_completeness:
            dropped.append((index, f"incomplete ({score.completeness:.2f} < {min_completeness})"))
        else:
            by_domain[domain].append((-score.total, index))
    kept = []
    for domain, ranked in by_domain.items():
        ranked.sort()
        limit = max(1, round(keep_share * sizes[domain]))
        kept += [index for _, index in ranked[:limit]]
        dropped += [
            (index, f"score {-negative:.2f} below the best {keep_share:.0%} of {domain}")
            for negative, index in ranked[limit:]
        ]
    return sorted(kept), dropped
