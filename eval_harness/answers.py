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
LONGEST_NUMBER = 100  # characters; a longer one is a model that repeats itself, and Python refuses to read thousands
_SIGN = r"(?<![\w)\]}%])(?P<minus>[-−–]\s?)"
_NUMBER = re.compile(rf"(?:{_SIGN}|(?<![\w)\]}}]))(?:\\?[$€£]\s?(?P<inner>[-−])?)?(?P<digits>{_DIGITS})")
_FRACTION = re.compile(
    rf"(?:{_SIGN})?(?:(?<![\d.])(?P<whole>\d+)\s?)?"
    r"\\[dt]?frac\s*(?:\{\s*(?P<top>-?\d+)\s*\}|(?P<top_digit>\d))\s*(?:\{\s*(?P<bottom>\d+)\s*\}|(?P<bottom_digit>\d))"
)
_SLASH = re.compile(
    r"(?<![\w/.])(?P<minus>[-−])?(?:(?P<whole>\d+)\s)?(?P<top>\d{1,3}(?:,\d{3}){1,9}|\d+)\s*/\s*(?P<bottom>\d+)(?![\w/])"
)
_ANSWER_IS = re.compile(r"(?:answer|result)\s+is\s*:?\s*(?P<rest>[^\n]*)", re.IGNORECASE)
_HASHES = re.compile(r"####[ \t]*(?P<rest>[^\n]*)")
_STATED = re.compile(r"(?:\W*(?:the\s+)?(?:final\s+)?answer\b(?:\s+is\b)?)?\W*(?:[dt]?frac\W*)?\d", re.IGNORECASE)
_ANSWER_LINE = re.compile(
    r"\W*(?:the\s+)?(?:final\s+)?answer[\s*_]{0,4}:[\s*_$\\([{]{0,8}(?:[dt]?frac\{?)?[-−.]?\d", re.IGNORECASE
)
_EXPONENT = re.compile(r"\^(?:\{[^{}]*\}|[-−]?\d+)")
_NUMBERED_HEADING = re.compile(r"\W*\d+[.):]\s+\S")
_BOX = re.compile(r"\\(?:f?boxed|fbox)\s*")
_BOXED_WORD = re.compile(r"(?:[^\s$.,;]|[.,](?=\d))+")
_LETTER_STATED = re.compile(
    r"(?i:(?:answer(?:\s+is|\W{0,3}:)|correct\s+(?:option|choice)\s+is)"
    r"\W*(?:(?:option|choice|text\w*|math\w+|boxed)\W+)*)"
    r"(?:(?P<upper>[A-D])\b|(?P<lower>[a-d])(?=[).]|\W*$))"
)
_LETTER_BOXED = re.compile(r"\W*(?:(?:text|math)\w*\W+)?([A-D])(?:\W*|[.):]+[}\\]*\s.*)", re.DOTALL)
_LETTER_ALONE = re.compile(r"\W*([A-D])\W*")
_LETTER_AND_CHOICE = re.compile(r"\W*([A-D])[.):]+\s.*")


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
    r"""What the last complete `\boxed{…}` (or `\fbox{…}`, or `\boxed x`) holds that is not empty; None for none."""
    closing = _closing_braces(text)
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        if text[start : start + 1] != "{":
            word = _BOXED_WORD.match(text, start)
            if word:
                return word[0]
        elif start in closing and (inside := text[start + 1 : closing[start]].strip()):
            return inside
    return None


