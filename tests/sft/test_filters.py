"""Each filter on cases that must go and cases that must stay."""

import json

import numpy
import pytest

from sft.filters import (
    Contamination,
    NearDuplicates,
    conversation_text,
    nearest_by_embedding,
    nested_texts,
    words,
)
from sft.mixing import domain_budgets, fill_budgets, parse_ratios

STORY = (
    "A train leaves the station at nine in the morning and travels north at sixty miles an hour, while a second "
    "train leaves one hour later on the same track and travels at eighty miles an hour. When does the second "
    "catch the first?"
)
REPEATS = {
    "the same text": STORY,
    "other case and punctuation": STORY.upper().replace(",", " -"),
    "one word changed near the end": STORY.replace("catch the first", "reach the first"),
}
OTHERS = {
    "another problem": "A baker sells twelve loaves in the morning and thirty in the afternoon; how many in all, and "
    "how much does she earn when each loaf costs three dollars and every tenth one is given away?",
    "half of it rewritten": STORY[:100] + " It meets a bicycle, a horse and two hikers before it comes to the river, "
    "where the bridge is out, so the journey ends there and everybody walks home in the rain.",
    "a word changed in the middle": STORY.replace("morning", "red blue"),
    "short": "A train leaves.",
    "empty": "",
}


@pytest.mark.parametrize("name", REPEATS)
def test_near_duplicates_go(name):
    seen = NearDuplicates()
    assert seen.add("first", STORY) is None
    assert seen.add("second", REPEATS[name]) == "first"


@pytest.mark.parametrize("name", OTHERS)
def test_other_texts_stay_but_their_copies_go(name):
    seen = NearDuplicates()
    assert seen.add("first", STORY) is None
    assert seen.add("second", OTHERS[name]) is None
    assert seen.add("third", OTHERS[name]) == "second"


def test_texts_of_one_name_are_told_apart():
    seen = NearDuplicates()
    for text in (STORY, OTHERS["another problem"]):
        assert seen.add("train.jsonl:1", text) is None


def test_similarity_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"threshold is 1\.5"):
        NearDuplicates(1.5)


QUESTION = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
SHORT = "Write a function to sort a list of tuples."


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (QUESTION, True),
        (f"Here is a problem. {QUESTION} Solve it.", True),
        ("natalia sold clips to 48 of her friends, in april! and then -- she... left", True),
        ("Natalia sold clips to 48 of her friends in May", False),
        (" ".join(reversed(words(QUESTION))), False),
        (f"Task: {SHORT} Use key=.", True),
        ("Write a function to sort a list of dictionaries by value and print it", False),
        ("four score and seven", False),
        ("", False),
    ],
)
def test_evaluation_text_is_found_by_thirteen_words_or_as_a_whole(text, found):
    assert Contamination([QUESTION, SHORT, "four score"]).found_in(text) is found


ZH = "一個農夫有十七隻羊除了九隻以外都死了請問還剩下幾隻羊在農場裡面"
SPOKEN = {
    "text": {"content": QUESTION},
    "thinking": {"content": "Yes.", "reasoning_content": QUESTION},
    "arguments": {"tool_calls": [{"name": "ask", "arguments": {"q": [{"text": QUESTION}], "n": 2}}]},
    "arguments as text": {
        "content": None,
        "tool_calls": [{"function": {"name": "ask", "arguments": json.dumps({"q": QUESTION.replace(" ", "\n")})}}],
    },
}


@pytest.mark.parametrize("name", SPOKEN)
def test_evaluation_text_is_found_in_all_that_is_said(name):
    row = {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant"} | SPOKEN[name]]}
    assert Contamination([QUESTION]).found_in(conversation_text(row))
    assert not Contamination([QUESTION.replace(" in ", " of ")]).found_in(conversation_text(row))


def test_the_same_words_after_other_thoughts_or_with_other_calls_are_no_duplicates():
    thoughts = [
        "First find the rate, then the head start, then divide. " * 3,
        "A picture of both trains helps here. " * 4,
    ]
    seen = NearDuplicates()
    for name, thought in enumerate(thoughts):
        row = {"messages": [{"role": "assistant", "content": "At noon.", "reasoning_content": thought}]}
        assert seen.add(f"thought {name}", conversation_text(row)) is None
    for number in (1, 2):
        call = {"name": "add", "arguments": {"a": number, "b": 10.5 * number}}
        row = {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "tool_calls": [call]}]}
        assert seen.add(f"call {number}", conversation_text(row)) is None


