import json

import pytest
import zstandard

from trainer.data.corpus import Source, chain_documents, read_documents

DOCUMENTS = [{"text": f"document {number} ä", "license": "CC0-1.0"} for number in range(5)]
LINES = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)


def write_formats(folder):
    import pyarrow
    import pyarrow.parquet

    (folder / "a.jsonl").write_text(LINES)
    (folder / "b.jsonl.zst").write_bytes(zstandard.compress(LINES.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(DOCUMENTS), folder / "c.parquet")
    (folder / "d.txt").write_text("one text\nof two lines")


def test_every_format_gives_the_same_documents(tmp_path):
    write_formats(tmp_path)
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        assert list(read_documents(Source(str(tmp_path / name)))) == DOCUMENTS
    assert list(read_documents(Source(str(tmp_path / "d.txt"), license="MIT"))) == [
        {"text": "one text\nof two lines", "license": "MIT"}
    ]


def test_a_folder_is_read_whole_and_in_order(tmp_path):
    write_formats(tmp_path)
    texts = [document["text"] for document in chain_documents([Source(str(tmp_path))])]
    assert texts == [document["text"] for document in DOCUMENTS] * 3 + ["one text\nof two lines"]


def test_max_documents_and_text_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n{"content": "y"}\n')
    source = Source.parse({"path": str(tmp_path / "a.jsonl"), "text_field": "content", "max_documents": 1})
    assert [document["text"] for document in read_documents(source)] == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"text": "x"}\n{broken\n', "line 2"),
        ("a.jsonl", b'{"text": "x"}\n' + b"[" * 100_000, "line 2"),
        ("a.jsonl", b'{"content": "x"}\n', "text_field"),
        ("a.jsonl.zst", b"no zstd at all", "a.jsonl.zst"),
        (
            "a.jsonl.zst",
            zstandard.compress(b'{"text": "x"}\n') + zstandard.compress(b'{"text": "y"}\n')[:-3],
            "Truncated",
        ),
        ("a.parquet", b"no parquet at all", "a.parquet"),
        ("a.txt", b"\xff\xfe\xfa", "UTF-8"),
        ("a.csv", b"x", "known suffixes"),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=named):
        list(read_documents(Source(str(tmp_path / name))))


def test_an_unknown_dataset_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing"):
        list(read_documents(Source("nobody/nothing")))
    with pytest.raises(ValueError, match="no corpus file"):
        list(read_documents(Source(str(tmp_path))))


def test_unknown_source_keys_are_refused():
    with pytest.raises(ValueError, match="textfield"):
        Source.parse({"path": "x", "textfield": "y"})


def test_several_licences_of_a_document_are_one_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "license": ["MIT", "ISC"]}\n')
    assert [document["license"] for document in read_documents(Source(str(tmp_path / "a.jsonl")))] == ["MIT, ISC"]


def test_a_stream_that_breaks_off_is_named(monkeypatch):
    import datasets

    def broken():
        yield from DOCUMENTS
        raise RuntimeError("the network is gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: broken())
    with pytest.raises(ValueError, match=r"'some/thing' cannot be read on after 5 documents \(the network is gone\)"):
        list(read_documents(Source("some/thing")))


@pytest.mark.parametrize("streaming", [True, False])
def test_hub_datasets_are_read_streaming_or_not(monkeypatch, streaming):
    import datasets

    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        dataset = datasets.Dataset.from_list(DOCUMENTS)
        return dataset.to_iterable_dataset() if options["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source("somebody/something", name="part", split="test", streaming=streaming, max_documents=3)
    assert list(read_documents(source)) == DOCUMENTS[:3]
    assert asked == [("somebody/something", "part", {"split": "test", "streaming": streaming})]


def test_lone_surrogates_are_replaced_and_pairs_joined(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x \\ud83d\\ude00 \\ud800 y"}\n')
    (document,) = read_documents(Source(str(tmp_path / "a.jsonl")))
    assert document["text"] == "x \U0001f600 \ufffd y"
    assert document["text"].encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    (tmp_path / name).write_text('{"text": "x"}', encoding="utf-8-sig")
    (document,) = read_documents(Source(str(tmp_path / name)))
    assert document["text"] == ("x" if name == "a.jsonl" else '{"text": "x"}')
