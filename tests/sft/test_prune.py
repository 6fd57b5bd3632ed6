"""Pruning drops each kind of poor row for its reason, keeps what people wrote and every skill, and shows its work."""

import json
from html.parser import HTMLParser

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.chat import encode_conversations
from sft.data import read_rows
from sft.prune import PruneConfig, Reading, main, prune, read_conversations, write_pruned


def row(question: str, answer: str, skill: str = "sums", origin: str = "program") -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": "math", "skill": skill, "origin": origin}


def solved(number: int, **more) -> dict:
    words = ["red", "green", "blue", "black", "white", "brown", "pink"]
    question = (
        f"{words[number % 7]} {words[number * 3 % 7]} {number} boxes and {number * 31} {words[number % 5]} more?"
    )
    return row(question, f"Adding gives {number} + {number * 31} = {number * 32}.\n#### {number * 32}", **more)


def config(**changes) -> PruneConfig:
    return PruneConfig(**({"train_files": ["t"], "output_dir": "o"} | changes))


def test_each_poor_row_goes_for_its_reason_and_people_s_rows_stay():
    rows = [
        solved(11),
        row("What is 2 + 2?", "Adding gives 2 + 2 = 5.\n#### 5"),
        row("What is 3 + 4?", "Adding 3 + 4 ="),
        row("What is 3 + 5?", "1. Add 3 + 5 = 8 (so\n2. done\n7. ok\n#### 8"),
        solved(11),
        row("What is 2 + 3?", "2 + 3 = 6\n#### 6", origin="human"),
        solved(12),
    ]
    decisions = prune([f"r:{n}" for n in range(len(rows))], rows, config())
    assert [decision.reason for decision in decisions] == [
        "kept",
        "incoherent: 2 + 2 = 5 is false",
        "malformed: completeness 0.15",
        "incoherent: consistency 0.50",
        "near-duplicate of r:0",
        "written by a person",
        "kept",
    ]
    assert [decision.kept for decision in decisions] == [True, False, False, False, False, True, True]


def test_a_row_repeats_only_what_stays():
    """Neither a row that went nor the place of a person's row decides on another one."""
    right, wrong = solved(11), solved(11)
    wrong["messages"][1]["content"] = right["messages"][1]["content"].replace("11 + 341 = 352", "11 + 341 = 353")
    rows = [wrong, right, solved(12), solved(12, origin="human"), solved(13), solved(14, origin="human")]
    embeddings = numpy.array([[0.0, 9], [9, 0], [0, -9], [0, -9], [9, 1], [9, 1]])
    reading = Reading(numpy.full(6, 0.5), numpy.ones(6), embeddings)
    decisions = prune(list("abcdef"), rows, config(keep_share=1.0), reading)
    assert [decision.reason for decision in decisions] == [
        "incoherent: 11 + 341 = 353 is false",
        "kept",
        "near-duplicate of d",
        "written by a person",
        "means the same as f",
        "written by a person",
    ]


@pytest.mark.parametrize(
    ("answer", "domain", "kept"),
    [
        ("We have 10 / 2 + 3 = 8.\n#### 8", "math", True),
        ("Here 1,000 + 5 = 1,005, whose last digit is 5, and 5 + 1 = 6.\n#### 6", "math", True),
        ("First there are 4 + 4 = 8 apples. At $2 each, she pays $16.\n#### 16", "math", True),
        ("First, 2 + 2 = 5. Then 5 * 3 = 15. So \\boxed{15}.", "math", False),
        ("The capital is Paris, since 1 + 1 = 3.", "general", False),
        ("Paris", "general", True),
        ("- red\n- green\n- blue", "general", True),
        ("1) Add them.\n2) Divide by two.\n3) That is all :)", "general", True),
        ("The capital of", "general", False),
    ],
)
def test_equations_and_endings_decide_on_an_answer(answer, domain, kept):
    item = row("What is it, please, and how would you explain it to a friend?", answer) | {"domain": domain}
    (decision,) = prune(["r"], [item], config())
    assert decision.kept is kept, decision.reason


def test_low_utility_goes_within_a_skill_but_no_skill_dies_out():
    rows = [solved(number) for number in range(10, 30)] + [solved(number, skill="rare") for number in range(40, 44)]
    rows[0] = solved(10, origin="human")
    utility = numpy.linspace(0.1, 0.9, 24)
    reading = Reading(1 - utility, numpy.ones(24), numpy.random.default_rng(0).normal(size=(24, 64)))
    decisions = prune([f"r:{n}" for n in range(24)], rows, config(keep_share=0.5, min_per_skill=4), reading)
    kept = [index for index, decision in enumerate(decisions) if decision.kept]
    assert kept == [0, *range(11, 20), *range(20, 24)], "half of the common skill, by utility; all of the rare one"
    assert {decision.reason for decision in decisions if not decision.kept} == {"low utility"}
    assert decisions[5].utility == pytest.approx(utility[5])


