"""`python -m trainer.data` makes a recipe's shards from local files and says what is in them."""

import json
import shutil

import pytest
import yaml
import zstandard

from tests.trainer.conftest import MINIATURE
from tests.trainer.data.conftest import make_documents, make_tokenizer
from trainer.data.__main__ import main
from trainer.data.shards import load_manifest


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose domains come from four formats."""
    import pyarrow
    import pyarrow.parquet

    lines = "".join(json.dumps({"text": document["text"]}) + "\n" for document in make_documents(120))
    (tmp_path / "web.jsonl").write_text(lines)
    (tmp_path / "web.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(make_documents(90, shift=2)), tmp_path / "code.parquet")
    (tmp_path / "code.txt").write_text("w1 w2 w3")
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    domains = {
        "web": {
            "start": 0.6,
            "end": 0.4,
            "sources": [
                {"path": str(tmp_path / "web.jsonl"), "license": "ODC-By-1.0"},
                {"path": str(tmp_path / "web.jsonl.zst"), "license": "CC0-1.0"},
            ],
        },
        "code": {
            "start": 0.4,
            "end": 0.6,
            "sources": [
                {"path": str(tmp_path / "code.parquet")},
                {"path": str(tmp_path / "code.txt"), "license": "X"},
            ],
        },
    }
    paths = {"tokenizer": str(tmp_path / "tokenizer"), "data_dir": str(tmp_path / "shards")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**MINIATURE, **paths, "domains": domains}))
    return tmp_path / "recipe.yaml"


def test_the_command_makes_shards_and_lists_them(recipe, capsys):
    main(["--config", str(recipe), "--heldout_fraction", "0.1"])
    printed = capsys.readouterr().out
    assert "CC0-1.0 120, ODC-By-1.0 120; " in printed
    assert "MIT 90, X 1; " in printed
    manifest = load_manifest(recipe.parent / "shards")
    for name, count in (("web", 240), ("code", 91)):
        entry = manifest["domains"][name]
        assert entry["train"]["documents"] + entry["heldout"]["documents"] == count
        assert f"{entry['train']['tokens']:,}" in printed
    assert [source["license"] for source in manifest["domains"]["web"]["sources"]] == ["ODC-By-1.0", "CC0-1.0"]
    main(["--config", str(recipe), "--heldout_fraction", "0.1"])  # nothing left to do
    assert capsys.readouterr().out == printed


def test_the_command_refuses_another_tokenizer(recipe, tmp_path):
    main(["--config", str(recipe)])
    make_tokenizer(words=60).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"trainer\.data: .*tokenizer"):
        main(["--config", str(recipe), "--tokenizer", str(tmp_path / "other")])


def test_a_lost_or_corrupted_shard_is_found_and_made_again_as_told(recipe, tmp_path):
    main(["--config", str(recipe)])
    before, shard = load_manifest(tmp_path / "shards"), tmp_path / "shards/web/train_00000.tokens.npy"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 3
    shard.write_bytes(content)
    with pytest.raises(SystemExit, match=r"web/train_00000.tokens.npy is corrupted"):
        main(["--config", str(recipe)])
    shard.unlink()
    with pytest.raises(SystemExit, match=r"is lost: restore it, or delete \S+/shards/web and tokenise"):
        main(["--config", str(recipe)])
    shutil.rmtree(shard.parent)
    main(["--config", str(recipe)])
    assert load_manifest(tmp_path / "shards") == before


def test_settings_that_are_refused_name_the_command(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["--config", str(recipe), "--data_worker", "8"])
    assert capsys.readouterr().err.startswith("trainer.data: error: unknown setting '--data_worker'")


def test_a_recipe_without_sources_needs_shards(recipe, tmp_path):
    with pytest.raises(SystemExit, match="holds no token shards"):
        main(["--config", str(recipe), "--domains", "{web: {start: 1, end: 1}}"])
    assert not (tmp_path / "shards").exists()
