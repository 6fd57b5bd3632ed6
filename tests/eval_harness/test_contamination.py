"""A corpus that holds an evaluation row is found out, and one that does not is not accused."""

import json
import random

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from eval_harness.contamination import RUN_WORDS, check, main, read_corpus, word_runs
from tests.eval_harness.benchmark_sets import write_benchmarks

WORDS = [f"word{number}" for number in range(500)]


def text(seed: int, length: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def test_runs_against_a_plain_count():
    rows = {str(seed): text(seed, 30) for seed in range(20)}
    corpus = [text(seed + 100, 200) for seed in range(10)]
    corpus[3] += " " + rows["4"].upper().replace(" ", ", ")
    corpus[7] += " " + " ".join(rows["9"].split()[5 : 5 + RUN_WORDS])
    corpus[8] += " " + " ".join(rows["11"].split()[: RUN_WORDS - 1])
    found = check(corpus, {"set": rows})["set"]
    assert found.rows == 20
    assert found.found == {"4": (18, 18), "9": (1, 18)}


def test_short_rows_count_as_one_run_and_shorter_ones_not_at_all():
    assert len(word_runs(text(1, 14))) == 2
    assert len(word_runs(text(1, 9))) == 1
    assert word_runs(text(1, 7)) == []
    found = check([text(1, 9)], {"set": {"nine": text(1, 9), "seven": text(2, 7)}})["set"]
    assert (found.rows, found.found) == (1, {"nine": (1, 1)})


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".txt"])
def test_corpora_are_read_in_every_form(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    lines = "".join(json.dumps({"text": line}) + "\n" for line in ("eins", "zwei")).encode()
    path.write_bytes({".jsonl": lines, ".jsonl.zst": zstandard.compress(lines), ".txt": b"eins zwei"}[suffix])
    assert list(read_corpus(path)) == (["eins zwei"] if suffix == ".txt" else ["eins", "zwei"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "eins"}\n{"body": 1}\n', "row 2: no column 'text'; it has body"),
        ("a.jsonl", b'["eins"]\n', "row 1: no column 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "row 1: 'text' holds a int"),
        ("a.jsonl", b'{"text": "eins"}\noops\n', "line 2 cannot be read"),
        ("a.jsonl.gz", b"\x1f\x8b\x08", "line 1 cannot be read"),
        ("a.jsonl.zst", b'{"text": "eins"}\n', "line 1 cannot be read"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "eins"}\n' * 9)[:-4], "cannot be read"),
        ("a.txt", b"\xff\xfe", "is no text in UTF-8"),
        ("a.md", b"eins", "holds no .jsonl"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_no_clean_corpus(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        list(read_corpus(tmp_path))


def test_a_parquet_corpus_names_its_columns_and_leaves_null_out(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["eins", None], "source": ["x", "y"]}), path)
    assert list(read_corpus(path)) == ["eins"]
    with pytest.raises(ValueError, match="no column 'body'; it has text, source"):
        list(read_corpus(path, "body"))


def test_the_command_names_the_rows(tmp_path, capsys):
    data = write_benchmarks(tmp_path / "data")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "So: Ann has 7 pens and buys 7. How many? 14!"}) + "\n")
    main(
        [
            "--corpus",
            str(corpus),
            "--data_dir",
            str(data),
            "--tasks",
            "gsm8k,math",
            "--output",
            str(tmp_path / "found.json"),
        ]
    )
    assert json.loads((tmp_path / "found.json").read_text()) == {"gsm8k": {"gsm8k/0": [1, 1]}, "math": {}}
    printed = capsys.readouterr().out
    assert "1 of 2" in printed
    assert "missing: motif2_math_4shot::counting_and_probability, " in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "no.jsonl", "--tasks", "gsm9k"], "did you mean 'gsm8k'"),
        (["--corpus", "no.jsonl", "--colum", "x"], "did you mean 'column'"),
        (["--corpus", "no.jsonl"], "does not exist"),
        ([], "corpus is empty"),
    ],
)
def test_mistakes_are_explained(tmp_path, capsys, words, message):
    data = write_benchmarks(tmp_path / "data")
    with pytest.raises((SystemExit, FileNotFoundError)) as stopped:
        main(["--data_dir", str(data), *words])
    assert message in f"{stopped.value} {capsys.readouterr().err}"


def test_several_files_and_folders_are_one_corpus(tmp_path):
    (tmp_path / "a.part.jsonl").write_text(json.dumps({"text": "eins"}) + "\n")
    (tmp_path / "b.txt").write_text("zwei")
    (tmp_path / "notes.md").write_text("drei")
    assert list(read_corpus(tmp_path)) == ["eins", "zwei"]


@pytest.mark.slow
def test_the_shared_corpus_is_as_clean_as_it_says(shared_data):
    from eval_harness.contamination import benchmark_texts

    corpus = read_corpus(shared_data / "pretrain" / "code.jsonl.zst")
    texts, _ = benchmark_texts(["gsm8k", "math", "humaneval", "mbpp", "mmlu"], str(shared_data / "eval"))
    found = check(corpus, texts)
    for name, result in found.items():
        assert len(result.found) <= 0.01 * result.rows, (name, list(result.found)[:20])
