import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import kernels_hub
import trainer.loop
from kernels_hub import use_polynorm
from tests.distributed import run_distributed
from trainer.assemble import build_optimizer, open_heldout, open_loader, split_layers
from trainer.checkpoint_files import complete_checkpoints
from trainer.errors import LostRankError
from trainer.loop import NonFiniteLossError, run_pretraining
from trainer.model import build_model, load_tokenizer, model_config
from trainer.step import TrainStep

CURVE = ("step", "tokens", "loss", "loss_by_domain", "learning_rate", "mixture", "realised", "grad_norm", "max_logits")


def read_metrics(path: Path) -> tuple[list[dict], list[dict]]:
    """Steps and evaluations of a `metrics.jsonl`."""
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry for entry in entries if "eval" not in entry], [entry for entry in entries if "eval" in entry]


def curve(folder) -> list[dict]:
    steps, evaluations = read_metrics(Path(folder) / "metrics.jsonl")
    return [{name: entry[name] for name in CURVE} for entry in steps] + evaluations


class Killed(Exception):
    pass


def kill_at(monkeypatch, step: int) -> None:
    """Let `run_pretraining` die in the middle of a step."""
    original = TrainStep.run
    calls = iter(range(1, 10**6))

    def run(self, batch, factor):
        if next(calls) == step:
            raise Killed
        return original(self, batch, factor)

    monkeypatch.setattr(TrainStep, "run", run)


def test_a_run_learns_and_leaves_everything(make_config):
    config = make_config(total_tokens=128 * 30, eval_steps=10, learning_rate=3e-2)
    result = run_pretraining(config)
    folder = Path(config.output_dir)
    assert (result.steps, result.tokens) == (30, 128 * 30)
    assert all(result.last_eval[name] < result.first_eval[name] - 0.3 for name in "ab")
    steps, evaluations = read_metrics(result.metrics_path)
    assert [entry["step"] for entry in steps] == list(range(1, 31))
    assert [entry["step"] for entry in evaluations] == [0, 10, 20, 30]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.to_dict()
    first, last = steps[0], steps[-1]
    assert first["mixture"] == {"a": 0.75, "b": 0.25}
    assert last["mixture"]["a"] == pytest.approx(0.75 - 0.5 * 29 / 30)
    assert last["learning_rate"] == pytest.approx(0.1 * 3e-2)
    assert len(first["max_logits"]) == len(first["lambdas"]) == 2
    assert math.isfinite(first["max_logits"][0])
    assert sum(first["realised"].values()) == pytest.approx(1)
    assert result.lost_share == pytest.approx(sum(entry["lost_share"] for entry in steps) / 30)
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    tokens = AutoTokenizer.from_pretrained(result.model_dir)("w1 w2", return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 2, 51)


def test_padding_and_first_tokens_are_counted():
    run = SimpleNamespace(progress=trainer.loop.Progress())
    batch = SimpleNamespace(nominal_tokens=100, tokens_by_domain={"a": 60, "b": 35}, predicted_tokens=90)
    for _ in range(2):
        trainer.loop._Run._count_tokens(run, batch)
    assert run.progress == trainer.loop.Progress(tokens=200, padding_tokens=10, lost_tokens=20)


