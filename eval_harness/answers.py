r"""Take the answer out of what a model wrote: numbers after `####`, in `\boxed{}`, after "the answer is", or the last.

A number becomes an exact fraction and is written back in one form, so that `1,000`, `$1000.00` and `1000 dollars`
are one answer, and so are `-0` and `0`, `50%` and `50`, `\frac{3}{4}` and `0.75`.
"""

import re
from collections.abc import Sequence
from fractions import Fraction

INVALID = "[invalid]"
THINKING_END = "</think>"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w)\]}}])(?P<minus>[-−–]\s?)?(?:\\?[$€£]\s?(?P<inner>[-−])?)?(?P<digits>{_DIGITS})")
_FRACTION = re.compile(
    r"(?P<minus>[-−])?\s*(?P<whole>\d+\s*)?\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"
)
_SLASH = re.compile(r"(?<![\w/.])(?P<minus>[-−])?(\d+)\s*/\s*(\d+)(?![\w/])")
_ANSWER_IS = re.compile(r"(?:answer|result)\s+is\s*:?\s*(?P<rest>[^\n]*)", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(?P<rest>[^\n]*)")


def after_thinking(text: str) -> str:
    """What follows the model's thinking; everything when it did not think aloud."""
    return text.rsplit(THINKING_END, 1)[-1]


def number_after_hashes(text: str) -> str:
    """The number after the first `####`, in one form; `INVALID` where there is none."""
    found = _HASHES.search(after_thinking(text))
    return first_number(found["rest"]) if found else INVALID


def first_number(text: str) -> str:
    """The first number of a short text, in one form; `INVALID` where there is none."""
    numbers = _numbers(text)
    return numbers[0] if numbers else INVALID


def last_boxed(text: str) -> str | None:
    r"""What the last complete `\boxed{…}` (or `\fbox{…}`, or `\boxed x`) holds; None where there is none."""
    for start in reversed([match.end() for match in re.finditer(r"\\f?boxed|\\fbox", text)]):
        rest = text[start:].lstrip()
        if not rest.startswith("{"):
            word = re.match(r"[^\s$.,;]+", rest)
            if word:
                return word[0]
            continue
        end = _closing_brace(rest)
        if end is not None:
            return rest[1:end].strip()
    return None


def final_number(text: str) -> str:
    r"""A word problem's answer: after `####`, in the last `\boxed{}`, after "answer is", or the last number.

    Args:
        text: everything the model wrote; text after the answer does not matter.

    Returns:
        str: the number in one form (`final_number("The answer is $1,000.00.") == "1000"`), or `INVALID`.
    """
    text = after_thinking(text)
    hashes = _HASHES.search(text)
    if hashes and _numbers(hashes["rest"]):
        return _numbers(hashes["rest"])[0]
    boxed = last_boxed(text)
    if boxed is not None and _numbers(boxed):
        return _numbers(boxed)[-1 if "=" in boxed else 0]
    for sentence in _ANSWER_IS.finditer(text):
        numbers = _numbers(re.split(r"\.\s|\.$", sentence["rest"])[0])
        if numbers:
            return numbers[-1] if "=" in sentence["rest"] else numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else INVALID


def _numbers(text: str) -> list[str]:
    """Every number of a text in reading order, each in one form."""
    text = text.replace("{,}", ",").replace("\\,", "").replace("\\!", "")
    found: list[tuple[int, Fraction]] = []
    taken = [False] * len(text)

    def keep(match: re.Match, value: Fraction) -> None:
        if not any(taken[match.start() : match.end()]):
            found.append((match.start(), value))
            taken[match.start() : match.end()] = [True] * (match.end() - match.start())

    for match in _FRACTION.finditer(text):
        top, bottom = match[3] or match[4], int(match[5] or match[6])
        if bottom:
            value = Fraction(int(match["whole"] or 0)) + Fraction(int(top), bottom)
            keep(match, -value if match["minus"] else value)
    for match in _SLASH.finditer(text):
        if int(match[3]):
            value = Fraction(int(match[2]), int(match[3]))
            keep(match, -value if match["minus"] else value)
    for match in _NUMBER.finditer(text):
        value = Fraction(match["digits"].replace(",", ""))
        keep(match, -value if match["minus"] or match["inner"] else value)
    return [_written(value) for _, value in sorted(found, key=lambda pair: pair[0])]


def _written(value: Fraction) -> str:
    """`7`, `-2.5`, or `1/3` where no finite decimal exists."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    scaled = str(abs(value.numerator * 10**digits // value.denominator)).rjust(digits + 1, "0")
    return f"{'-' if value < 0 else ''}{scaled[:-digits]}.{scaled[-digits:]}"


def _closing_brace(text: str) -> int | None:
    """Where the brace that opens `text` closes."""
    depth = 0
    for position, character in enumerate(text):
        if character == "{" and text[position - 1 : position] != "\\":
            depth += 1
        elif character == "}" and text[position - 1 : position] != "\\":
            depth -= 1
            if depth == 0:
                return position
    return None


def hash_answers(responses: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """lm-eval filter: `number_after_hashes` of every response."""
    return [[number_after_hashes(text) for text in texts] for texts in responses]


def final_answers(responses: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """lm-eval filter: `final_number` of every response."""
    return [[final_number(text) for text in texts] for texts in responses]


def letter(text: str) -> str:
    """The letter A-D that a response gives as its answer: after "answer is", else boxed, else alone; or `INVALID`."""
    text = after_thinking(text)
    stated = re.findall(r"answer\s+is:?\s*\**\(?\\?(?:text|boxed)?\{?([A-D])\b", text, re.IGNORECASE)
    if stated:
        return stated[-1].upper()
    boxed = re.fullmatch(r"(?:\\text\{)?\(?([A-D])\)?\}?\.?", last_boxed(text) or "")
    alone = re.findall(r"^\W*([A-D])\W*$", text, re.MULTILINE)
    return boxed[1] if boxed else alone[-1] if alone else INVALID


def letters(responses: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """lm-eval filter: `letter` of every response."""
    return [[letter(text) for text in texts] for texts in responses]
