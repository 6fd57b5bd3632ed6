"""Growth from folder to folder: both layouts, reload, interruption, damage and resources."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from modeling_motif2 import Motif2Config, growth_files
from modeling_motif2.growth import count_parameters, describe, flops_per_token, grow, main
from modeling_motif2.growth_files import MANIFEST, CheckpointReader
from modeling_motif2.growth_plan import tensor_shapes
from tests.modeling_motif2.builders import random_ids
from tests.modeling_motif2.growth_builders import (
    EVERYTHING,
    SEVERAL_FILES,
    command,
    folder_bytes,
    options,
    save_parent,
)


@pytest.fixture
def parent(tmp_path):
    """A small model in the style of Motif-2.6B, float64, saved in our layout."""
    return save_parent(tmp_path / "parent")


@torch.no_grad()
def logits_error(folder: Path, model, **load) -> float:
    grown = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, **load)
    ids = random_ids(2, 13)
    expected = model(ids).logits
    return ((grown(ids).logits - expected).abs().max() / expected.abs().max()).item()


def test_a_grown_checkpoint_reloads_and_computes_the_same(parent, tmp_path, capsys):
    folder, model = parent
    result = grow(options(folder, tmp_path / "grown", verify=True, **EVERYTHING, **SEVERAL_FILES))
    assert logits_error(tmp_path / "grown", model) < 1e-12
    assert result.verification.passed
    assert result.verification.error < 1e-12
    assert result.config.num_hidden_layers == 6
    printed, bars = capsys.readouterr()
    assert "grow: 100%" in bars
    assert f"{count_parameters(result.config):,}" in printed
    assert "layer 2 (inserted after 1)" in printed
    assert "the same function" in printed
    assert len(list((tmp_path / "grown").glob("model-*.safetensors"))) > 3


def test_a_grown_checkpoint_loads_as_remote_code(parent, tmp_path):
    """The sources beside the parent's weights go along, so that the folder does not need this package."""
    folder, model = parent
    grow(options(folder, tmp_path / "grown", width=2))
    assert logits_error(tmp_path / "grown", model, trust_remote_code=True) < 1e-12
    assert (tmp_path / "grown" / "modeling_motif2.py").is_file()


def test_the_official_layout_stays_official(tmp_path):
    folder, model = save_parent(tmp_path / "parent", official=True)
    grow(options(folder, tmp_path / "grown", **EVERYTHING))
    written = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert written["model_type"] == "Motif"
    assert written["architectures"] == ["MotifForCausalLM"]
    assert written["expanded"] is True
    assert written["torch_dtype"] == "float64"
    assert (written["num_noise_heads"], written["num_attention_heads"]) == (2, 10)
    assert written["tie_word_embeddings"] is False
    # Remote code of the parent knows no groups.
    assert "auto_map" not in written
    assert not list((tmp_path / "grown").glob("*.py"))
    assert logits_error(tmp_path / "grown", model) < 1e-12


@pytest.mark.parametrize("official", [False, True], ids=["our layout", "official layout"])
@pytest.mark.parametrize(
    ("of_parent", "steps"),
    [
        ({}, {"width": 3}),
        ({}, {"signal_ratio": 8}),
        ({}, {"insert_after": [0, 2, 2]}),
        ({}, {"untie": True}),
        ({"ratio": 2, "num_noise_heads": 2}, {"width": 2, "signal_ratio": 3, "noise_snr_db": 10.0}),
        ({"ratio": 3, "num_noise_heads": 2}, {"width": 3, "signal_ratio": 7, "insert_every": 3, "noise_snr_db": 30.0}),
    ],
    ids=str,
)
def test_both_layouts_of_any_parent_grow(tmp_path, official, of_parent, steps):
    folder, model = save_parent(tmp_path / "parent", official=official, **of_parent)
    result = grow(options(folder, tmp_path / "grown", **steps))
    assert logits_error(tmp_path / "grown", model) < 1e-12
    written = json.loads((tmp_path / "grown" / "config.json").read_text())
    assert written["model_type"] == ("Motif" if official else "motif2")
    assert result.config.num_signal_heads_per_group == steps.get("signal_ratio", of_parent.get("ratio", 1))
    assert result.config.hidden_size == steps.get("width", 1) * model.config.hidden_size