def test_resume_continues_bit_for_bit(make_config, tmp_path, monkeypatch):
    whole = make_config(output_dir=str(tmp_path / "whole"))
    run_pretraining(whole)
    cut = make_config(output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        kill_at(patch, 7)
        with pytest.raises(Killed):
            run_pretraining(cut)
    with (tmp_path / "cut/metrics.jsonl").open("a") as file:
        file.write('{}\n{"step": 7, "lo')
    assert [path.name for path in complete_checkpoints(tmp_path / "cut/checkpoints")] == ["step_00000004"]
    run_pretraining(cut)
    assert curve(cut.output_dir) == curve(whole.output_dir)
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "cut")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_eight_rows_accumulated_one_by_one_are_eight_at_once(make_config, tmp_path):
    settings = {"batch_tokens": 8 * 32, "total_tokens": 8 * 32 * 6}
    at_once = run_pretraining(make_config(output_dir=str(tmp_path / "at_once"), **settings))
    pieces = run_pretraining(make_config(output_dir=str(tmp_path / "pieces"), micro_batch_tokens=32, **settings))
    for one, other in zip(curve(at_once.output_dir), curve(pieces.output_dir), strict=True):
        for name in ("loss", "grad_norm", "eval"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=2e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ranks_do_not_change_the_losses(make_config, tmp_path, world_size):
    alone = run_pretraining(make_config(output_dir=str(tmp_path / "alone")))
    config = make_config(output_dir=str(tmp_path / "together"))
    run_distributed(lambda rank: run_pretraining(config).steps, world_size)
    for one, other in zip(curve(alone.output_dir), curve(config.output_dir), strict=True):
        for name in ("loss", "loss_by_domain", "grad_norm", "eval"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=2e-4)


@pytest.mark.distributed
def test_a_run_goes_on_with_another_number_of_ranks(make_config, tmp_path, monkeypatch):
    whole = run_pretraining(make_config(output_dir=str(tmp_path / "whole")))
    config = make_config(output_dir=str(tmp_path / "cut"))
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Killed):
            run_pretraining(config)
    run_distributed(lambda rank: run_pretraining(config).steps, 2)
    for one, other in zip(curve(whole.output_dir), curve(config.output_dir), strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=2e-4)


def test_growing_batches_and_rows(make_config):
    config = make_config(
        total_tokens=2000, sequence_length_stages={800: 64}, batch_tokens_end=256, batch_ramp_tokens=1000
    )
    steps, _ = read_metrics(run_pretraining(config).metrics_path)
    sizes = [
        entry["tokens"] - before for entry, before in zip(steps, [0, *(e["tokens"] for e in steps)], strict=False)
    ]
    assert sizes[0] == 128
    assert sizes[-1] == 256
    assert all(later >= 0.85 * earlier for earlier, later in itertools.pairwise(sizes))  # whole rows only
    assert [entry["sequence_length"] for entry in steps] == sorted(entry["sequence_length"] for entry in steps)
    assert {entry["sequence_length"] for entry in steps} == {32, 64}


def test_the_lock_of_kernels_reaches_the_loader(make_config):
    with pytest.raises(ValueError, match=r"some.lock locks kernels, and source is 'torch'"):
        run_pretraining(make_config(polynorm="torch", kernels_lock="some.lock"))


@pytest.mark.parametrize("optimizer", ["muon_clip", "adamw"])
def test_the_timeout_reaches_the_optimizer(make_config, optimizer):
    config = make_config(optimizer=optimizer, timeout_seconds=77.0)
    model = build_model(config, load_tokenizer(config.tokenizer))
    assert build_optimizer(config, model).timeout_seconds == 77.0


def test_copy_engines_reach_the_optimizer_and_are_refused_without_gpus(make_config):
    config = make_config(muon_copy_engines=True)
    model = build_model(config, load_tokenizer(config.tokenizer)).cpu()
    with pytest.raises(ValueError, match="copy_engines is set and the parameters are on cpu: leave it off there"):
        build_optimizer(config, model).step()


def test_ranks_that_do_not_meet_in_time_are_named(make_config, monkeypatch):
    def too_late(config):
        raise torch.distributed.DistStoreError("timed out: 1/2 clients joined")

    monkeypatch.setattr(trainer.loop, "make_accelerator", too_late)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(LostRankError, match="rank 1 lost another rank before the first step"):
        run_pretraining(make_config())


@pytest.mark.distributed
def test_ranks_that_found_different_kernels_are_refused(make_config, monkeypatch):
    config = make_config(polynorm="auto")
    original = use_polynorm

    def differs(model, *args, **kwargs):
        choice = original(model, *args, **kwargs)
        return replace(choice, namespace="_polynorm_1") if torch.distributed.get_rank() else choice

    monkeypatch.setattr("trainer.assemble.use_polynorm", differs)
    with pytest.raises(RuntimeError, match="PolyNorm runs as plain torch and torch kernel _polynorm_1 on different"):
        run_distributed(lambda rank: run_pretraining(config), 2, timeout_seconds=60)


