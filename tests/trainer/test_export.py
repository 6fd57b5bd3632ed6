"""A model exported from checkpoints is the run's own; several checkpoints give their mean."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer.export import export_checkpoints, main


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_the_last_checkpoint_gives_the_runs_own_model(trained_run, tmp_path, capsys):
    main(["--checkpoint", str(trained_run / "checkpoints/step_00000008"), "--output", str(tmp_path / "model")])
    assert str(tmp_path / "model") in capsys.readouterr().out
    own, exported = (load_file(folder / "model.safetensors") for folder in (trained_run / "model", tmp_path / "model"))
    assert own.keys() == exported.keys()
    assert all(torch.equal(own[name], exported[name]) for name in own)
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "model" / name).read_text()) == json.loads(
            (trained_run / "model" / name).read_text()
        )
    assert {file.name for file in (tmp_path / "model").iterdir()} == {
        file.name for file in (trained_run / "model").iterdir()
    }
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 51


def test_several_checkpoints_give_their_mean_in_any_dtype(trained_run, tmp_path):
    paths = [trained_run / "checkpoints" / name for name in ("step_00000004", "step_00000008")]
    single = [weights(export_checkpoints([path], tmp_path / path.name)) for path in paths]
    mean = weights(export_checkpoints(paths, tmp_path / "mean"))
    assert not torch.equal(single[0]["lm_head.weight"], single[1]["lm_head.weight"])
    for name, weight in mean.items():
        torch.testing.assert_close(weight, (single[0][name] + single[1][name]) / 2, rtol=1e-6, atol=1e-8)
    halved = load_file(export_checkpoints(paths, tmp_path / "half", dtype="bfloat16") / "model.safetensors")
    assert all(torch.equal(weight, mean[name].bfloat16()) for name, weight in halved.items())


def test_what_cannot_be_exported_is_named(trained_run, tmp_path):
    moved = tmp_path / "step_00000008"
    shutil.copytree(trained_run / "checkpoints/step_00000008", moved)
    with pytest.raises(SystemExit, match="give --tokenizer"):
        main(["--checkpoint", str(moved), "--output", str(tmp_path / "model")])
    broken = tmp_path / "run/checkpoints/step_00000008"
    shutil.copytree(moved, broken)
    (tmp_path / "run/config.yaml").write_text("")
    with pytest.raises(SystemExit, match="is not the settings of a run: give --tokenizer"):
        main(["--checkpoint", str(broken), "--output", str(tmp_path / "model")])
    with pytest.raises(ValueError, match="exists: choose another output"):
        export_checkpoints([moved], tmp_path)
    (moved / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(ValueError, match=r"__0_0\.distcp is corrupted"):
        export_checkpoints([moved], tmp_path / "model")
