import itertools
import json
import multiprocessing
import shutil

import numpy as np
import pytest

from tests.trainer.data.conftest import make_documents, make_tokenizer
from trainer.data.shards import (
    TokenCorpus,
    build_shards,
    check_tokenizer,
    heldout_texts,
    load_manifest,
)

SETTINGS = {"heldout_fraction": 0.1, "shard_tokens": 2000, "progress": False}


def read_all(folder, domain, split):
    corpus = TokenCorpus(folder, domain, split, verify=True)
    lengths = corpus.lengths(np.arange(corpus.num_documents))
    return [corpus.tokens(number, 0, length).tolist() for number, length in enumerate(lengths)]


def test_shards_hold_every_document_once(tmp_path, tokenizer):
    documents = make_documents(1500)
    manifest = build_shards(tmp_path, {"a": documents}, tokenizer, **SETTINGS)
    expected = sorted([*tokenizer(d["text"])["input_ids"], tokenizer.eos_token_id] for d in documents)
    train, heldout = (read_all(tmp_path, "a", split) for split in ("train", "heldout"))
    assert sorted(train + heldout) == expected
    assert 0.05 < len(heldout) / 1500 < 0.15
    entry = manifest["domains"]["a"]
    assert len(entry["train"]["shards"]) > 1
    assert entry["train"]["tokens"] + entry["heldout"]["tokens"] == sum(map(len, expected))
    assert entry["licenses"] == {"MIT": 1500}
    assert manifest == load_manifest(tmp_path)
    texts = list(heldout_texts(tmp_path, "a"))
    assert [[*tokenizer(text)["input_ids"], 0] for text in texts] == heldout


def test_equal_texts_fall_on_the_same_side(tmp_path, tokenizer):
    build_shards(tmp_path, {"a": make_documents(300) * 3}, tokenizer, **SETTINGS)
    train, heldout = ({tuple(d) for d in read_all(tmp_path, "a", split)} for split in ("train", "heldout"))
    assert heldout
    assert not train & heldout


def test_given_heldout_documents_replace_the_hash(tmp_path, tokenizer):
    heldout = make_documents(20, shift=1)
    build_shards(tmp_path, {"a": make_documents(100)}, tokenizer, heldout={"a": heldout}, **SETTINGS)
    assert list(heldout_texts(tmp_path, "a")) == [document["text"] for document in heldout]
    assert load_manifest(tmp_path)["domains"]["a"]["train"]["documents"] == 100


@pytest.mark.parametrize(("words", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint32)])
def test_the_last_word_of_a_large_vocabulary_fits(tmp_path, words, dtype):
    tokenizer = make_tokenizer(words)  # and one entry more, the end of text
    build_shards(tmp_path, {"a": [{"text": f"w{words - 1} w0"}]}, tokenizer, **{**SETTINGS, "heldout_fraction": 0})
    tokens = TokenCorpus(tmp_path, "a").tokens(0, 0, 3)
    assert (tokens.tolist(), tokens.dtype) == ([words, 1, 0], dtype)


def test_a_documents_own_field_holds_nothing_out(tmp_path, tokenizer):
    documents = [document | {"heldout": "no"} for document in make_documents(50)]
    manifest = build_shards(tmp_path, {"a": documents}, tokenizer, **{**SETTINGS, "heldout_fraction": 0})
    assert manifest["domains"]["a"]["train"]["documents"] == 50


def test_an_interrupted_build_goes_on_and_gives_the_same_files(tmp_path, tokenizer):
    documents = make_documents(3000)

    def broken():
        yield from itertools.islice(documents, 2100)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_shards(tmp_path / "x", {"b": make_documents(50), "a": broken()}, tokenizer, **SETTINGS)
    kept = json.loads((tmp_path / "x/a/progress.json").read_text())
    assert kept["documents_read"] > 0
    build_shards(tmp_path / "x", {"b": make_documents(50), "a": documents}, tokenizer, **SETTINGS)
    build_shards(tmp_path / "y", {"b": make_documents(50), "a": documents}, tokenizer, **SETTINGS)
    assert load_manifest(tmp_path / "x") == load_manifest(tmp_path / "y")
    assert read_all(tmp_path / "x", "a", "train") == read_all(tmp_path / "y", "a", "train")
    assert not (tmp_path / "x/a/progress.json").exists()


