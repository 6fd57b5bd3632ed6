"""What growth refuses, and that each refusal is one line that names the value and the mend."""

import errno
import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_motif2 import growth_files
from modeling_motif2.growth import grow, main
from modeling_motif2.growth_files import MANIFEST
from tests.modeling_motif2.growth_builders import command, options, save_parent


@pytest.fixture
def parent(tmp_path):
    """A small model in the style of Motif-2.6B, float64, saved in our layout."""
    return save_parent(tmp_path / "parent")


def test_occupied_outputs_are_refused(parent, tmp_path):
    folder, _ = parent
    grow(options(folder, tmp_path / "grown", width=2))
    with pytest.raises(ValueError, match="already holds this growth, finished"):
        grow(options(folder, tmp_path / "grown", width=2))
    with pytest.raises(ValueError, match=r"holds a growth with other settings \(growth; "):
        grow(options(folder, tmp_path / "grown", width=3))
    with pytest.raises(ValueError, match="is the source"):
        options(folder, folder, width=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not empty"):
        grow(options(folder, tmp_path / "mine", width=2))


def test_a_source_that_changed_is_not_mixed_in(parent, tmp_path):
    folder, _ = parent
    grow(options(folder, tmp_path / "grown", width=2))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"other settings \(source; "):
        grow(options(folder, tmp_path / "grown", width=2, verify=True))


def _drop(tensors):
    del tensors["model.layers.1.self_attn.subln.weight"]


def _misshape(tensors):
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(5, 5)


def _add(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(5)


def _quantise(tensors):
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"model\.layers\.1\.self_attn\.subln\.weight is missing"),
        (_misshape, r"gate_proj\.weight has shape \(5, 5\), config\.json calls for \(48, 32\)"),
        (_add, r"q_proj\.bias is not a tensor of Motif-2"),
        (_quantise, r"model\.norm\.weight .* is stored as I8"),
    ],
)
def test_parents_whose_tensors_do_not_fit_are_refused(parent, tmp_path, change, message):
    folder, _ = parent
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        grow(options(folder, tmp_path / "grown", width=2))
    assert not (tmp_path / "grown").exists()


def test_folders_that_are_no_parent_are_refused(parent, tmp_path):
    folder, _ = parent
    with pytest.raises(ValueError, match="is not a folder"):
        options(tmp_path / "nowhere", tmp_path / "grown", width=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        grow(options(tmp_path / "empty", tmp_path / "grown", width=2))
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds a 'llama'"):
        grow(options(tmp_path / "empty", tmp_path / "grown", width=2))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read .*: complete the download"):
        grow(options(folder, tmp_path / "grown", width=2))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        grow(options(folder, tmp_path / "grown", width=2))
    (folder / growth_files.INDEX).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(ValueError, match=r"lacks model-00001-of-00002\.safetensors"):
        grow(options(folder, tmp_path / "grown", width=2))


INDEX_FILE = growth_files.INDEX
WEIGHTS = "model.safetensors"
FROM_TO = "from tensors to files of its folder"
HEADER = "Error while deserializing header: header"
MEND = ": complete the download, or write the checkpoint anew"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"[1]", "config.json holds a JSON list, not an object" + MEND),
        ("config.json", b"{'a", "config.json is not JSON (Expecting property name"),
        ("config.json", b"\xff\xfe", "config.json is not JSON ("),
        (
            INDEX_FILE,
            b"{}",
            f"{INDEX_FILE} needs a weight_map {FROM_TO}, and has none{MEND}",
        ),
        (INDEX_FILE, b"[]", f"{INDEX_FILE} holds a JSON list, not an object{MEND}"),
        (INDEX_FILE, b"{", f"{INDEX_FILE} is not JSON ("),
        (INDEX_FILE, b'{"weight_map": {"a": 3}}', f"and names 3{MEND}"),
        (INDEX_FILE, b'{"weight_map": {"a": "../b"}}', f"and names '../b'{MEND}"),
        (
            INDEX_FILE,
            b'{"weight_map": {"a": "model-9"}}',
            "lacks model-9, which its index names: complete the download",
        ),
        (WEIGHTS, b"", f"{WEIGHTS} cannot be read ({HEADER} too small){MEND}"),
        (
            WEIGHTS,
            b"\xff" * 64,
            f"{WEIGHTS} cannot be read ({HEADER} too large){MEND}",
        ),
        (WEIGHTS, (9).to_bytes(8, "little") + b"{no JSON}", f"{WEIGHTS} cannot be read ("),
    ],
)
def test_a_broken_file_is_named_in_one_line(parent, tmp_path, file, content, message):
    (parent[0] / file).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(command(parent[0], tmp_path / "grown"))
    assert message in stop.value.code
    assert str(parent[0]) in stop.value.code
    assert "\n" not in stop.value.code
    assert not (tmp_path / "grown").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "big"}, "expected int, got str (value: 'big')"),
        ({"num_attention_heads": 7}, "num_attention_heads=7 is odd"),
        ({"hidden_act": "silu"}, "hidden_act='silu' is not built"),
        ({"dtype": "float4000"}, "'float4000'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "dequantise the checkpoint"),
        ({"single_attention_call": True}, "grow the checkpoint it was made from"),
    ],
    ids=str,
)
def test_a_configuration_that_is_no_motif_2_is_refused_in_one_line(parent, tmp_path, changes, message):
    file = parent[0] / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(SystemExit) as stop:
        main(command(parent[0], tmp_path / "grown"))
    assert message in stop.value.code
    assert f"{file} " in stop.value.code
    assert "\n" not in stop.value.code


