"""A file appears whole or not at all, and an error names it."""

import datetime
import errno
import json
import os

import pytest

from sft.files import write_lines, write_text


@pytest.fixture
def full_disk(monkeypatch):
    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, full_disk):
    (tmp_path / "old.jsonl").write_text("before\n")
    for name in ("old.jsonl", "new.jsonl"):
        with pytest.raises(OSError, match=rf"{name}' cannot be written: No space left"):
            write_lines([{"a": 1}], tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old.jsonl"]
    assert (tmp_path / "old.jsonl").read_text() == "before\n"


def test_a_writer_that_stops_leaves_nothing(tmp_path):
    def rows():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_lines(rows(), tmp_path / "rows.jsonl")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/rows.jsonl' cannot be written: "):
        write_lines([], tmp_path / "file" / "rows.jsonl")


def test_folders_are_made_and_dates_become_text(tmp_path):
    write_text("два\n", tmp_path / "a" / "text")
    write_lines([{"on": datetime.date(2026, 1, 2)}, "x"], tmp_path / "a" / "rows.jsonl")
    assert (tmp_path / "a" / "text").read_text(encoding="utf-8") == "два\n"
    assert [json.loads(line) for line in (tmp_path / "a" / "rows.jsonl").open()] == [{"on": "2026-01-02"}, "x"]
