"""Reference solutions score 100% and near misses 0: on made-up sets here, on all real rows in the slow tests."""

import shutil

import pytest

from eval_harness import gold
from eval_harness.gold import TASKS, main, read_exceptions, replay
from eval_harness.sandbox import INSTALL
from tests.eval_harness.benchmark_sets import write_benchmarks

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason=INSTALL)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@needs_bubblewrap
def test_gold_and_near_misses_on_made_up_rows(data_dir):
    for benchmark in TASKS:
        found = replay(benchmark, data_dir)
        assert (found.rows, found.wrong) == (2, {}), benchmark
        missed = replay(benchmark, data_dir, near_miss=True)
        assert (missed.rows, missed.wrong) == (2, {}), benchmark
    assert "motif2_math_4shot::geometry" in replay("math", data_dir).skipped


def test_an_unlisted_failure_is_reported_and_fails(data_dir, monkeypatch, capsys):
    monkeypatch.setitem(gold.ANSWERS, "gsm8k", lambda doc, row, near_miss: "The answer is 14.")
    assert main(["--data_dir", str(data_dir), "--tasks", "gsm8k"]) == 1
    assert "1: NOT LISTED" in capsys.readouterr().out
    monkeypatch.setattr(gold, "read_exceptions", lambda near_miss: {"gsm8k": {"1": "made up"}})
    assert main(["--data_dir", str(data_dir), "--tasks", "gsm8k"]) == 0
    assert "1: made up" in capsys.readouterr().out


def test_exceptions_name_their_defect():
    for near_miss in (False, True):
        for rows in read_exceptions(near_miss).values():
            assert all(len(defect) > 10 for defect in rows.values())


def test_an_unknown_task_is_refused(data_dir, capsys):
    with pytest.raises(SystemExit):
        main(["--data_dir", str(data_dir), "--tasks", "gms8k"])
    assert "did you mean 'gsm8k'" in capsys.readouterr().err


def test_missing_rows_are_explained(tmp_path):
    with pytest.raises(SystemExit, match="hf download openai/gsm8k"):
        main(["--data_dir", str(tmp_path), "--tasks", "gsm8k"])


@needs_bubblewrap
@pytest.mark.slow
@pytest.mark.parametrize("near_miss", [False, True], ids=["gold", "near_miss"])
@pytest.mark.parametrize("benchmark", list(TASKS))
def test_all_real_rows(shared_data, benchmark, near_miss):
    found = replay(benchmark, shared_data / "eval", near_miss)
    assert found.rows >= {"gsm8k": 1319, "math": 3500, "humaneval": 164, "mbpp": 500, "mmlu": 14042}[benchmark]
    assert set(found.wrong) <= set(read_exceptions(near_miss)[benchmark]), found.wrong