def final_number(text: str) -> str:
    r"""A word problem's answer: after `####`, in the last `\boxed{}`, after "answer is" or "Answer:", or the last.

    Where an equation is stated (`12 - 5 = 7 in 2 days`), the number after its last sign counts; an exponent (`25 m^2`)
    is no number. `####` also begins a heading of Markdown (`#### Step 1`, `#### 1. Count`), which is no answer; nor is
    a line "Answer:" with more numbers, which begins the working.

    Args:
        text: everything the model wrote; text after the answer does not matter.

    Returns:
        str: the number in one form (`final_number("The answer is $1,000.00.") == "1000"`), or `INVALID`.
    """
    text = after_thinking(text)
    hashes = [match["rest"] for match in _HASHES.finditer(text)]
    stated = [rest for rest in hashes if _STATED.match(rest) and not _NUMBERED_HEADING.match(rest)]
    stated.append(last_boxed(text) or "")
    stated += [re.split(r"\.\s|\.$", sentence["rest"])[0] for sentence in _ANSWER_IS.finditer(text)]
    stated += [line for line in reversed(text.splitlines()) if _ANSWER_LINE.match(line) and len(_numbers(line)) == 1]
    for part in stated:
        if numbers := _numbers(part.rpartition("=")[2]) or _numbers(part)[-1:]:
            return numbers[0]
    numbers = _numbers(f"\n{text}")
    return numbers[-1] if numbers else INVALID


def _numbers(text: str) -> list[str]:
    """Every number of a text in reading order, each in one form."""
    text = _EXPONENT.sub(" ", text.replace("{,}", ",").replace("\\,", "").replace("\\!", ""))
    found: list[tuple[int, Fraction]] = []
    taken = [False] * len(text)

    def keep(match: re.Match, value: Fraction, negative: bool) -> None:
        if not any(taken[match.start() : match.end()]):
            found.append((match.start(), -value if negative else value))
            taken[match.start() : match.end()] = [True] * (match.end() - match.start())

    for pattern in (_FRACTION, _SLASH):
        for match in pattern.finditer(text):
            parts = match.groupdict()
            top, bottom = parts["top"] or parts["top_digit"], parts["bottom"] or parts["bottom_digit"]
            if len(match[0]) <= LONGEST_NUMBER and int(bottom):
                value = int(parts["whole"] or 0) + Fraction(int(top.replace(",", "")), int(bottom))
                keep(match, value, _is_sign(text, match))
    for match in _NUMBER.finditer(text):
        if len(match["digits"]) <= LONGEST_NUMBER:
            value = Fraction(match["digits"].replace(",", ""))
            keep(match, value, bool(match["inner"]) or _is_sign(text, match))
    return [_written(value) for _, value in sorted(found, key=lambda pair: pair[0])]


def _is_sign(text: str, match: re.Match) -> bool:
    """Whether the dash of a match makes it negative: apart from its number it may be a difference, or a bullet."""
    dash = match["minus"]
    if not dash or not dash[-1].isspace():
        return bool(dash)
    before = text[: match.start()].rstrip(" \t")
    return not before or before[-1] in "=(:[{,"


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


def _closing_braces(text: str) -> dict[int, int]:
    """Where each brace that is closed opens -> where it closes."""
    opened: list[int] = []
    closing = {}
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def hash_answers(responses: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """lm-eval filter: `number_after_hashes` of every response."""
    return [[number_after_hashes(text) for text in texts] for texts in responses]


def final_answers(responses: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """lm-eval filter: `final_number` of every response."""
    return [[final_number(text) for text in texts] for texts in responses]


def letter(text: str) -> str:
    """The letter A-D that a response gives as its answer: after "answer is", else boxed, else alone; or `INVALID`."""
    text = after_thinking(text)
    stated = list(_LETTER_STATED.finditer(text))
    if stated:
        return (stated[-1]["upper"] or stated[-1]["lower"]).upper()
    lines = text.splitlines()
    matches = [_LETTER_BOXED.fullmatch(last_boxed(text) or "")]
    matches += [_LETTER_ALONE.fullmatch(line) for line in reversed(lines)]
    matches += [_LETTER_AND_CHOICE.fullmatch(line) for line in lines if len(lines) == 1]
    return next((match[1] for match in matches if match), INVALID)


def letters(responses: Sequence[Sequence[str]], docs: Sequence[dict]) -> list[list[str]]:
    """lm-eval filter: `letter` of every response."""
    return [[letter(text) for text in texts] for texts in responses]
