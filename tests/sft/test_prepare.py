"""Preparation drops each row for its reason, holds the ratios, and writes a card that adds up."""

import errno
import json
import os
from collections import Counter

import pytest
import yaml

from sft.curate import main as curate_main
from sft.data import read_rows
from sft.data_card import render_data_card
from sft.prepare import PrepareConfig, prepare, write_prepared
from sft.prepare import main as prepare_main
from sft.prune import main as prune_main

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
    assert Counter(line["reason"] for line in written) == reasons + Counter(
        {"beyond its domain's share": surplus, "malformed: no messages": 1}
    )
    places = {place for place, _ in read_rows(config.train_files[0])}
    assert {line["place"] for line in written} < places
    assert len({line["place"] for line in written}) == len(written)
    with pytest.raises(ValueError, match="holds prepared data"):
        write_prepared(prepared, config.output_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"min_tokens": 9, "max_tokens": 8}, "min <= max"),
        ({"total_tokens": 9}, "give each domain a share"),
        ({"duplicate_threshold": 1.0}, "duplicate_threshold is 1.0"),
        ({"domain_ratios": ["math"]}, "is not a new domain=share"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(**({"train_files": ["x"], "output_dir": "o", "tokenizer": "t"} | settings))


def test_entry_point_writes_and_names_a_missing_file(config, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words = ["--output_dir", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "tokenizer"), "--train_files"]
    prepare_main([*words, *config.train_files])
    assert "near-duplicate" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="does not exist"):
        prepare_main([*words, "absent.jsonl", "--output_dir", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"(?s)no conversation is left .* fewer than 900 tokens"):
        prepare_main([*words, *config.train_files, "--output_dir", str(tmp_path / "other"), "--min_tokens", "900"])
    assert not (tmp_path / "other").exists()


LABELS = {
    "domain is not text": {"domain": ["math"]},
    "license is not text": {"license": 5},
    "source is not text": {"source": {"a": 1}},
    "skill is not text": {"skill": ["a"]},
}
CALLING = {
    "messages": [
        {"role": "user", "content": "What is seven times six, please?"},
        {"role": "assistant", "tool_calls": [{"name": "multiply", "arguments": {"a": 7, "b": 6}}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
    ],
    "domain": "general",
}


@pytest.mark.parametrize("step", [prepare_main, curate_main, prune_main])
def test_every_step_counts_rows_with_bad_labels_and_keeps_calls_without_content(
    step, workplace, write_rows, tmp_path, capsys
):
    bad = [row("Why is it so today?", "Because it is.", "general") | label for label in LABELS.values()]
    words = ["--train_files", write_rows([CALLING, *bad]), "--output_dir", str(tmp_path / "out")]
    step([*words, *(["--tokenizer", str(workplace / "base")] if step is prepare_main else [])])
    printed = capsys.readouterr().out
    for number, reason in enumerate(LABELS, start=2):
        assert f"dropped 1: {reason} (first: {words[1]}:{number})" in printed
    ((_, kept),) = read_rows(tmp_path / "out" / "train.jsonl")
    assert kept["messages"][1] == CALLING["messages"][1] | {"content": None}
    decisions = "dropped.jsonl" if step is prepare_main else "decisions.jsonl"
    written = [json.loads(line) for line in (tmp_path / "out" / decisions).read_text().splitlines()]
    malformed = {line["place"]: line["reason"] for line in written if line["reason"].startswith("malformed")}
    assert malformed == {f"{words[1]}:{n}": f"malformed: {reason}" for n, reason in enumerate(LABELS, start=2)}
    if step is prune_main:
        assert (
            f"<td>license is not text</td><td class='n'>1</td><td>{words[1]}:3</td>"
            in (tmp_path / "out" / "page.html").read_text()
        )


@pytest.mark.parametrize("step", [prepare_main, prune_main])
def test_files_of_one_name_and_one_file_twice_are_told_apart(step, workplace, write_rows, tmp_path):
    (tmp_path / "other").mkdir()
    files = [
        write_rows([CALLING]),
        write_rows([row("Why?", "Because it rains there.", "general")], "other/rows.jsonl"),
    ]
    words = ["--train_files", *files, files[0], "--output_dir", str(tmp_path / "out")]
    step([*words, *(["--tokenizer", str(workplace / "base")] if step is prepare_main else [])])
    assert len(list(read_rows(tmp_path / "out" / "train.jsonl"))) == 2


@pytest.mark.parametrize("step", [prepare_main, curate_main, prune_main])
def test_every_step_refuses_a_bad_row_where_told_so(step, workplace, write_rows, tmp_path, capsys):
    words = ["--train_files", write_rows([CALLING, {"messages": []}]), "--output_dir", str(tmp_path / "out")]
    words += ["--tokenizer", str(workplace / "base")] if step is prepare_main else []
    with pytest.raises(SystemExit, match=r"rows\.jsonl:2 is malformed: no messages; mend it, or set bad_rows: skip"):
        step([*words, "--bad_rows", "refuse"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        step([*words, "--bad_rows", "drop"])
    assert "bad_rows is 'drop'; use skip or refuse" in capsys.readouterr().err


@pytest.mark.parametrize("step", [prepare_main, curate_main, prune_main])
def test_a_full_disk_leaves_nothing_that_the_next_step_would_read(step, workplace, write_rows, tmp_path, monkeypatch):
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == full.at:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    words = ["--train_files", write_rows([CALLING]), "--output_dir", str(tmp_path / "out")]
    words += ["--tokenizer", str(workplace / "base")] if step is prepare_main else []
    for full.at in (1, 2):
        synced.clear()
        with pytest.raises(SystemExit, match="cannot be written: No space left"):
            step(words)
        assert not (tmp_path / "out" / "train.jsonl").exists()
    full.at = 0
    step(words)
    assert len(list(read_rows(tmp_path / "out" / "train.jsonl"))) == 1
    words[1] = "absent.jsonl"
    with pytest.raises(SystemExit, match="choose another folder"):  # said before anything is read
        step(words)


@pytest.mark.parametrize("name", ["CC-BY: 4.0 # see", "a|b", 'it\'s "so"', "- x", "{y}", "null", "ゼロ"])
def test_any_licence_stands_in_the_header_of_the_card(name):
    counts = {column: {"x": {"rows": 1, "tokens": 1}} for column in ("domain", "source", "origin")}
    license = {name: {"rows": 1, "tokens": 1}, "x" * 200: {"rows": 1, "tokens": 1}}
    card = {"rows": 2, "tokens": 2, "license": license, "dropped": {}, "dropped_by_source": {}} | counts
    _, header, page = render_data_card(card).split("---\n", 2)
    assert yaml.safe_load(header) == {"license": "other", "license_name": " + ".join(sorted([name, "x" * 200]))}
    assert f"\n| {name.replace('|', chr(92) + '|')} | 1 | 1 | 50.0% |\n" in page


@pytest.mark.slow
@pytest.mark.timeout(1200)
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