@pytest.mark.parametrize("documents_before", [100, 2100])  # before the first shard is written, and after
def test_a_domain_that_is_made_again_may_be_interrupted_too(tmp_path, tokenizer, documents_before):
    documents = make_documents(2500)

    def broken():
        yield from itertools.islice(documents, documents_before)
        raise KeyboardInterrupt

    before = build_shards(tmp_path, {"a": documents}, tokenizer, **SETTINGS)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        build_shards(tmp_path, {"a": broken()}, tokenizer, **SETTINGS)
    assert (tmp_path / "a").is_dir()
    assert build_shards(tmp_path, {"a": documents}, tokenizer, **SETTINGS) == before
    TokenCorpus(tmp_path, "a", verify=True)


def test_licences_that_are_no_text_go_into_the_manifest_as_text(tmp_path, tokenizer):
    licenses = [5, 10, 1.5, True, {"name": "MIT"}]
    documents = [{"text": f"w{number}", "license": license} for number, license in enumerate(licenses)]
    source = write_documents(tmp_path / "a.jsonl", documents)
    build_shards(tmp_path / "x", {"a": [source]}, tokenizer, **{**SETTINGS, "heldout_fraction": 0})
    assert load_manifest(tmp_path / "x")["domains"]["a"]["licenses"] == {str(license): 1 for license in licenses}


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_write_the_same_shards_and_go_on_where_another_stopped(tmp_path, tokenizer, monkeypatch, start):
    """The workers are spawned in use; forked ones do the same without importing everything again."""
    context = multiprocessing.get_context(start)
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)
    documents = make_documents(1800)

    def broken():
        yield from itertools.islice(documents, 1500)
        raise KeyboardInterrupt

    build_shards(tmp_path / "alone", {"a": documents}, tokenizer, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        build_shards(tmp_path / "shared", {"a": broken()}, tokenizer, **SETTINGS)
    assert (tmp_path / "shared/a/progress.json").exists()
    build_shards(tmp_path / "shared", {"a": documents}, tokenizer, num_workers=2, **SETTINGS)
    assert load_manifest(tmp_path / "shared") == load_manifest(tmp_path / "alone")  # checksums of every file


def test_complete_domains_are_not_read_again(tmp_path, tokenizer):
    build_shards(tmp_path, {"a": make_documents(50)}, tokenizer, **SETTINGS)

    def refuses():
        raise AssertionError("read again")
        yield

    build_shards(tmp_path, {"a": refuses(), "b": make_documents(50)}, tokenizer, **SETTINGS)
    assert set(load_manifest(tmp_path)["domains"]) == {"a", "b"}


def write_documents(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return {"path": str(path), "license": "MIT"}


def test_other_sources_of_a_complete_domain_are_refused(tmp_path, tokenizer):
    one = write_documents(tmp_path / "one.jsonl", make_documents(60))
    build_shards(tmp_path / "x", {"a": [one | {"max_documents": 50}]}, tokenizer, **SETTINGS)
    build_shards(tmp_path / "x", {"a": [one | {"max_documents": 50, "streaming": False}]}, tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match=r"'a' .* tokenised from .*'max_documents': 50.*choose another data_dir"):
        build_shards(tmp_path / "x", {"a": [one]}, tokenizer, **SETTINGS)
    shutil.rmtree(tmp_path / "x/a")  # as it says
    manifest = build_shards(tmp_path / "x", {"a": [one]}, tokenizer, **SETTINGS)
    assert manifest["domains"]["a"]["licenses"] == {"MIT": 60}


def test_an_interrupted_domain_does_not_go_on_with_other_sources(tmp_path, tokenizer):
    one = write_documents(tmp_path / "one.jsonl", make_documents(1500))
    other = write_documents(tmp_path / "other.jsonl", make_documents(1500, shift=3))
    with (tmp_path / "one.jsonl").open("a") as file:
        file.write("{")
    with pytest.raises(ValueError, match=r"one\.jsonl cannot be read near line 1501"):
        build_shards(tmp_path / "x", {"a": [one]}, tokenizer, **SETTINGS)
    assert (tmp_path / "x/a/progress.json").is_file()
    with pytest.raises(ValueError, match=r"one\.jsonl.* the recipe's sources are .*other\.jsonl"):
        build_shards(tmp_path / "x", {"a": [other]}, tokenizer, **SETTINGS)
    write_documents(tmp_path / "one.jsonl", make_documents(1500))
    assert build_shards(tmp_path / "x", {"a": [one]}, tokenizer, **SETTINGS)["domains"]["a"]["licenses"] == {
        "MIT": 1500
    }


def test_the_text_of_held_out_documents_has_a_checksum(tmp_path, tokenizer):
    build_shards(tmp_path, {"a": make_documents(50)}, tokenizer, **SETTINGS)
    file = tmp_path / "a/heldout_00000.jsonl"
    file.write_bytes(file.read_bytes().replace(b"w1", b"w2", 1))
    with pytest.raises(ValueError, match=r"heldout_00000.jsonl is corrupted"):
        TokenCorpus(tmp_path, "a", "heldout", verify=True)


def test_sources_are_kept_in_the_manifest(tmp_path, tokenizer):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(document) + "\n" for document in make_documents(50)))
    manifest = build_shards(tmp_path / "x", {"a": [{"path": str(file), "license": "X"}]}, tokenizer, **SETTINGS)
    assert manifest["domains"]["a"]["sources"][0]["path"] == str(file)
    assert manifest["domains"]["a"]["train"]["documents"] > 30


