r"""Answers are found whatever stands around them: commas, units, LaTeX, text after the answer, several boxes."""

import json
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_harness.answers import (
    INVALID,
    after_thinking,
    final_number,
    first_number,
    last_boxed,
    letter,
    number_after_hashes,
)

WHOLE = st.integers(-(10**12), 10**12)
WORDS = st.text(alphabet="abcdefghij ,;'\n", max_size=30)
UNITS = st.sampled_from(["", " dollars", " apples.", "%", r"\%", r"\text{ cm}", " km/h", "!", "."])


def written_forms(value: int) -> list[str]:
    sign, size = "-" if value < 0 else "", abs(value)
    return [f"{value}", f"{value:,}", f"{sign}${size:,}", f"{value}.00", f"{sign}{size:,}".replace(",", "{,}")]


@given(WHOLE, st.integers(0, 4), UNITS, WORDS, WORDS)
def test_one_number_in_every_place_it_may_stand(value, form, unit, before, after):
    text = written_forms(value)[form] + unit
    assert number_after_hashes(f"{before}\n#### {text}\n{after} 99") == str(value)
    assert final_number(f"{before} 7 8 9 \n#### {text}\nQ: 99 {after}") == str(value)
    assert final_number(f"{before} so \\boxed{{{text}}} {after} and 12 more") == str(value)
    assert final_number(f"{before} 5. The answer is {text}\n\n{after}\nQ: 99?") == str(value)
    assert final_number(f"<think>The answer is 4.</think>\n{before} it makes {text}") == str(value)


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4))
def test_fractions_in_every_form_are_one_value(top, bottom):
    sign = "-" if top < 0 else ""
    forms = [f"{sign}\\frac{{{abs(top)}}}{{{bottom}}}", f"\\dfrac{{{top}}}{{{bottom}}}", f"{top}/{bottom}"]
    values = {first_number(form) for form in forms}
    assert len(values) == 1
    assert Fraction(values.pop()) == Fraction(top, bottom)


@given(st.decimals(-(10**6), 10**6, allow_nan=False, places=3))
def test_decimals_keep_their_value_and_lose_their_zeros(value):
    written = first_number(f"{value:f}")
    assert Fraction(written) == Fraction(value)
    assert "." not in written or not written.endswith("0")


@given(st.lists(WHOLE, min_size=2, max_size=5))
def test_the_last_of_several_boxes_counts(values):
    assert last_boxed(" then ".join(f"\\boxed{{{value}}}" for value in values)) == str(values[-1])


@given(st.text(max_size=200))
def test_no_text_breaks_the_extraction(text):
    assert isinstance(final_number(text), str)
    assert isinstance(letter(text), str)
    assert last_boxed(text) is None or isinstance(last_boxed(text), str)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is -0.", "0"),
        ("#### -0.0", "0"),
        ("#### 50%", "50"),
        (r"\boxed{50\%}", "50"),
        (r"\boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{1\frac{1}{2}}", "1.5"),
        (r"\boxed{x = 12}", "12"),
        ("The answer is 10 - 3 = 7.", "7"),
        ("He has 10-3=7", "7"),
        ("$-5", "-5"),
        ("-$5", "-5"),
        ("between 1,2 and 3", "3"),
        ("The answer is 3.5 hours. Next, 8.", "3.5"),
        ("It costs 1,234,567.50 dollars", "1234567.5"),
        ("#### 1/3", "1/3"),
        ("#### Step 1: count the eggs\n9 * 2 = 18\n#### Result\n\\boxed{18}", "18"),
        ("#### 1. Count the eggs\n16 - 7 = 9\n#### 2. Sell them\n9 * 2 makes 18", "18"),
        ("#### Final answer: 18 eggs\nThat is 3 boxes.", "18"),
        ("#### 10 + 8 = 18", "18"),
        (r"\boxed{x = 18 \text{ dollars in 9 days}}", "18"),
        (r"\boxed{A = 5 \times 5 = 25 \text{ m}^2}", "25"),
        ("The answer is 18 = x", "18"),
        ("So its volume is 125 cm^3 and its area 25 m^{2}.", "25"),
        ("**Answer:** $72\n\nExplanation: 48/2 = 24.", "72"),
        ("Answer: 71\nThat forgets one.\nAnswer: 72\n(8 * 9)", "72"),
        ("Answer: 16 eggs minus 7 is 9.\n9 * 2 makes 18", "18"),
        (r"so \boxed{18}, as was asked within \boxed{}. 7", "18"),
        ("The answer is 18 dollars for 9 eggs. 9 * 2 = 18, not 20", "18"),
        ("The total is:\n- 18 dollars", "18"),
        ("- 18 dollars", "18"),
        ("Total – $18", "18"),
        ("from 5%–10%", "10"),
        ("so x = - 5", "-5"),
        (r"\boxed{- 5}", "-5"),
        (r"he keeps 5 - \frac{1}{2}", "0.5"),
        ("it takes 2 1/2 hours", "2.5"),
        ("1,000/4", "250"),
        ("not 7/0", "0"),
        (r"\boxed 1,000", "1000"),
        ("room B12", INVALID),
        ("nothing", INVALID),
        ("", INVALID),
    ],
)
def test_forms_that_occur(text, number):
    assert final_number(text) == number


