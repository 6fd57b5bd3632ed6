r"""Score MATH: the final expression a model wrote against the one the reference solution boxes.

Two metrics. `exact_match`: both are the same text after Minerva's normalisation (lm-eval's implementation).
`math_verify`: both are the same mathematical object (the math-verify library), so `0.5` and `\frac{1}{2}` agree.
"""

import re

import datasets
from lm_eval.tasks.minerva_math.utils import normalize_final_answer
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from eval_harness.answers import INVALID, after_thinking, last_boxed

_CLOSING = re.compile(r"final answer is:?((?:(?!final answer is).)*?)I hope it is correct", re.IGNORECASE | re.DOTALL)
_ANSWER = re.compile(
    r"\banswer(?:\s+is|\**\s*:)[*:]*\s*(\\\[[\s\S]*?\\\]|\$\$[\s\S]*?\$\$|.*?)(?:\.\s|[.,]?$)",
    re.IGNORECASE | re.MULTILINE,
)
_DELIMITERS = (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_LAST_STOP = re.compile(r"(?:(?<!\\)[.,;])+$")
_BASE = re.compile(r"^-?[0-9A-Z.]+_\{?(\d+)\}?(?:\D|$)")
_BARE_FRACTION = re.compile(r"\\[dt]?frac\s*(\\[a-zA-Z]+|[^\s{\\])\s*(\\[a-zA-Z]+|[^\s{\\])")
_THIN_SPACE = re.compile(r"(?<=\d)\\,(?=\d{3}(?!\d))")
_NEGATIVE_SPACE = re.compile(r"(?<=,)\\!(?=\d)")
_SPACE = re.compile(r"\\[,;:!]")
_MIXED_NUMBER = re.compile(r"(-?\d+)(?:\s|\\\s)(\d+)/(\d+)")
TIMEOUT_SECONDS = 30  # assumption; the library's 5 make a score depend on how busy the machine is
_MATHEMATICS = (LatexExtractionConfig(), ExprExtractionConfig())


def add_answers(dataset: datasets.Dataset) -> datasets.Dataset:
    """lm-eval `process_docs`: the column `answer`, what the reference solution boxes last."""
    return dataset.add_column("answer", [last_boxed(solution) or INVALID for solution in dataset["solution"]])


def final_expression(text: str) -> str:
    r"""What a solution gives as its answer: Minerva's closing sentence, else the last `\boxed{}`, else "answer is"."""
    text = after_thinking(text)
    closings = [sentence for sentence in _CLOSING.findall(text) if _bare(sentence)]
    if closings:
        boxed = last_boxed(closings[-1])
        return _bare(closings[-1] if boxed is None else boxed)
    boxed = last_boxed(text)
    if boxed is not None:
        return _bare(boxed)
    stated = filter(None, map(_bare, reversed(_ANSWER.findall(text))))
    return next(stated, INVALID)


def score(doc: dict, results: list[str]) -> dict[str, float]:
    """lm-eval `process_results`: both metrics of one response; 0 where it states no answer."""
    stated, gold = final_expression(results[0]), _bare(doc["answer"])
    exact = stated != INVALID and normalize_final_answer(stated) == normalize_final_answer(gold)
    return {"exact_match": float(exact), "math_verify": float(exact or same_object(gold, stated))}


def same_object(gold: str, stated: str) -> bool:
    r"""Whether two LaTeX expressions denote the same object, as far as math-verify can tell.

    math-verify overlooks the base of a number (`12_3` and `12_4` are equal to it), so different bases are told apart
    here; and it misreads `\frac \pi4`, `10\,000`, `9,000\,\text{cm}` and `1 1/2`, which are written plainly first.
    """
    if stated == INVALID:
        return False
    bases = [_BASE.search(expression) for expression in (gold, stated)]
    if all(bases) and bases[0][1] != bases[1][1]:
        return False
    return bool(verify(_parsed(gold), _parsed(stated), timeout_seconds=TIMEOUT_SECONDS))


def _parsed(expression: str) -> list:
    plain = _THIN_SPACE.sub("", _BARE_FRACTION.sub(r"\\frac{\1}{\2}", expression))
    plain = _SPACE.sub(" ", _NEGATIVE_SPACE.sub("", plain))
    if mixed := _MIXED_NUMBER.fullmatch(plain.strip()):
        plain = rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    return parse(f"${plain}$", extraction_config=_MATHEMATICS, parsing_timeout=TIMEOUT_SECONDS)


def _bare(text: str) -> str:
    """An expression without the full stop or comma after it and the marks of mathematics or emphasis around it."""
    text = _LAST_STOP.sub("", text.strip()).strip()
    for opening, closing in _DELIMITERS:
        inner = text[len(opening) : -len(closing)]
        if text == f"{opening}{inner}{closing}" and opening not in inner and inner.strip():
            return _bare(inner)
    return text