def test_other_settings_and_another_tokenizer_are_refused(tmp_path, tokenizer):
    build_shards(tmp_path, {"a": make_documents(50)}, tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match="seed 0 -> 1"):
        build_shards(tmp_path, {"b": make_documents(50)}, tokenizer, **SETTINGS, seed=1)
    check_tokenizer(tmp_path, make_tokenizer())
    with pytest.raises(ValueError, match="another folder"):
        check_tokenizer(tmp_path, make_tokenizer(words=60))


def test_an_empty_domain_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="'a' has no training document"):
        build_shards(tmp_path, {"a": [{"text": ""}]}, tokenizer, **SETTINGS)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda file: file.unlink(), "is lost"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is corrupted"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x99"), "is corrupted"),
    ],
)
def test_a_damaged_shard_is_found_and_named(tmp_path, tokenizer, damage, named):
    build_shards(tmp_path, {"a": make_documents(50)}, tokenizer, **SETTINGS)
    damage(tmp_path / "a/train_00000.tokens.npy")
    with pytest.raises(ValueError, match=f"train_00000.tokens.npy {named}"):
        TokenCorpus(tmp_path, "a", verify=True)


def test_a_missing_or_damaged_manifest_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="set `sources`"):
        load_manifest(tmp_path)
    build_shards(tmp_path, {"a": make_documents(50)}, tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match="it has \\['a'\\]"):
        TokenCorpus(tmp_path, "b")
    manifest = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(manifest.replace('"documents": 4', '"documents": 5', 1))
    with pytest.raises(ValueError, match=r"manifest\.json is corrupted \(its checksum differs\)"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(manifest.replace('"format_version": 2', '"format_version": 1'))
    with pytest.raises(ValueError, match="has format 1, not 2: tokenise again"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"manifest\.json is corrupted \(no mapping\)"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is corrupted"):
        load_manifest(tmp_path)