def test_the_dtype_can_be_changed(parent, tmp_path):
    folder, _ = parent
    result = grow(options(folder, tmp_path / "grown", width=2, dtype="bfloat16"))
    reader = CheckpointReader(tmp_path / "grown")
    assert {reader.dtype(name) for name in reader.names} == {torch.bfloat16}
    assert json.loads((tmp_path / "grown" / "config.json").read_text())["dtype"] == "bfloat16"
    assert result.num_bytes_written == sum(file.stat().st_size for file in (tmp_path / "grown").glob("*.safetensors"))


class Interrupted(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("reads", [0, 40, 75])
def test_an_interrupted_growth_goes_on_to_the_same_bytes(parent, tmp_path, monkeypatch, reads):
    folder, _ = parent
    settings = EVERYTHING | SEVERAL_FILES
    grow(options(folder, tmp_path / "whole", **settings))
    read_rows = CheckpointReader.rows
    left = [reads]

    def failing_rows(self, name, start, stop):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return read_rows(self, name, start, stop)

    monkeypatch.setattr(CheckpointReader, "rows", failing_rows)
    with pytest.raises(Interrupted):
        grow(options(folder, tmp_path / "halted", **settings))
    monkeypatch.undo()
    assert not (tmp_path / "halted" / "config.json").exists()
    finished = {file: file.stat().st_ino for file in (tmp_path / "halted").glob("*.safetensors")}
    assert bool(finished) is (reads > 0)
    grow(options(folder, tmp_path / "halted", **settings))
    assert folder_bytes(tmp_path / "halted") == folder_bytes(tmp_path / "whole")
    assert {file: file.stat().st_ino for file in finished} == finished


def test_the_tensors_do_not_depend_on_how_they_are_split_into_files(parent, tmp_path):
    folder, _ = parent
    grow(options(folder, tmp_path / "one", **EVERYTHING))
    grow(options(folder, tmp_path / "many", **EVERYTHING, **SEVERAL_FILES))
    one, many = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "many")
    assert sorted(one.names) == sorted(many.names)
    assert len(many.files) > 3
    for name in one.names:
        assert torch.equal(one.tensor(name), many.tensor(name)), name
    weight_map = json.loads((tmp_path / "many" / growth_files.INDEX).read_text())["weight_map"]
    assert set(weight_map) == set(many.names)


def _lose(file):
    file.unlink()


def _truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def _flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("finished", [True, False], ids=["finished growth", "interrupted growth"])
@pytest.mark.parametrize("damage", [_lose, _truncate, _flip_a_bit])
def test_a_shard_that_was_lost_or_damaged_is_written_again(parent, tmp_path, capsys, damage, finished):
    folder, _ = parent
    settings = EVERYTHING | SEVERAL_FILES
    grow(options(folder, tmp_path / "grown", **settings))
    before = folder_bytes(tmp_path / "grown")
    shard = next((tmp_path / "grown").glob("model-00003*"))
    damage(shard)
    if not finished:
        manifest = json.loads((tmp_path / "grown" / MANIFEST).read_text())
        (tmp_path / "grown" / MANIFEST).write_text(json.dumps(manifest | {"complete": False}))
        (tmp_path / "grown" / "config.json").unlink()
    kept = {file: file.stat().st_ino for file in (tmp_path / "grown").glob("model-*.safetensors") if file != shard}
    capsys.readouterr()
    result = grow(options(folder, tmp_path / "grown", **settings))
    assert (f"{shard.name} is damaged" in capsys.readouterr().out) is (damage is not _lose)
    assert folder_bytes(tmp_path / "grown") == before
    assert result.num_bytes_written == shard.stat().st_size
    assert {file: file.stat().st_ino for file in kept} == kept


@pytest.mark.parametrize("file", ["config.json", growth_files.INDEX])
def test_a_finished_folder_that_lost_its_config_or_index_is_completed(parent, tmp_path, file):
    folder, _ = parent
    grow(options(folder, tmp_path / "grown", **EVERYTHING))
    before = folder_bytes(tmp_path / "grown")
    (tmp_path / "grown" / file).unlink()
    assert grow(options(folder, tmp_path / "grown", **EVERYTHING)).num_bytes_written == 0
    assert folder_bytes(tmp_path / "grown") == before


