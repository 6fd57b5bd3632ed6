"""Selection keeps the best of each domain, writes every score, and takes a judge's word for half."""

import errno
import json
import os

import pytest

from sft.curate import CurateConfig, curate, main
from sft.data import read_rows

GOOD = "First, 4 + 4 = 8. Therefore 8 * 2 = 16.\n#### 16"
PLAIN = "Well, that is an easy one and anybody who thinks about it for some time will surely say this: \\boxed{16}."
CUT = "First, 4 + 4 ="


def row(answer: str, domain: str = "math") -> dict:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], "domain": domain}


def config(path: str, output, **changes) -> CurateConfig:
    return CurateConfig(
        **({"train_files": [path], "output_dir": str(output), "keep_share": 0.4, "progress": False} | changes)
    )


def test_best_of_each_domain_stay_and_every_score_is_written(write_rows, tmp_path):
    rows = [row(PLAIN), row(GOOD), row(CUT), row("It is so because it rains.", "general"), {"messages": []}]
    train_file, counts = curate(config(write_rows(rows), tmp_path / "out"))
    assert [kept for _, kept in read_rows(train_file)] == [rows[1], rows[3]]
    assert counts == {"kept": 2, "low score": 1, "incomplete": 1, "no messages": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in lines] == [False, True, False, True, False]
    assert lines[4] == {"place": f"{tmp_path}/rows.jsonl:5", "kept": False, "reason": "malformed: no messages"}
    assert lines[1]["total"] > lines[0]["total"]
    with pytest.raises(ValueError, match="holds selected data"):
        curate(config(write_rows(rows), tmp_path / "out"))


def test_judge_can_turn_the_order(write_rows, tmp_path):
    rows = [row(PLAIN), row(GOOD)]
    train_file, _ = curate(config(write_rows(rows), tmp_path / "out"), judge=lambda question, answer: answer == PLAIN)
    assert [kept for _, kept in read_rows(train_file)] == [rows[0]]


def test_a_judge_without_a_number_is_counted_and_stops_nothing(write_rows, tmp_path):
    def judge(question, answer):
        if answer == GOOD:
            raise ValueError("judge replied 'great', which is no number")
        return 1.0 if answer == PLAIN else 7.0

    rows = [row(PLAIN), row(GOOD), row(f"{GOOD}7")]
    _, counts = curate(config(write_rows(rows), tmp_path / "out", keep_share=1.0), judge)
    assert counts["kept"] == 3
    assert counts["scored without the judge, whose reply was no number"] == 2
    lines = [json.loads(line) for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]
    assert [line["judge"] for line in lines] == [1.0, None, None]


def rated(endpoint, rate):
    """Let the endpoint judge: `rate` gives status and reply for the text that is asked."""

    def answer(body):
        status, reply = rate(body["messages"][0]["content"])
        return status, {"choices": [{"message": {"content": reply}}]}

    endpoint.answer = answer


def words_for(endpoint, path, output) -> list[str]:
    words = ["--train_files", path, "--output_dir", str(output), "--judge_url", endpoint.url, "--judge_model", "judge"]
    return [*words, "--progress", "false", "--keep_share", "0.5", "--judge_workers", "2"]


def test_a_judge_at_an_endpoint_rates_each_answer_once(endpoint, write_rows, tmp_path, capsys):
    rows = [row(GOOD), row(PLAIN), row(PLAIN), row("No: \\boxed{1}"), row("Long: \\boxed{2}"), row(CUT)]
    special = {"\\boxed{1}": (200, "great"), "\\boxed{2}": (413, "too long"), PLAIN: (200, "10")}

    def rate(text):
        return next((reply for words, reply in special.items() if words in text), (200, "5"))

    rated(endpoint, rate)
    main(words_for(endpoint, write_rows(rows), tmp_path / "out"))
    assert len(endpoint.requests) == 5
    assert endpoint.requests[0][1]["temperature"] == 0.0
    assert [kept for _, kept in read_rows(tmp_path / "out" / "train.jsonl")] == rows[:3]
    lines = [json.loads(line) for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]
    assert [line["judge"] for line in lines] == [0.5, 1.0, 1.0, None, None, 0.5]
    printed = capsys.readouterr().out
    for text in (
        "3 kept",
        "1 scored without the judge, whose reply was no number",
        "1 scored without the judge, which refused the request with status 413",
        f"dropped 1: incomplete (first: {tmp_path}/rows.jsonl:6)",
    ):
        assert text in printed


