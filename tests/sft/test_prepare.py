"""Preparation drops each row for its reason, holds the ratios, and writes a card that adds up."""

import json
from collections import Counter

import pytest

from sft.data import read_rows
from sft.prepare import PrepareConfig, main, prepare, write_prepared

EVALUATION = (
    "If five machines make five parts in five minutes, how long do a hundred machines take for a hundred parts?"
)


def row(question: str, answer: str, domain: str, source: str = "ours") -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "domain": domain, "source": source, "license": "MIT", "origin": "human"}


def sums(domain: str, count: int, source: str = "ours") -> list[dict]:
    words = ["red", "green", "blue", "black", "white", "brown"]
    return [
        row(
            f"{domain} {number} {words[number % 6]}?",
            f"{number * 7919} {number * 104729} {words[number % 5]}",
            domain,
            source,
        )
        for number in range(count)
    ]


@pytest.fixture
def config(write_rows, tmp_path):
    rows = [*sums("math", 60), *sums("code", 30, "theirs")]
    spoilt = [
        row(EVALUATION, "Five minutes.", "math"),
        rows[0],
        row("Long?", "9 " * 200, "math"),
        row("?", "!", "math"),
        {"messages": "none"},
    ]
    return PrepareConfig(
        train_files=[write_rows([*rows, *spoilt])],
        eval_files=[write_rows([{"task": {"texts": [EVALUATION]}}], "eval.jsonl")],
        output_dir=str(tmp_path / "out"),
        tokenizer="t",
        domain_ratios=["math=0.75", "code=0.25"],
        min_tokens=12,
        max_tokens=200,
    )


def test_each_row_goes_for_its_reason_and_the_card_adds_up(config, tokenizer, tmp_path):
    prepared = prepare(config, tokenizer)
    reasons = Counter(reason for _, _, reason in prepared.dropped)
    surplus = reasons.pop("beyond its domain's share")
    assert reasons == {
        "evaluation text": 1,
        "near-duplicate": 1,
        "more than 200 tokens": 1,
        "fewer than 12 tokens": 1,
    }
    assert prepared.report.dropped["no messages"] == 1
    assert len(prepared.rows) + surplus == 90
    tokens = Counter()
    for kept, count in zip(prepared.rows, prepared.num_tokens, strict=True):
        tokens[kept["domain"]] += count
    assert tokens["math"] / tokens.total() == pytest.approx(0.75, abs=0.03)

    train_file = write_prepared(prepared, config.output_dir)
    assert [kept for _, kept in read_rows(train_file)] == prepared.rows
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["rows"], card["tokens"]) == (len(prepared.rows), tokens.total())
    assert {name: counts["tokens"] for name, counts in card["domain"].items()} == tokens
    assert card["license"]["MIT"]["rows"] == len(prepared.rows)
    assert sum(card["dropped"].values()) + card["rows"] == prepared.report.rows
    page = (tmp_path / "out" / "README.md").read_text()
    assert "| evaluation text | 1 |" in page
    assert "| theirs |" in page
    written = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in written) == reasons + Counter({"beyond its domain's share": surplus})
    with pytest.raises(ValueError, match="holds prepared data"):
        write_prepared(prepared, config.output_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"min_tokens": 9, "max_tokens": 8}, "min <= max"),
        ({"total_tokens": 9}, "give each domain a share"),
        ({"domain_ratios": ["math"]}, "is not a new domain=share"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**({"train_files": ["x"], "output_dir": "o", "tokenizer": "t"} | settings))


def test_entry_point_writes_and_names_a_missing_file(config, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["--output_dir", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer"), "--train_files"]
    main([*words, *config.train_files])
    assert "near-duplicate" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="does not exist"):
        main([*words, "absent.jsonl"])


@pytest.mark.slow
def test_real_conversations_without_their_evaluation_sets(shared_data, tokenizer, tmp_path):
    """GSM8K's training questions stay; its test questions, put among them, go."""
    tests = list(read_rows(sorted((shared_data / "eval" / "gsm8k" / "main").glob("test*"))[0]))
    planted = [row(test["question"], test["answer"], "math", "planted") for _, test in tests[:50]]
    (tmp_path / "planted.jsonl").write_text("".join(json.dumps(item) + "\n" for item in planted))
    config = PrepareConfig(
        train_files=[str(shared_data / "sft" / "math.parquet"), str(tmp_path / "planted.jsonl")],
        eval_files=[str(path) for path in (shared_data / "eval" / "gsm8k" / "main").glob("test*")],
        output_dir=str(tmp_path / "out"),
        tokenizer="t",
    )
    prepared = prepare(config, tokenizer)
    gone = Counter((item["source"], reason) for _, item, reason in prepared.dropped)
    assert gone["planted", "evaluation text"] == 50
    kept = Counter(item["source"] for item in prepared.rows)
    assert kept["gsm8k/train"] > 7000
    assert kept["planted"] == 0