@pytest.mark.filterwarnings("ignore:PolyNorm runs in plain torch")
def test_a_kernel_asked_for_by_name_is_not_replaced(make_config, monkeypatch):
    def refuse(*args, **kwargs):
        raise kernels_hub.KernelUnavailable("not today")

    monkeypatch.setattr("kernels_hub.loader.load_layers", refuse)
    with pytest.raises(ValueError, match=r"polynorm is 'hub', which cannot be used here \(hub: not today\)"):
        run_pretraining(make_config(polynorm="hub"))


@pytest.mark.parametrize(
    ("ranks", "settings", "rows"),
    [
        (1, {}, 4),
        (2, {}, 2),
        (2, {"micro_batch_tokens": 32}, 1),
        (4, {"micro_batch_tokens": 64}, 1),
        (2, {"tensor_parallel": 2}, 4),
    ],
)
def test_held_out_batches_are_no_larger_than_a_forward_of_training(make_config, ranks, settings, rows):
    config = make_config(**settings)
    for batches in open_heldout(config, load_tokenizer(config.tokenizer), ranks).values():
        assert [len(batch["input_ids"]) for batch in batches[:-1]] == [rows] * (len(batches) - 1)
        assert len(batches) > 1


def test_a_finished_run_is_not_overwritten_by_mistake(make_config):
    config = make_config(total_tokens=128 * 5, warmup_tokens=0)
    before = run_pretraining(config).metrics_path.read_text()
    with pytest.raises(ValueError, match="--overwrite"):
        run_pretraining(config)
    assert (Path(config.output_dir) / "metrics.jsonl").read_text() == before
    run_pretraining(make_config(total_tokens=128 * 4, warmup_tokens=0, overwrite=True))
    assert len(read_metrics(Path(config.output_dir) / "metrics.jsonl")[0]) == 4


def test_a_run_with_other_settings_is_not_continued(make_config, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Killed):
            run_pretraining(make_config())
    with pytest.raises(ValueError, match=r"seed 0 -> 1"):
        run_pretraining(make_config(seed=1))
    run_pretraining(make_config(micro_batch_tokens=64))


def poison(monkeypatch, step: int) -> None:
    """Make the loss of one step NaN."""
    original = TrainStep.token_losses
    calls = iter(range(1, 10**6))

    def token_losses(self, *args, **kwargs):
        losses, counted = original(self, *args, **kwargs)
        return (losses * math.nan if self.model.training and next(calls) == step else losses), counted

    monkeypatch.setattr(TrainStep, "token_losses", token_losses)


def test_a_non_finite_loss_stops_the_run_and_keeps_the_checkpoint(make_config, monkeypatch):
    config = make_config()
    with monkeypatch.context() as patch:
        poison(patch, 6)
        with pytest.raises(NonFiniteLossError, match=r"step 6 has loss nan.*step_00000004: raise max_skipped"):
            run_pretraining(config)
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["loss"] is None
    with monkeypatch.context() as patch:
        poison(patch, 2)  # the same batch again: what the error names is taken
        assert run_pretraining(make_config(max_skipped_steps=1)).steps == 8


def test_a_skipped_step_leaves_the_weights_alone(make_config, monkeypatch):
    seen = []
    original = TrainStep.run

    def run(self, batch, factor):
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        outcome = original(self, batch, factor)
        same = all(torch.equal(a, b) for a, b in zip(before, self.model.parameters(), strict=True))
        seen.append((outcome.skipped, same))
        return outcome

    monkeypatch.setattr(TrainStep, "run", run)
    poison(monkeypatch, 3)
    result = run_pretraining(make_config(max_skipped_steps=1))
    assert result.steps == 8
    assert [pair for pair in seen if pair[0]] == [(True, True)]
    assert not any(same for skipped, same in seen if not skipped)