def test_a_dead_judge_ends_the_run_and_the_same_command_goes_on(endpoint, write_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("sft.samplers.time.sleep", lambda seconds: None)
    rows = [row(f"{GOOD}{number}") for number in range(8)]
    words = words_for(endpoint, write_rows(rows), tmp_path / "out")
    rated(endpoint, lambda text: (200, "5") if len(endpoint.requests) < 5 else (500, "down"))
    with pytest.raises(SystemExit, match=r"status 500.*; the ratings so far are kept: the same command goes on"):
        main(words)
    journal = tmp_path / "out" / "journal.jsonl"
    done = len(journal.read_text().splitlines())
    assert 0 < done <= 5
    assert not (tmp_path / "out" / "train.jsonl").exists()
    with pytest.raises(SystemExit, match=r"other settings \(judge_model 'judge' -> 'another'\)"):
        main([*words, "--judge_model", "another"])
    endpoint.requests.clear()
    rated(endpoint, lambda text: (200, "5"))
    main(words)
    assert len(endpoint.requests) == 8 - done
    assert len(list(read_rows(tmp_path / "out" / "train.jsonl"))) == 4


def test_what_a_judge_refused_is_asked_for_at_the_next_start(endpoint, write_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("sft.samplers.time.sleep", lambda seconds: None)
    words = words_for(endpoint, write_rows([row(GOOD), row(PLAIN)]), tmp_path / "out")
    rated(endpoint, lambda text: (400, "busy") if GOOD in text else (500, "down"))
    with pytest.raises(SystemExit, match="status 500"):
        main(words)
    rated(endpoint, lambda text: (200, "5"))
    main(words)
    lines = [json.loads(line) for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]
    assert [line["judge"] for line in lines] == [0.5, 0.5]


def test_a_judge_that_rates_nothing_is_no_judge(endpoint, write_rows, tmp_path):
    rated(endpoint, lambda text: (400, "unknown field"))
    with pytest.raises(SystemExit, match=r"rated none of 1 rows: .*refused the request with status 400"):
        main(words_for(endpoint, write_rows([row(GOOD)]), tmp_path / "out"))
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_no_judge_there_at_all_is_named(endpoint, write_rows, tmp_path, monkeypatch):
    monkeypatch.setattr("sft.samplers.time.sleep", lambda seconds: None)
    words = words_for(endpoint, write_rows([row(GOOD)]), tmp_path / "out")
    words[words.index(endpoint.url)] = "http://127.0.0.1:9/v1"
    with pytest.raises(SystemExit, match=r"127.0.0.1:9/v1 gave no answer \(.*check the address"):
        main(words)
    words[words.index("http://127.0.0.1:9/v1")] = "judge.example"
    with pytest.raises(SystemExit, match=r"'judge\.example' has no http://"):
        main(words)


def test_a_full_disk_leaves_no_selected_data(write_rows, tmp_path, monkeypatch):
    writes = []

    def fail_at_the_second(descriptor):
        writes.append(descriptor)
        if len(writes) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_at_the_second)
    words = ["--train_files", write_rows([row(GOOD)]), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"sft.curate: .*train.jsonl' cannot be written: No space left"):
        main(words)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["decisions.jsonl"]
    main(words)
    assert [path.name for path in (tmp_path / "out").glob("train*")] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_share": 0}, "keep_share is 0"),
        ({"judge_url": "http://x/v1"}, "set both or neither"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"judge_workers": 0}, "judge_workers is 0"),
        ({"judge_timeout_seconds": 0}, "judge_timeout_seconds 0; use"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CurateConfig(**({"train_files": ["t"], "output_dir": "o"} | settings))


def test_entry_point(write_rows, tmp_path, capsys):
    main(["--train_files", write_rows([row(GOOD), row(CUT), {}]), "--output_dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    for text in (
        "1 kept",
        f"dropped 1: incomplete (first: {tmp_path}/rows.jsonl:2)",
        f"dropped 1: no messages (first: {tmp_path}/rows.jsonl:3)",
    ):
        assert text in printed
    with pytest.raises(SystemExit, match="none of 1 rows is complete enough"):
        main(["--train_files", write_rows([row(CUT)]), "--output_dir", str(tmp_path / "other")])