def test_chinese_is_compared_by_its_characters():
    assert words("GPT-4：農場裡 ひと") == ["gpt", "4", "農", "場", "裡", "ひ", "と"]
    assert Contamination([ZH]).found_in("題目 " + ZH[5:] + "？")
    assert not Contamination([ZH]).found_in("題目 " + ZH[::-1])
    seen = NearDuplicates()
    assert seen.add("first", ZH * 3) is None
    assert seen.add("second", ZH * 3 + "呢") == "first"
    assert seen.add("third", ZH[::-1] * 3) is None


def test_nested_texts_come_in_order():
    value = {"a": ["x", 1, {"b": "y"}], "c": (None, True, 2.5, "z")}
    assert list(nested_texts(value)) == ["x", "1", "y", "2.5", "z"]
    deep: list = ["end"]
    for _ in range(100_000):
        deep = [deep]
    assert list(nested_texts(deep)) == ["end"]


def test_texts_of_too_few_words_are_not_looked_for():
    seven = "You have all the time you need"
    assert Contamination(["yes", seven, f"{seven} now"]).num_texts == 1


def test_rows_that_mean_the_same_are_found_by_their_embeddings():
    rows = numpy.array([[1.0, 0.0], [0.0, 2.0], [10.0, 0.1], [-1.0, 0.0], [0.0, 1.0]])
    assert nearest_by_embedding(rows, threshold=0.99) == {2: 0, 4: 1}


def test_rows_are_compared_over_blocks_as_one_by_one():
    generator = numpy.random.default_rng(0)
    rows = generator.normal(size=(700, 8))
    for copy, original in ((5, 2), (300, 299), (301, 299), (600, 10), (699, 5)):
        rows[copy] = 3 * rows[original] + 1e-6
    similarity = rows @ rows.T / numpy.outer(*[numpy.linalg.norm(rows, axis=1)] * 2)
    expected, kept = {}, []
    for index in range(700):
        near = [other for other in kept if similarity[index, other] >= 0.9]
        if near:
            expected[index] = max(near, key=lambda other: similarity[index, other])
        else:
            kept.append(index)
    assert nearest_by_embedding(rows, threshold=0.9) == expected
    assert expected.items() >= {5: 2, 300: 299, 301: 299, 600: 10, 699: 2}.items()
    assert nearest_by_embedding(rows[:0], threshold=0.9) == {}


def test_ratios_are_scaled_to_one():
    assert parse_ratios(["math=1", "code=3"]) == {"math": 0.25, "code": 0.75}


@pytest.mark.parametrize(
    "pairs", [["math"], ["math=0"], ["=1"], ["math=x"], ["math=1", "math=2"], ["math=nan"], ["math=inf"]]
)
def test_bad_ratios_are_named(pairs):
    with pytest.raises(ValueError, match="is not a new domain=share"):
        parse_ratios(pairs)


def test_scarcest_domain_sets_the_total():
    budgets = domain_budgets({"a": 1000, "b": 100}, {"a": 0.8, "b": 0.2})
    assert budgets == {"a": 400, "b": 100}
    assert domain_budgets({"a": 1000, "b": 100}, {"a": 0.8, "b": 0.2}, 250) == {"a": 200, "b": 50}
    with pytest.raises(ValueError, match=r"but b has 100 tokens, enough for 500 in all"):
        domain_budgets({"a": 1000, "b": 100}, {"a": 0.8, "b": 0.2}, 501)
    with pytest.raises(ValueError, match=r"ratios name the domains \['a'\] and the data has \['a', 'b'\]"):
        domain_budgets({"a": 1000, "b": 100}, {"a": 1.0})


def test_a_budget_is_used_up():
    assert fill_budgets(["a", "a", "a"], [4, 4, 4], {"a": 8}, seed=0)[1] in ([0], [1], [2])


def test_ratios_hold_by_tokens_and_not_by_rows():
    generator = numpy.random.default_rng(0)
    domains = ["short"] * 3000 + ["long"] * 300
    tokens = [*generator.integers(5, 15, 3000).tolist(), *generator.integers(500, 1500, 300).tolist()]
    budgets = domain_budgets({"short": sum(tokens[:3000]), "long": sum(tokens[3000:])}, {"short": 0.5, "long": 0.5})
    kept, left = fill_budgets(domains, tokens, budgets, seed=3)
    used = {name: sum(tokens[index] for index in kept if domains[index] == name) for name in budgets}
    assert sorted(kept + left) == list(range(3300))
    for name, budget in budgets.items():
        assert budget - 1500 < used[name] <= budget
    assert used["short"] / (used["short"] + used["long"]) == pytest.approx(0.5, abs=0.02)
    assert fill_budgets(domains, tokens, budgets, seed=3) == (kept, left)
    assert fill_budgets(domains, tokens, budgets, seed=4) != (kept, left)
