"""The mean of checkpoints is the plain mean, on one rank and sharded, and a run goes on from it."""

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

import trainer.averaging
import trainer.loop
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from tests.distributed import run_distributed
from tests.trainer.test_loop import Killed, curve, kill_at
from tests.trainer.test_sharded_checkpoint import build, train, weights
from trainer.averaging import average_with_checkpoints, in_portions
from trainer.checkpoint import Checkpoints
from trainer.checkpoint_files import complete_checkpoints
from trainer.loop import run_pretraining


def plain_and_streamed_mean(rank: int, num_ranks: int, folder: Path):
    """Weights after one, two and three steps, and what averaging made of them."""
    model, optimizer = build(num_ranks)
    checkpoints = Checkpoints(folder, Accelerator(cpu=True), keep_last=2)
    snapshots = []
    for step in (1, 2, 3):
        train(model, optimizer, 1)
        snapshots.append(weights(model))
        if step < 3:
            checkpoints.save(model, optimizer, {"step": step})
    average_with_checkpoints(model, complete_checkpoints(folder))
    return snapshots, weights(model)


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_mean_is_the_plain_mean(tmp_path, monkeypatch, num_ranks):
    monkeypatch.setattr(trainer.averaging, "BYTES_AT_ONCE", 5000)  # several portions
    if num_ranks == 1:
        results = [plain_and_streamed_mean(0, 1, tmp_path)]
    else:
        results = run_distributed(plain_and_streamed_mean, num_ranks, num_ranks, tmp_path)
    for snapshots, mean in results:
        for name, weight in mean.items():
            plain = torch.stack([snapshot[name] for snapshot in snapshots]).mean(0)
            torch.testing.assert_close(weight, plain, rtol=1e-6, atol=1e-7)


def test_a_tied_weight_is_averaged_once(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 3}
    shape = Motif2Config(
        vocab_size=20, **sizes, num_key_value_heads=2, num_noise_heads=1, head_dim=4, tie_word_embeddings=True
    )
    model = Motif2ForCausalLM(shape)
    checkpoints = Checkpoints(tmp_path, Accelerator(cpu=True), keep_last=2)
    checkpoints.save(model, torch.optim.SGD(model.parameters(), lr=0.1), {"step": 1})
    before = weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    average_with_checkpoints(model, complete_checkpoints(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, before[name] + 0.5)


def test_portions_hold_all_names_in_order(monkeypatch):
    monkeypatch.setattr(trainer.averaging, "BYTES_AT_ONCE", 10)
    assert list(in_portions({"a": 4, "b": 6, "c": 1, "d": 30, "e": 2})) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_run_goes_on_from_the_mean_and_restarts_alike(make_config, tmp_path, monkeypatch, capsys):
    settings = {"checkpoint_steps": 1, "average_every_tokens": 128 * 3, "average_checkpoints": 3, "eval_steps": 0}
    whole, cut = (make_config(output_dir=str(tmp_path / name), **settings) for name in ("whole", "cut"))
    run_pretraining(whole)
    means = re.findall(r"step (\d+): going on from the mean of the weights and (.*)", capsys.readouterr().out)
    assert means == [("3", "step_00000001, step_00000002"), ("6", "step_00000004, step_00000005")]
    with monkeypatch.context() as patch:
        kill_at(patch, 5)
        with pytest.raises(Killed):
            run_pretraining(cut)
    run_pretraining(cut)
    assert curve(cut.output_dir) == curve(whole.output_dir)
    never = make_config(output_dir=str(tmp_path / "never"), eval_steps=0)
    run_pretraining(never)
    losses = [
        [json.loads(line)["loss"] for line in (Path(c.output_dir) / "metrics.jsonl").open()] for c in (whole, never)
    ]
    assert losses[0][:3] == losses[1][:3]
    assert losses[0][3] != losses[1][3]


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_take_the_checkpoints_that_the_main_one_sees(make_config, monkeypatch):
    """A shared disk may show a new folder late: each rank would go on from a mean of its own."""
    config = make_config(
        checkpoint_steps=1, average_every_tokens=256, average_checkpoints=2, eval_steps=0, total_tokens=128 * 5
    )

    def main(rank):
        averaged = []
        monkeypatch.setattr(trainer.loop, "average_with_checkpoints", lambda _, paths: averaged.append(paths))
        if rank:
            monkeypatch.setattr(trainer.loop, "complete_checkpoints", lambda folder: [])
        run_pretraining(config)
        return [[path.name for path in paths] for paths in averaged]

    assert run_distributed(main, 2) == [[["step_00000001"], ["step_00000003"]]] * 2


def test_too_few_kept_checkpoints_are_refused(make_config):
    with pytest.raises(ValueError, match="keep_last of 5 or more"):
        make_config(average_every_tokens=100)
