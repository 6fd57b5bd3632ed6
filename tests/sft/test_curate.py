"""Selection keeps the best of each domain, writes every score, and takes a judge's word for half."""

import json

import pytest

from sft.curate import CurateConfig, curate, main
from sft.data import read_rows

GOOD = "First, 4 + 4 = 8. Therefore 8 * 2 = 16.\n#### 16"
PLAIN = "Well, that is an easy one and anybody who thinks about it for some time will surely say this: \\boxed{16}."
CUT = "First, 4 + 4 ="


def row(answer: str, domain: str = "math") -> dict:
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}], "domain": domain}


def config(path: str, output, **changes) -> CurateConfig:
    return CurateConfig(**({"train_files": [path], "output_dir": str(output), "keep_share": 0.4} | changes))


def test_best_of_each_domain_stay_and_every_score_is_written(write_rows, tmp_path):
    rows = [row(PLAIN), row(GOOD), row(CUT), row("It is so because it rains.", "general"), {"messages": []}]
    train_file, counts = curate(config(write_rows(rows), tmp_path / "out"))
    assert [kept for _, kept in read_rows(train_file)] == [rows[1], rows[3]]
    assert counts == {"kept": 2, "low score": 1, "incomplete": 1, "no messages": 1}
    lines = [json.loads(line) for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in lines] == [False, True, False, True]
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
        return 1.0

    _, counts = curate(config(write_rows([row(PLAIN), row(GOOD)]), tmp_path / "out", keep_share=1.0), judge)
    assert counts["kept"] == 2
    assert counts["scored without the judge, whose reply was no number"] == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()]
    assert [line["judge"] for line in lines] == [1.0, None]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_share": 0}, "keep_share is 0"),
        ({"judge_url": "http://x/v1"}, "set both or neither"),
        ({"output_dir": ""}, "output_dir is empty"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        CurateConfig(**({"train_files": ["t"], "output_dir": "o"} | settings))


def test_entry_point(write_rows, tmp_path, capsys):
    main(["--train_files", write_rows([row(GOOD), row(CUT)]), "--output_dir", str(tmp_path / "out")])
    assert "1 kept" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="none of 1 rows is complete enough"):
        main(["--train_files", write_rows([row(CUT)]), "--output_dir", str(tmp_path / "other")])
