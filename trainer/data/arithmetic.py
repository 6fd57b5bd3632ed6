"""Worked arithmetic in GSM8K's answer format, from a seed: practice text, conversations and a held-out test.

Every problem shows its columns, so that a very small model can learn the steps instead of a table of answers. Whether
a problem belongs to the training or the held-out split is decided by a hash of its operands: no held-out sum is ever
trained on, in any wording or as a step of a longer problem. Ranges, wordings and the 10% held out are ours
(assumption).
"""

import hashlib
import random
from dataclasses import dataclass

KINDS = ("add", "subtract", "multiply", "two_step")
HELDOUT_PERCENT = 10

_NAMES = ("Ada", "Ben", "Chloe", "Dan", "Eva", "Finn", "Grace", "Hugo", "Iris", "Jun", "Kira", "Leo", "Mina", "Noah")
_THINGS = ("apples", "books", "coins", "stones", "cards", "pens", "shells", "stamps", "marbles", "eggs")
_WORDINGS = {
    "add": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "What is {a} + {b}?",
    ),
    "subtract": (
        "{name} has {a} {things} and gives away {b}. How many {things} are left?",
        "What is {a} - {b}?",
    ),
    "multiply": (
        "{name} buys {b} boxes with {a} {things} in each. How many {things} is that?",
        "What is {a} * {b}?",
    ),
    "two_step": (
        "{name} has {a} {things}, gets {b} more and gives away {c}. How many {things} are left?",
        "What is {a} + {b} - {c}?",
    ),
}


@dataclass(frozen=True)
class Problem:
    """One worked problem; `solution` ends with `#### {answer}`."""

    kind: str
    question: str
    solution: str
    answer: int


def generate_problems(
    seed: int,
    count: int,
    split: str = "train",
    kinds: tuple[str, ...] = KINDS,
    min_operand: int = 1,
    max_operand: int = 99,
    words: bool = True,
) -> list[Problem]:
    """Draw `count` problems.

    Args:
        seed: fixes the whole list.
        count: number of problems.
        split: "train" or "heldout"; disjoint by the operands.
        kinds: which of `KINDS` to draw from, in equal parts.
        min_operand: smallest operand of a sum; 10 to 99 gives columns that all look alike, the easiest to learn.
        max_operand: largest operand of a sum.
        words: dress half of the problems as stories; otherwise all are formulas.

    Returns:
        list[Problem]: in drawing order; wordings repeat, operands may.

    Raises:
        ValueError: an unknown split or kind, or an operand range with nothing in it.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split is {split!r}; use 'train' or 'heldout'")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"kinds is {kinds!r}; use some of {KINDS}")
    if min_operand < 1 or max_operand < min_operand + 8:
        raise ValueError(
            f"min_operand {min_operand} and max_operand {max_operand} leave too few problems to hold some out; "
            "use 1 or more, and 8 or more between them"
        )
    rng = random.Random(f"{seed}/{split}")
    problems = []
    while len(problems) < count:
        kind = kinds[len(problems) % len(kinds)]
        operands = _draw_operands(rng, kind, min_operand, max_operand)
        wanted = is_heldout(kind, operands) if split == "heldout" else not _shows_heldout(kind, operands)
        if wanted:
            problems.append(_make_problem(rng, kind, operands, words))
    return problems


def is_heldout(kind: str, operands: tuple[int, ...]) -> bool:
    """Whether these operands are kept for testing; a sum and its mirror image share their side."""
    key = sorted(operands) if kind in ("add", "multiply") else operands
    digest = hashlib.sha256(f"{kind}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELDOUT_PERCENT


def _shows_heldout(kind: str, operands: tuple[int, ...]) -> bool:
    """Whether the problem, or a step of its solution, is held out."""
    steps = [(kind, operands)]
    if kind == "two_step":
        a, b, c = operands
        steps += [("add", (a, b)), ("subtract", (a + b, c))]
    return any(is_heldout(*step) for step in steps)


def _draw_operands(rng: random.Random, kind: str, smallest: int, largest: int) -> tuple[int, ...]:
    a, b = rng.randint(smallest, largest), rng.randint(smallest, largest)
    if kind == "subtract":
        return max(a, b), min(a, b)
    if kind == "multiply":
        return a, rng.randint(2, 9)
    if kind == "two_step":
        return a, b, rng.randint(1, a + b)
    return a, b


def _make_problem(rng: random.Random, kind: str, operands: tuple[int, ...], words: bool) -> Problem:
    wording = rng.choice(_WORDINGS[kind] if words else _WORDINGS[kind][1:])
    values = dict(zip("abc", operands, strict=False))
    question = wording.format(name=rng.choice(_NAMES), things=rng.choice(_THINGS), **values)
    if kind == "two_step":
        a, b, c = operands
        steps = [_add(a, b), _subtract(a + b, c)]
        answer = a + b - c
    else:
        step = {"add": _add, "subtract": _subtract, "multiply": _multiply}[kind]
        steps = [step(*operands)]
        a, b = operands
        answer = {"add": a + b, "subtract": a - b, "multiply": a * b}[kind]
    return Problem(kind, question, "\n".join([*steps, f"#### {answer}"]), answer)


def _add(a: int, b: int) -> str:
    """Columns from the right, each total with its carry: `27 + 48: 7 + 8 + 0 = 15, 2 + 4 + 1 = 07, so … = 75.`"""
    columns, carry = [], 0
    for digit_a, digit_b in _columns(a, b):
        total = digit_a + digit_b + carry
        columns.append(f"{digit_a} + {digit_b} + {carry} = {total:02d}")
        carry = total // 10
    return f"{a} + {b}: {', '.join(columns)}, so {a} + {b} = {a + b}."


def _subtract(a: int, b: int) -> str:
    """Columns from the right, ten borrowed where the upper digit is too small: `11 - 9 = 2, 08 - 6 = 2` (a >= b)."""
    columns, borrow = [], 0
    for digit_a, digit_b in _columns(a, b):
        upper = digit_a - borrow
        borrow = int(upper < digit_b)
        columns.append(f"{upper + 10 * borrow:02d} - {digit_b} = {upper + 10 * borrow - digit_b}")
    return f"{a} - {b}: {', '.join(columns)}, so {a} - {b} = {a - b}."


def _multiply(a: int, b: int) -> str:
    """Tens and ones apart: `47 * 3: 40 * 3 = 120, 7 * 3 = 21, so 47 * 3 = 141.`"""
    tens, ones = a - a % 10, a % 10
    return f"{a} * {b}: {tens} * {b} = {tens * b}, {ones} * {b} = {ones * b}, so {a} * {b} = {a * b}."


def _columns(a: int, b: int) -> list[tuple[int, int]]:
    """Digits of both numbers, ones first, the shorter one filled with zeros."""
    width = max(len(str(a)), len(str(b)))
    return [(a // 10**place % 10, b // 10**place % 10) for place in range(width)]