def test_steps_that_are_skipped_push_no_good_checkpoint_out(make_config, monkeypatch):
    original = TrainStep.run
    calls = iter(range(1, 10**6))
    monkeypatch.setattr(  # the fifth update breaks the weights
        TrainStep, "run", lambda self, batch, factor: original(self, batch, 1e32 if next(calls) == 5 else factor)
    )
    config = make_config(max_skipped_steps=9, checkpoint_steps=1, keep_last=3, max_grad_norm=None, eval_steps=0)
    run_pretraining(config)
    steps = read_metrics(Path(config.output_dir) / "metrics.jsonl")[0]
    assert [entry["skipped"] for entry in steps] == [False] * 5 + [True] * 3
    kept = complete_checkpoints(Path(config.output_dir) / "checkpoints")
    assert [path.name[-1] for path in kept] == ["4", "5", "8"]  # the last one for the run's end


def test_evaluation_leaves_no_trace(make_config, tmp_path):
    often = run_pretraining(make_config(output_dir=str(tmp_path / "often"), eval_steps=1))
    never = run_pretraining(make_config(output_dir=str(tmp_path / "never"), eval_steps=0))
    assert [e for e in curve(often.output_dir) if "eval" not in e] == curve(never.output_dir)


def test_continuing_from_a_model(make_config, tmp_path):
    first = run_pretraining(make_config(output_dir=str(tmp_path / "first")))
    config = make_config(output_dir=str(tmp_path / "second"), model_name_or_path=str(first.model_dir))
    second = run_pretraining(config)
    assert second.first_eval == pytest.approx(first.last_eval, rel=1e-5)


def test_uneven_ranks_are_refused(make_config, monkeypatch):
    config = make_config(batch_tokens=96)
    with pytest.raises(RuntimeError, match="3 rows cannot be shared evenly by 2 ranks"):
        run_distributed(lambda rank: run_pretraining(config), 2, timeout_seconds=60)


def test_ranks_that_cannot_share_a_later_stages_rows_are_refused_at_the_start(make_config):
    tokenizer = SimpleNamespace(pad_token_id=0)
    ranks = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True)
    stages = {"batch_tokens": 64, "sequence_length_stages": {512: 64}}
    with pytest.raises(ValueError, match=r"1 rows cannot be shared evenly by 2 ranks \(rows of 64 tokens\)"):
        open_loader(make_config(**stages), tokenizer, ranks)
    growing = {"batch_tokens_end": 256, "batch_ramp_tokens": 512}
    with pytest.raises(ValueError, match="batch_rows_multiple is 1 for 2 ranks and a growing batch"):
        open_loader(make_config(**growing), tokenizer, ranks)
    open_loader(make_config(**growing, batch_rows_multiple=2), tokenizer, ranks).close()


def test_a_model_that_is_not_there_is_named_with_its_setting(make_config):
    with pytest.raises(ValueError, match="loaded from model_name_or_path '/nowhere'"):
        model_config(make_config(model_name_or_path="/nowhere"))


def test_words_that_ranks_cannot_share_are_refused(make_config):
    config = make_config(tensor_parallel=2, vocab_size=51)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(config))
    with pytest.raises(ValueError, match="vocab_size 51, which it does not divide: set vocab_size 52"):
        split_layers(config, None, model)


def test_another_tokenizer_is_refused(make_config, tmp_path):
    from tests.trainer.data.conftest import make_tokenizer

    make_tokenizer(words=60).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="use the same tokenizer"):
        run_pretraining(make_config(tokenizer=str(tmp_path / "other")))