def test_a_model_that_repeats_itself_ends_no_run_and_costs_no_minutes():
    """Ten thousand times the same, as greedy decoding may give it; limited in processor time, whatever else runs."""
    repeated = dict.fromkeys(("1", ",111", "\n", " ", "- ", "\\boxed{", "the answer is ", "#", "answer:", "^{"), "0.5")
    repeated["\\frac{1}{"] = "1"
    expected = {f"0.5 {piece * 10_000}": number for piece, number in repeated.items()}
    long = "1" * 10_000  # a number that nobody means: passed over
    expected |= {f"{long}/2": "2", f"\\frac{{{long}}}{{2}}": "2"}
    code = (
        "import json, resource\nresource.setrlimit(resource.RLIMIT_CPU, (15, 15))\n"
        "from eval_harness.answers import final_number, letter\n"
        f"print(json.dumps([(final_number(text), letter(text)) for text in {list(expected)!r}]))"
    )
    done = subprocess.run([sys.executable, "-"], input=code, text=True, check=True, stdout=subprocess.PIPE)
    assert json.loads(done.stdout) == [[number, INVALID] for number in expected.values()]


def test_hashes_without_a_number_are_no_answer():
    assert number_after_hashes("12 and ####\n7") == INVALID
    assert number_after_hashes("The answer is 12") == INVALID


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{\frac{a}{b}} and then \boxed{c", r"\frac{a}{b}"),
        (r"\boxed 7 is it", "7"),
        (r"\fbox{8}", "8"),
        (r"\boxed{9} \boxed{ }", "9"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("no box", None),
    ],
)
def test_boxes(text, expected):
    assert last_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is B.", "B"),
        ("the answer is (c)", "C"),
        ("The answer is **D**", "D"),
        (r"so \boxed{A}", "A"),
        (r"so \boxed{\text{C}}", "C"),
        ("B", "B"),
        ("A\nNo, rather:\nB", "B"),
        ("First I thought the answer is A. But the answer is D", "D"),
        ("<think>The answer is A</think>The answer is C", "C"),
        ("The answer is Apple", INVALID),
        ("A nice day", INVALID),
        ("The answer is B, since the answer is a prime number", "B"),
        ("the answer is a.", "A"),
        ("**Answer: B**", "B"),
        ("The correct answer is option (C).", "C"),
        ('The answer is "B"', "B"),
        ("The answer is:\n\n**B. Paris**", "B"),
        (r"so $\boxed{\textbf{(B)}}$", "B"),
        (r"so \boxed{B. Paris}", "B"),
        (r"so \boxed{A + 1}", INVALID),
        (r"so \boxed{\textbf{(B)}\ 5}", "B"),
        (r"so \boxed{\text{A} + 1}", INVALID),
        ("The correct option is **B**.", "B"),
        ("The correct choice is a matter of taste.", INVALID),
        ("(B) Paris", "B"),
        ("A. Rome is wrong.\nB. Paris is right.", INVALID),
    ],
)
def test_letters(text, expected):
    assert letter(text) == expected


def test_thinking_is_not_read():
    assert after_thinking("<think>5</think> 6") == " 6"
    assert after_thinking("4</think> 5</think> 6") == " 6"
    assert after_thinking("5") == "5"
