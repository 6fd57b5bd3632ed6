"""Two ranks under FSDP2 train as one does: the same losses, the same weights, the same heads clipped."""

import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft import reinforce, stage
from sft.callbacks import MetricsCallback
from sft.reinforce import ReinforceConfig, run_reinforce
from sft.stage import run_stage
from tests.distributed import Collectives, run_distributed

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def shard_as_on_accelerators(module, arguments_name: str) -> None:
    """accelerate ignores FSDP on CPU, so the state is told that the ranks are accelerators.

    Args:
        module: that builds the trainer.
        arguments_name: of its function that makes the trainer's arguments.
    """
    os.environ.update(FSDP2)
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments_of = getattr(module, arguments_name)

    def arguments_then_fsdp(*args, **kwargs):
        arguments = arguments_of(*args, **kwargs)
        assert arguments.world_size > 1  # sets up the state that is changed here
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments

    setattr(module, arguments_name, arguments_then_fsdp)


def run_reinforce_sharded(rank: int, config: ReinforceConfig) -> set[str]:
    """One rank of DPO or GRPO; returns the kinds of the parameters of the model and of the one it started from."""
    shard_as_on_accelerators(reinforce, "_arguments")
    build, trainers = reinforce.build_reinforce_trainer, []

    def build_and_keep(*arguments):
        trainers.append(build(*arguments))
        return trainers[0]

    reinforce.build_reinforce_trainer = build_and_keep
    run_reinforce(config)
    models = (trainers[0].model_wrapped, trainers[0].ref_model)
    return {type(parameter).__name__ for model in models for parameter in model.parameters()}


def run_sharded(rank: int, config) -> bool:
    """One rank of a stage."""
    shard_as_on_accelerators(stage, "trl_arguments")
    sharded = []
    build = stage.build_trainer

    def build_and_look(*arguments):
        trainer = build(*arguments)
        train = trainer.train

        def train_and_look(**options):
            output = train(**options)
            sharded.extend(type(parameter).__name__ for parameter in trainer.model_wrapped.parameters())
            return output

        trainer.train = train_and_look
        return trainer

    stage.build_trainer = build_and_look
    run_stage(config)
    return "DTensor" in sharded


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(Path(folder) / "model").state_dict()