def test_sources_of_a_recipe_are_tokenised_once(make_config, tmp_path):
    from tests.trainer.data.conftest import make_documents

    for name, shift in (("a", 0), ("b", 3)):
        lines = "".join(json.dumps(document) + "\n" for document in make_documents(100, shift))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    domains = {
        name: {"start": 0.5, "end": 0.5, "sources": [{"path": str(tmp_path / f"{name}.jsonl"), "license": "MIT"}]}
        for name in "ab"
    }
    config = make_config(domains=domains, data_dir=str(tmp_path / "shards"), heldout_fraction=0.2)
    assert run_pretraining(config).steps == 8
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    assert manifest["domains"]["a"]["sources"][0]["license"] == "MIT"


def test_precision_may_differ_between_runs_of_one_process(make_config, tmp_path):
    for precision in ("no", "bf16"):
        config = make_config(output_dir=str(tmp_path / precision), mixed_precision=precision)
        assert run_pretraining(config).steps == 8
    assert trainer.loop.AcceleratorState._shared_state == {}


@pytest.mark.slow
@pytest.mark.distributed
def test_tensor_parallelism_trains_resumes_and_exports_as_one_rank(make_config, tmp_path, monkeypatch):
    """Two ranks share each layer and the same rows; the run is cut after a checkpoint and goes on."""
    settings = {"norm_steps": 2, "micro_batch_tokens": 64, "vocab_size": 52, "checkpoint_steps": 2}
    settings |= {"total_tokens": 128 * 4, "warmup_tokens": 128, "decay_tokens": 128}
    alone = run_pretraining(make_config(output_dir=str(tmp_path / "alone"), **settings))
    config = make_config(output_dir=str(tmp_path / "split"), tensor_parallel=2, **settings)

    def cut_run(rank):
        with monkeypatch.context() as patch:
            kill_at(patch, 4)
            with pytest.raises(Killed):
                run_pretraining(config)

    run_distributed(cut_run, 2)
    assert complete_checkpoints(tmp_path / "split/checkpoints")
    run_distributed(lambda rank: run_pretraining(config).steps, 2)
    pairs = list(zip(curve(alone.output_dir), curve(config.output_dir), strict=True))
    for one, other in pairs:
        for name in ("loss", "loss_by_domain", "grad_norm", "eval"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=2e-5)  # 3e-3 where sums were summed again
    norms = [read_metrics(Path(folder) / "metrics.jsonl")[0][1] for folder in (alone.output_dir, config.output_dir)]
    assert norms[1]["signal_norms"] == pytest.approx(norms[0]["signal_norms"], rel=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(Path(c) / "model") for c in (alone.output_dir, config.output_dir)]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(other, one, rtol=2e-2, atol=2e-4)


@pytest.mark.distributed
def test_tensor_parallelism_keeps_tied_embeddings_tied(make_config, tmp_path):
    """Splitting either matrix by words unties them; a run of another model would train, and export two matrices."""
    settings = {"tie_word_embeddings": True, "vocab_size": 52, "total_tokens": 128 * 4, "checkpoint_steps": 2}
    settings |= {"warmup_tokens": 0, "decay_tokens": 0, "average_every_tokens": 256, "average_checkpoints": 2}
    alone = run_pretraining(make_config(output_dir=str(tmp_path / "alone"), **settings))
    config = make_config(output_dir=str(tmp_path / "split"), tensor_parallel=2, **settings)
    run_distributed(lambda rank: run_pretraining(config).steps, 2)
    for one, other in zip(curve(alone.output_dir), curve(config.output_dir), strict=True):
        for name in ("loss", "grad_norm", "eval"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=2e-5)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("alone", "split")]
    assert weights[0].keys() == weights[1].keys()
    assert "lm_head.weight" not in weights[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel": 2}, "takes all ranks, launched without FSDP; set tensor_parallel 1"),
        ({"tensor_parallel": 2, "compile_layers": True}, "tensor_parallel is 2 with compile_layers True"),
        ({"tensor_parallel": 2, "loss": "chunked"}, "set loss full or auto"),
    ],
)
def test_tensor_parallelism_that_cannot_be_is_refused(make_config, settings, message):
    with pytest.raises(ValueError, match=message):
        run_pretraining(make_config(**settings))
