"""Equations between whole numbers in a text: which of them stand alone, and which of those are false.

An equation is taken only where nothing beside it can belong to it: `10 / 2 + 3 = 8`, `1,000 + 5 = 1,005`, `half of
10 + 4 = 9`, `7 + 8 = 3 mod 12` and `20 + 40 = 1 hour` are true, and no part of them may be read as false.
"""

import re

# Up to 15 digits and 20 terms; longer ones are passed over.
_NUMBER = r"\d{1,15}+(?!(?:[.,:]|,?\\!|\{,\})?\d)"
# Signs of arithmetic beside those that are computed.
_SIGNS = "/⁄∕^÷·⋅∙•∗±−–%√"
_EQUATION = re.compile(
    # Not after a digit, letter, operator, bracket's end, comma or point that touches it.
    rf"(?<![\w.,:!*+×{_SIGNS})\]}}\\-])(-?{_NUMBER}(?: ?[-+*×] ?-?{_NUMBER}){{1,20}}+) ?= ?(-?{_NUMBER})"
    # Not before an operator, letter or bracket that goes on.
    rf"(?! ?(?:[\w*+×{_SIGNS}!°(\[{{-]|\\[a-z]))"
)
# Before the equation, with a space between: an operator, dots, a number, or a word that takes it into an expression.
_GOES_ON = re.compile(
    rf"(?:[-+*×{_SIGNS})\]}}\\|…\d½¼¾]|\.\.|\\[a-z]+|\b(?:[^\W\d_]|and|by|cube|cubed|double|half|less|minus|mod|modulo|"
    r"of|over|per|plus|quarter|squared|square|than|third|thrice|times|triple|twice))\Z",
    re.IGNORECASE,
)
_LINE_GOES_ON = re.compile(rf"[-+*×{_SIGNS}]\Z")
_TERM = re.compile(r"([-+*×]?)(-?\d+)")
_CONTEXT_CHARACTERS = 40


def false_equation(text: str) -> str | None:
    """The first equation of a text that stands alone and is false, or None.

    Args:
        text: sums, differences and products of whole numbers are looked at; all else is passed over.
    """
    for match in _EQUATION.finditer(text):
        before = text[max(0, match.start() - _CONTEXT_CHARACTERS) : match.start()]
        if value_of(match[1]) != int(match[2]) and not _is_continued(before, match[1]):
            return match[0]
    return None


def _is_continued(before: str, equation: str) -> bool:
    """Whether what stands before an equation belongs to it."""
    line = before.rpartition("\n")[2]
    if not line.strip():
        return equation.startswith("-") or bool(_LINE_GOES_ON.search(before.rstrip()))
    return _GOES_ON.search(line.rstrip()) is not None or (equation.startswith("-") and line.rstrip()[-1].isalnum())


def value_of(expression: str) -> int:
    """Value of `a + b - c * d …`, products first.

    Args:
        expression: whole numbers, which may be negative, between `+`, `-`, `*` or `×`.
    """
    total, product = 0, 0
    for operator, number in _TERM.findall(expression.replace(" ", "")):
        if operator in ("*", "×"):
            product *= int(number)
        else:
            total, product = total + product, -int(number) if operator == "-" else int(number)
    return total + product