@pytest.mark.distributed
def test_two_ranks_equal_one(settings):
    clip = {"qk_clip_threshold": 0.02, "max_steps": 3}
    one = run_stage(settings("one", gradient_accumulation_steps=2, **clip))
    two = settings("two", gradient_accumulation_steps=1, **clip)
    assert run_distributed(run_sharded, 2, two) == [True, True]
    lines = [lines_of(folder) for folder in (one.output_dir, two.output_dir)]
    for alone, together in zip(*lines, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert together["clipped_heads"] == alone["clipped_heads"]
        assert together["max_logits"] == pytest.approx(alone["max_logits"], rel=1e-4), "of all ranks' batches"
    expected = weights(one.output_dir)
    for name, value in weights(two.output_dir).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.distributed
def test_evaluations_leave_no_trace_in_the_steps_after_them_and_losses_are_not_rounded(settings, workplace):
    def counted(rank, config):
        step, compute, gathers, types = stage.StageTrainer.training_step, stage.StageTrainer.compute_loss, [], set()

        def training_step(self, *args, **kwargs):
            with Collectives() as seen:
                loss = step(self, *args, **kwargs)
            gathers.append(sum(count for name, count in seen.counts.items() if "gather" in name))
            return loss

        def compute_loss(self, *args, **kwargs):
            loss = compute(self, *args, **kwargs)
            types.add((loss[0] if isinstance(loss, tuple) else loss).dtype)
            return loss

        stage.StageTrainer.training_step, stage.StageTrainer.compute_loss = training_step, compute_loss
        assert run_sharded(rank, config)
        return gathers, types

    held_out = [str(workplace / "eval.jsonl")]
    config = settings(eval_files=held_out, eval_steps=2, save_steps=2, dtype="bfloat16")
    (gathers, types), _ = run_distributed(counted, 2, config)
    assert len(gathers) == 8
    assert len(set(gathers)) == 1
    assert gathers[0] > 1
    assert types == {torch.float32}


@pytest.fixture
def reinforcement(workplace, tmp_path):
    """Make the settings of DPO or GRPO; keyword arguments win."""

    def make(method: str, name: str, **changes) -> ReinforceConfig:
        defaults = {
            "method": method,
            "model_name_or_path": str(workplace / "base"),
            "output_dir": str(tmp_path / name),
            "num_problems": 16,
            "max_steps": 3,
            "batch_size": 2,
            "num_generations": 2,
            "max_answer_tokens": 6,
            "learning_rate": 2e-3,
            "kernels": "torch",
            "use_cpu": True,
        }
        return ReinforceConfig(**(defaults | changes))

    return make


@pytest.mark.distributed
def test_a_model_equals_the_one_it_starts_from_in_bfloat16_too(reinforcement):
    """Rounded as accelerate's policy asks, the first model's answers alone would be another's."""
    config = reinforcement("dpo", "dpo", max_steps=1, bf16=True)
    assert run_distributed(run_reinforce_sharded, 2, config) == [{"DTensor"}] * 2
    (line,) = lines_of(config.output_dir)
    assert line["rewards/margins"] == 0
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_two_ranks_reinforce_go_on_and_export(reinforcement, workplace, method):
    two = reinforcement(method, "two", save_steps=2)
    assert run_distributed(run_reinforce_sharded, 2, two) == [{"DTensor"}] * 2
    broken = replace(two, output_dir=f"{two.output_dir}_broken", resume=True)
    shutil.copytree(two.output_dir, broken.output_dir, ignore=shutil.ignore_patterns("model", "checkpoint-3"))
    assert run_distributed(run_reinforce_sharded, 2, broken) == [{"DTensor"}] * 2
    assert [line["loss"] for line in lines_of(broken.output_dir)] == [
        line["loss"] for line in lines_of(two.output_dir)
    ]
    found, base = weights(two.output_dir), AutoModelForCausalLM.from_pretrained(workplace / "base").state_dict()
    assert any(not torch.equal(value, base[name]) for name, value in found.items())
    for name, value in weights(broken.output_dir).items():
        torch.testing.assert_close(value, found[name], rtol=0, atol=0, msg=name)
    if method == "grpo":  # ranks sample other answers than one does
        return
    one = reinforcement(method, "one", batch_size=4)
    run_reinforce(one)
    for alone, together in zip(lines_of(one.output_dir), lines_of(two.output_dir), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
            assert together[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-5), name
    for name, value in weights(one.output_dir).items():
        torch.testing.assert_close(value, found[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.distributed
@pytest.mark.slow
def test_sharded_run_goes_on_where_it_stopped(settings):
    whole = settings("whole", gradient_accumulation_steps=1, save_steps=2, max_steps=3)
    broken = settings("broken", gradient_accumulation_steps=1, save_steps=2, max_steps=3)

    def stopped(rank, config):
        def stop(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise InterruptedError

        MetricsCallback.on_step_begin = stop
        with pytest.raises(InterruptedError):
            run_sharded(rank, config)
        return True

    assert run_distributed(run_sharded, 2, whole) == [True, True]
    assert run_distributed(stopped, 2, broken) == [True, True]
    lower = replace(
        broken, resume=True, learning_rate=broken.learning_rate / 2, output_dir=f"{broken.output_dir}_lower"
    )
    shutil.copytree(broken.output_dir, lower.output_dir)
    assert run_distributed(run_sharded, 2, replace(broken, resume=True)) == [True, True]
    assert run_distributed(run_sharded, 2, lower) == [True, True]
    assert [line["loss"] for line in lines_of(broken.output_dir)] == [
        line["loss"] for line in lines_of(whole.output_dir)
    ]
    expected = weights(whole.output_dir)
    for name, value in weights(broken.output_dir).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
    rates = [lines_of(run.output_dir)[-1]["learning_rate"] for run in (broken, lower)]
    assert rates[1] == rates[0] / 2, "a new rate counts from the checkpoint on"
    before = weights(broken.output_dir)
    assert any(not torch.equal(value, before[name]) for name, value in weights(lower.output_dir).items())


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_in_fp8_equal_one(settings, workplace, tmp_path):
    """FP8 products, MuonClip with QK-clip and sharded parameters together; the products are emulated."""
    pytest.importorskip("torchao")
    config = AutoConfig.from_pretrained(workplace / "base", head_dim=16)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(workplace / "base").save_pretrained(tmp_path / "base")
    common = {"model_name_or_path": str(tmp_path / "base"), "qk_clip_threshold": 0.02, "max_steps": 3}
    low = {"fp8": "rowwise_with_gw_hp", "fp8_skip_edge_layers": 0, "fp8_emulate": True}
    plain = run_stage(settings("plain", gradient_accumulation_steps=2, **common))
    one = run_stage(settings("one", gradient_accumulation_steps=2, **common, **low))
    two = settings("two", gradient_accumulation_steps=1, **common, **low)
    assert run_distributed(run_sharded, 2, two) == [True, True]
    alone, together = lines_of(one.output_dir), lines_of(two.output_dir)
    assert alone[0]["loss"] != lines_of(plain.output_dir)[0]["loss"]
    assert [line["loss"] for line in together] == pytest.approx([line["loss"] for line in alone], abs=1e-4)
    assert [line["clipped_heads"] for line in together] == [line["clipped_heads"] for line in alone]
    assert sum(line["clipped_heads"] for line in together) > 0
    expected = weights(one.output_dir)
    assert {name: value.shape for name, value in weights(two.output_dir).items()} == {
        name: value.shape for name, value in expected.items()
    }


@pytest.mark.distributed
@pytest.mark.slow
def test_sharded_adapters_are_merged_whole(settings, workplace):
    config = settings(lora_rank=4, optimizer="adamw", max_steps=2)
    assert run_distributed(run_sharded, 2, config) == [True, True]
    base = AutoModelForCausalLM.from_pretrained(workplace / "base").state_dict()
    merged = weights(config.output_dir)
    changed = {name for name, value in base.items() if not torch.equal(value, merged[name])}
    assert changed == {name for name in base if any(target in name for target in config.lora_target_modules)}


@pytest.mark.distributed
def test_ranks_stop_together_at_a_loss_that_is_no_number(settings):
    """One rank alone sees it; the other must not wait for it in the next collective."""

    def spoilt(rank, config):
        compute = stage.StageTrainer.compute_loss

        def compute_loss(self, *args, **kwargs):
            loss = compute(self, *args, **kwargs)
            return loss * float("nan") if rank == 1 and self.state.global_step == 1 else loss

        stage.StageTrainer.compute_loss = compute_loss
        try:
            run_sharded(rank, config)
        except FloatingPointError as error:
            return str(error)

    config = settings(gradient_accumulation_steps=1, max_steps=3)
    messages = run_distributed(spoilt, 2, config)
    assert messages[0] == messages[1]
    assert messages[0].startswith("the loss is nan at update 2")
    assert not (Path(config.output_dir) / "model").exists()
