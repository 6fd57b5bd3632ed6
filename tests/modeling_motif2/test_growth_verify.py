"""The comparison of a grown model with its source: what it finds, where, how sharp it is, and on which text."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from modeling_motif2 import growth_files, growth_rules
from modeling_motif2.growth import grow, main
from modeling_motif2.growth_files import MANIFEST, CheckpointReader
from modeling_motif2.growth_verify import SAMPLE_TEXT
from tests.modeling_motif2.growth_builders import EVERYTHING, command, options, save_parent
from trainer.data.tokenizer import train_tokenizer


@pytest.fixture
def parent(tmp_path):
    """A small model in the style of Motif-2.6B, float64, saved in our layout."""
    return save_parent(tmp_path / "parent")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verification_bounds_stored_rounding(dtype, tmp_path):
    folder, _ = save_parent(tmp_path / "parent", dtype=dtype)
    result = grow(options(folder, tmp_path / "grown", verify=True, verify_tokens=20, **EVERYTHING))
    assert result.verification.passed
    assert 0 < result.verification.error < result.verification.bound
    assert CheckpointReader(tmp_path / "grown").dtype("lm_head.weight") == dtype


@pytest.mark.parametrize("stored", [None, "float32", "float64"])
def test_without_rounding_the_bound_in_bfloat16_is_that_of_float64(tmp_path, stored):
    """Copies sum to the source whatever the dtype, so width and heads have nothing to allow for."""
    folder, _ = save_parent(tmp_path / "parent", dtype=torch.bfloat16)
    result = grow(options(folder, tmp_path / "grown", verify=True, width=3, signal_ratio=3, dtype=stored))
    assert result.verification.passed
    bounds = {bound for place in result.verification.places for bound in place.bounds.values()}
    assert bounds == {1e-12}


@pytest.mark.parametrize(
    "dtype",
    [*(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.float32)), torch.bfloat16],
    ids=str,
)
def test_verification_finds_what_is_left_uncompensated_late_in_the_stack(dtype, tmp_path, monkeypatch, capsys):
    """The inserted block adds nothing, so only what its heads compute shows that their lambda is another."""
    folder, _ = save_parent(tmp_path / "parent", dtype=dtype, layers=8)
    arguments = ["--source", str(folder), "--output", str(tmp_path / "grown"), "--insert_after", "6"]
    arguments += ["--verify", "--verify_tokens", "24"]
    monkeypatch.setattr(growth_rules, "lambda_init", lambda layer: 0.5)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    verdict = re.search(r"first exceeds its bound at layer 7 \(inserted after 6\), heads: (\S+), bound (\S+)", printed)
    error, bound = map(float, verdict.groups())
    assert 0.05 < error < 0.2
    assert bound < 0.01
    shutil.rmtree(tmp_path / "grown")
    monkeypatch.undo()
    main(arguments)
    assert "the same function" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("layers", "layer", "error"), [(6, 0, 0.265), (6, 4, 0.146), (12, 10, 0.0447), (20, 14, 0.0168), (20, 18, 0.0047)]
)
def test_how_late_a_missing_compensation_is_found(dtype, layers, layer, error, tmp_path, monkeypatch):
    """The figures of docs/experiments/growth.md; the last is what bfloat16 rounds away."""
    folder, _ = save_parent(tmp_path / "parent", dtype=dtype, layers=layers)
    monkeypatch.setattr(growth_rules, "lambda_init", lambda index: 0.5)
    found = grow(options(folder, tmp_path / "grown", insert_after=[layer], verify=True)).verification
    inserted = found.places[layer + 2]
    assert inserted.name == f"layer {layer + 1} (inserted after {layer})"
    assert inserted.errors["heads"] == pytest.approx(error, rel=0.01)
    if dtype == torch.bfloat16 and layer < 18:
        assert 0.004 < inserted.bounds["heads"] < 0.005
    assert found.passed is (layer == 18 and dtype == torch.bfloat16)


@pytest.mark.parametrize("seed", range(3))
def test_the_measured_bound_leaves_room_for_rounding(seed, tmp_path):
    """Every step at once and a conversion, which rounds every weight: the largest errors growth can leave."""
    folder, _ = save_parent(tmp_path / "parent", seed=seed, layers=2)
    result = grow(options(folder, tmp_path / "grown", verify=True, dtype="bfloat16", **EVERYTHING))
    assert result.verification.passed
    shares = [
        place.errors[column] / bound
        for place in result.verification.places
        for column, bound in place.bounds.items()
        if bound > 0
    ]
    assert 0.2 < max(shares) < 0.9


def nudge(file: Path, tensor: str) -> None:
    """Add 1e-6 to a float64 tensor where it lies, as a growth that went wrong would have written it."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    first, last = (start + offset for offset in json.loads(content[8:start])[tensor]["data_offsets"])
    content[first:last] = (np.frombuffer(content[first:last], np.float64) + 1e-6).tobytes()
    file.write_bytes(content)
    manifest = json.loads((file.parent / MANIFEST).read_text())
    manifest["shards"][file.name]["sha256"] = growth_files.file_sha256(file)
    (file.parent / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("model.embed_tokens.weight", "embeddings, state"),
        ("model.layers.3.self_attn.lambda_q2", "layer 3 (source's 2), heads"),
        ("model.layers.5.mlp.down_proj.weight", "layer 5 (inserted after 3), update"),
        ("model.norm.weight", "final norm, state"),
        ("lm_head.weight", "logits, state"),
    ],
)
def test_verification_names_the_first_place_that_differs(parent, tmp_path, capsys, tensor, place):
    folder, _ = parent
    arguments = ["--source", str(folder), "--output", str(tmp_path / "grown"), "--width", "2", "--insert_every", "2"]
    main(arguments)
    nudge(tmp_path / "grown" / "model-00001-of-00001.safetensors", tensor)
    manifest = json.loads((tmp_path / "grown" / MANIFEST).read_text())
    assert manifest["complete"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--verify", "--verify_tokens", "9"])
    assert stop.value.code == 1
    assert f"NOT the same function: the error first exceeds its bound at {place}: " in capsys.readouterr().out


def test_verification_reads_real_text_with_the_sources_tokenizer(parent, tmp_path, shared_data):
    text = shared_data / "eval" / "wikitext2" / "valid.txt"
    folder, _ = parent
    train_tokenizer([text.read_text()[:20000]], 300, folder, show_progress=False)
    result = grow(options(folder, tmp_path / "grown", verify=True, verify_text=str(text), width=2, signal_ratio=2))
    assert result.verification.num_tokens == 64
    assert result.verification.error < 1e-12
    assert AutoTokenizer.from_pretrained(tmp_path / "grown").eos_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"", "holds 0 tokens: 2 or more are compared"),
        (b"a", "holds 1 tokens"),
    ],
)
def test_a_text_that_cannot_be_compared_on_is_refused_before_anything_is_written(parent, tmp_path, text, message):
    folder, _ = parent
    (tmp_path / "text").write_bytes(text)
    with pytest.raises(SystemExit, match=message) as stop:
        main(command(folder, tmp_path / "grown", "--verify", "--verify_text", str(tmp_path / "text")))
    assert str(tmp_path / "text") in stop.value.code
    assert not (tmp_path / "grown").exists()


def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_written(parent, tmp_path):
    folder, _ = parent
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"the tokenizer of .* cannot be read .*: complete it"):
        main(command(folder, tmp_path / "grown", "--verify"))
    train_tokenizer([SAMPLE_TEXT], 400, folder, show_progress=False)
    with pytest.raises(SystemExit, match=r"gives id 3\d\d, and the model knows 300: it belongs to another checkpoint"):
        main(command(folder, tmp_path / "grown", "--verify"))
    assert not (tmp_path / "grown").exists()
