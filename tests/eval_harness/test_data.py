"""Rows come from the hub or a folder shaped like it; what is missing is named with the command that gets it."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from eval_harness.data import MissingDataset, load_benchmark

GSM8K = {"path": "openai/gsm8k", "name": "main"}


def test_local_files_in_the_hub_s_layout(tmp_path):
    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.table({"question": ["q"], "answer": ["a"]}), folder / "test-00000-of-00001.parquet"
    )
    (folder / "train.jsonl").write_text(json.dumps({"question": "q2", "answer": "a2"}) + "\n")
    found = load_benchmark(**GSM8K, splits=["test", "train"], data_dir=tmp_path, version=1.0)
    assert found["test"][0] == {"question": "q", "answer": "a"}
    assert found["train"][0]["question"] == "q2"


def test_all_parts_of_a_split_are_read(tmp_path):
    folder = tmp_path / "gsm8k" / "main"
    folder.mkdir(parents=True)
    for part in range(2):
        table = pyarrow.table({"question": [f"q{part}"]})
        pyarrow.parquet.write_table(table, folder / f"test-0000{part}-of-00002.parquet")
    (folder / "test_notes.jsonl").write_text("{}\n")
    assert load_benchmark(**GSM8K, data_dir=tmp_path)["test"]["question"] == ["q0", "q1"]
    (folder / "test-00001-of-00002.parquet").unlink()
    with pytest.raises(MissingDataset, match="1 of 2 parts"):
        load_benchmark(**GSM8K, data_dir=tmp_path)


def test_a_missing_split_says_how_to_get_it(tmp_path):
    with pytest.raises(MissingDataset, match=r"hf download openai/gsm8k --repo-type dataset --local-dir .*gsm8k"):
        load_benchmark(**GSM8K, data_dir=tmp_path)


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    def unreachable(*words, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(MissingDataset, match=r"no route.*hf download openai/gsm8k.*data_dir=DATA"):
        load_benchmark(**GSM8K)


def test_files_that_are_on_no_hub(tmp_path):
    (tmp_path / "arithmetic.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    assert len(load_benchmark(file="arithmetic.jsonl", data_dir=tmp_path)["test"]) == 1
    with pytest.raises(MissingDataset, match=r"did you mean 'arithmetic\.jsonl'"):
        load_benchmark(file="arithmetics.jsonl", data_dir=tmp_path)
    with pytest.raises(MissingDataset, match="give the folder"):
        load_benchmark(file="arithmetic.jsonl")