def test_a_tensor_in_two_files_is_refused(parent, tmp_path):
    tensors = load_file(parent[0] / WEIGHTS)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, parent[0] / "again.safetensors")
    weight_map = dict.fromkeys(tensors, WEIGHTS) | {"model.norm.weight": "again.safetensors"}
    (parent[0] / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"model\.norm\.weight is in again\.safetensors and in model\.safetensors"):
        grow(options(parent[0], tmp_path / "grown", width=2))


@pytest.mark.parametrize("manifest", ["{", "[]", '{"shards": 3}'])
def test_a_broken_manifest_is_named_in_one_line(parent, tmp_path, manifest):
    grow(options(parent[0], tmp_path / "grown", width=2))
    path = tmp_path / "grown" / MANIFEST
    broken = manifest if manifest != '{"shards": 3}' else json.dumps(json.loads(path.read_text()) | {"shards": 3})
    path.write_text(broken)
    with pytest.raises(SystemExit, match=f"{path} .*: remove this folder and grow again$"):
        main(command(parent[0], tmp_path / "grown"))


@contextmanager
def without_privileges(*folders: Path):
    """Lets a test that root runs be refused what others are refused."""
    if os.geteuid():
        yield
        return
    for folder in folders:
        for place in (folder, *folder.parents[:-1]):
            place.chmod(place.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_permission_denied_is_said_in_one_line(parent, tmp_path):
    folder, _ = parent
    mend = "give --source a folder that you may read and --output one that you may write"
    (tmp_path / "closed").mkdir(mode=0o555)
    (folder / WEIGHTS).chmod(0)
    with without_privileges(tmp_path, folder), pytest.raises(SystemExit) as stop:
        main(command(folder, tmp_path / "closed" / "grown"))
    assert stop.value.code == f"motif2-grow: [Errno 13] Permission denied: '{folder / WEIGHTS}': {mend}"
    (folder / WEIGHTS).chmod(0o644)
    for extra in ([], ["--dry_run"]):
        with without_privileges(tmp_path, folder), pytest.raises(SystemExit) as stop:
            main(command(folder, tmp_path / "closed" / "grown", *extra))
        assert stop.value.code == f"motif2-grow: [Errno 13] Permission denied: '{tmp_path / 'closed'}': {mend}"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room and give the same command again"),
        (OSError(errno.EIO, "Input/output error"), "give the same command again when that is mended"),
        (KeyboardInterrupt(), "interrupted; the same command goes on where this one stopped"),
    ],
    ids=repr,
)
def test_a_failure_on_the_way_is_said_in_one_line(parent, tmp_path, monkeypatch, capsys, failure, message):
    def fail(*arguments):
        raise failure

    monkeypatch.setattr(growth_files, "_write_shard", fail)
    with pytest.raises(SystemExit) as stop:
        main(command(parent[0], tmp_path / "grown"))
    said = stop.value.code if isinstance(failure, OSError) else capsys.readouterr().err
    assert message in said
    monkeypatch.undo()
    main(command(parent[0], tmp_path / "grown"))


def test_an_output_that_is_a_file_is_refused(parent, tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    for output in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(SystemExit):
            main(command(parent[0], output))
        assert f"output='{output}': {tmp_path / 'taken'} is a file, a folder is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_shard_gb", "inf"], "max_shard_gb=inf must be above 0 and finite"),
        (["--verify_text", __file__], "needs --verify: add it"),
        (["--verify_tokens", "16"], "verify_tokens=16 needs --verify"),
        (["--seed", "3"], "seed=3 is of the noise: add --noise_snr_db"),
        (["--widht", "2"], "unknown setting '--widht'; did you mean --width?"),
        (["--noise-snr", "2"], "did you mean --noise_snr_db?"),
        (["--max_shard_gb", "0"], "max_shard_gb=0.0 must be above 0"),
        (["--dtype", "int8"], "dtype='int8' is not one of float64"),
        (["--verify_tokens", "1"], "verify_tokens=1 must be 2 or more"),
        (["--verify_text", "/nowhere"], "verify_text='/nowhere' is not a file"),
    ],
)
def test_the_command_line_names_the_mend(parent, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(["--source", str(parent[0]), "--output", str(tmp_path / "grown"), *arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("motif2-grow: ")
    assert message in said
    assert said.count("\n") == 1


def test_a_refused_growth_ends_with_its_reason(parent, tmp_path):
    with pytest.raises(SystemExit, match="motif2-grow: nothing would grow"):
        main(["--source", str(parent[0]), "--output", str(tmp_path / "grown")])