def test_every_file_is_safe_on_the_disk_before_the_manifest_names_it(parent, tmp_path, monkeypatch):
    """The order of a power cut: contents, then the name in the folder, then the manifest, and config.json last."""
    folder, _ = parent
    events = []
    sync, rename = os.fsync, Path.rename

    def recording_sync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        sync(descriptor)

    def recording_rename(self, target):
        events.append(("rename", target.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_sync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    grow(options(folder, tmp_path / "grown", width=2, **SEVERAL_FILES))
    renames = [i for i, (event, _) in enumerate(events) if event == "rename"]
    for i in renames:
        name = events[i][1]
        assert events[i - 1] == ("sync", f"{name}.partial")
        assert events[i + 1] == ("sync", "grown")
    names = [events[i][1] for i in renames]
    shards = [i for i, name in enumerate(names) if name.startswith("model-")]
    assert len(shards) > 3
    assert all(names[i + 1] == MANIFEST for i in shards)
    assert names[-2:] == ["config.json", MANIFEST]


def test_the_manifest_holds_the_checksums(parent, tmp_path):
    folder, _ = parent
    grow(options(folder, tmp_path / "grown", width=2, **SEVERAL_FILES))
    manifest = json.loads((tmp_path / "grown" / MANIFEST).read_text())
    lines = "".join(f"{entry['sha256']}  {file}\n" for file, entry in manifest["shards"].items())
    lines += f"{manifest['source']['config.json']}  {folder / 'config.json'}\n"
    assert len(manifest["shards"]) > 3
    subprocess.run(["sha256sum", "--check", "--quiet"], input=lines, text=True, check=True, cwd=tmp_path / "grown")


def test_a_dry_run_writes_nothing_and_tells_the_room(parent, tmp_path, capsys, monkeypatch):
    folder, model = parent
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 123_456_789))
    main(command(folder, tmp_path / "grown", "--width", "3", "--dry_run"))
    assert not (tmp_path / "grown").exists()
    printed = capsys.readouterr().out
    assert f"{model.num_parameters():,}" in printed
    assert "forward FLOPs a token at 256" in printed
    needed = int(
        re.search(r"([\d,]+) bytes to write in .*, 123,456,789 free on its disk", printed)[1].replace(",", "")
    )
    main(command(folder, tmp_path / "grown", "--width", "3"))
    written = sum(file.stat().st_size for file in (tmp_path / "grown").glob("*.safetensors"))
    assert needed == written


@pytest.mark.parametrize("dry_run", [False, True])
def test_too_little_room_is_said_before_anything_is_written(parent, tmp_path, monkeypatch, dry_run):
    folder, _ = parent
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 1000))
    with pytest.raises(ValueError, match=r"needs [\d,]+ more bytes in .* has 1,000 free: make room for [\d,]+ bytes"):
        grow(options(folder, tmp_path / "grown", width=2, dry_run=dry_run))
    assert not (tmp_path / "grown").exists()


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for line in ("  width   --width k", "examples:", "--noise_snr_db 20 --verify", "goes on when the same command"):
        assert line in text
    assert "(default: None)" not in text


def test_published_sizes_are_reckoned_right():
    published = Motif2Config()
    assert count_parameters(published) == 12_703_860_896
    matrices = 5120 * 4096 + 2 * 2048 * 4096 + 4096 * 8192 + 3 * 16384 * 4096
    attention = 40 * 128 * 3 * 4097 / 2
    assert flops_per_token(published, 4096) == 2 * (40 * (matrices + attention) + 219520 * 4096)
    assert f"{12_703_860_896:,}" in describe(published, published)


@pytest.mark.slow
def test_full_width_needs_less_than_six_gib(tmp_path):
    """Two blocks of Motif-2.6B's width with its vocabulary: its largest tensors, grown to 12.7B's."""
    config = Motif2Config(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_noise_heads=None,
        tie_word_embeddings=True,
    )
    if shutil.disk_usage(tmp_path).free < 16e9:
        pytest.skip("needs 16 GB of disk")
    (tmp_path / "parent").mkdir()
    config.architectures = ["Motif2ForCausalLM"]
    (tmp_path / "parent" / "config.json").write_text(config.to_json_string())
    tensors = {name: torch.randn(shape).mul_(0.02) for name, shape in tensor_shapes(config).items()}
    save_file(tensors, tmp_path / "parent" / "model.safetensors")
    del tensors
    arguments = ["--width", "2", "--signal_ratio", "4", "--insert_every", "1", "--noise_snr_db", "20", "--verify"]
    command = [sys.executable, "-m", "modeling_motif2.growth", "--source", str(tmp_path / "parent")]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "grown"), *arguments, "--verify_tokens", "8"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    peak_bytes = 0
    while process.poll() is None:
        # The high-water mark of the program itself; ru_maxrss would count what this process held before.
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                peak_bytes = int(line.split()[1]) * 1024
        time.sleep(0.2)
    assert process.returncode == 0
    assert 2**28 < peak_bytes < 6 * 2**30