def test_same_meaning_goes_within_a_skill_only():
    rows = [solved(10), solved(20), solved(30, skill="other"), solved(40)]
    embeddings = numpy.array([[1.0, 0, 0], [1.0, 0.001, 0], [1.0, 0, 0], [-3.0, 0.2, 1.0]])
    reading = Reading(numpy.full(4, 0.5), numpy.ones(4), embeddings + 100)  # what all share says nothing
    decisions = prune(["a", "b", "c", "d"], rows, config(keep_share=1.0), reading)
    assert [decision.reason for decision in decisions] == ["kept", "means the same as a", "kept", "kept"]


def test_losses_with_and_without_the_instruction_are_those_of_the_model(workplace, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    rows = [solved(23), row("What is 1 + 1?", "1 + 1 = 2.\n#### 2"), solved(10)]
    reading = read_conversations(model, tokenizer, rows, max_length=512, batch_size=2)
    header = tokenizer("<|beginoftext|><|startofturn|><|assistant|>\n", add_special_tokens=False)["input_ids"]
    for index, item in enumerate(rows):
        (ids,), (marks,) = encode_conversations(tokenizer, [item["messages"]])
        labels = [token if mark else -100 for token, mark in zip(ids, marks, strict=True)]
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss
            answer = [token for token in labels if token != -100]
            alone = torch.tensor([[*header, *answer]])
            targets = torch.tensor([[-100] * len(header) + answer])
            loss_alone = model(alone, labels=targets, use_cache=False).loss
            hidden = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].mean(0)
        assert reading.loss[index] == pytest.approx(loss.item(), rel=1e-5)
        assert reading.loss_alone[index] == pytest.approx(loss_alone.item(), rel=1e-5)
        torch.testing.assert_close(torch.tensor(reading.embeddings[index]), hidden, rtol=1e-4, atol=1e-5)


def test_rows_that_the_model_cannot_read_are_decided_too(workplace, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    long = "What is 1 + 1, and " * 40 + "so on?"
    rows = [solved(11), row(long, "1 + 1 = 2.\n#### 2"), row("Now, " + long, "1 + 1 = 2.\n#### 2", origin="human")]
    reading = read_conversations(model, tokenizer, rows, max_length=120)
    assert numpy.isnan(reading.loss).tolist() == [False, True, True]
    decisions = prune(["a", "b", "c"], rows, config(max_length=120, keep_share=1.0), reading)
    assert [decision.reason for decision in decisions] == [
        "kept",
        "instruction longer than 120 tokens",
        "written by a person",
    ]
    write_pruned(rows, decisions, tmp_path)
    assert json.loads((tmp_path / "decisions.jsonl").read_text().splitlines()[1])["utility"] is None


class Words(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_page_shows_both_sides_and_escapes_what_rows_say(tmp_path):
    rows = [solved(10), row("<script>alert(1)</script>?", "Adding 3 + 4 =")]
    decisions = prune(["a", "b"], rows, config())
    train_file = write_pruned(rows, decisions, tmp_path / "out")
    assert [kept for _, kept in read_rows(train_file)] == rows[:1]
    written = [json.loads(line) for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]
    assert [(line["place"], line["kept"]) for line in written] == [("a", True), ("b", False)]
    page = Words()
    page.feed((tmp_path / "out" / "page.html").read_text())
    assert "script" not in page.tags
    assert "<script>alert(1)</script>?" in page.text
    assert "1 of 2 conversations stay." in page.text
    assert page.tags.count("details") == 2
    with pytest.raises(ValueError, match="holds pruned data"):
        write_pruned(rows, decisions, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_share": 0}, "keep_share is 0"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_entry_point_prunes_with_the_model(workplace, write_rows, tmp_path, capsys):
    path = write_rows([solved(number) for number in range(10, 40)])
    words = ["--train_files", path, "--model_name_or_path", str(workplace / "base"), "--min_per_skill", "5"]
    main([*words, "--keep_share", "0.5", "--embedding_threshold", "1.0", "--output_dir", str(tmp_path / "out")])
    assert "15 low utility" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds pruned data"):
        main([*words, "--output_dir", str(tmp_path / "out")])
