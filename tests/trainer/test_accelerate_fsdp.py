"""The pre-trainer under accelerate's own FSDP2 and HSDP, as the accelerate files say, on two and four CPU ranks."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

import trainer.loop
from modeling_motif2.modeling_motif2 import Motif2DecoderLayer
from tests.distributed import run_distributed
from tests.trainer.test_loop import Killed, curve, kill_at
from trainer.assemble import make_accelerator
from trainer.loop import run_pretraining
from trainer.sharding import keep_losses_in_float32
from trainer.step import TrainStep

FILES = Path(__file__).resolve().parents[2] / "recipes/accelerate"
SHARDS = 2


def shard_as_the_file_says(monkeypatch, file: str, num_ranks: int) -> None:
    """In this rank, let accelerate shard on the CPU: it takes up what `accelerate launch` sets only beside a GPU.

    Args:
        monkeypatch: pytest's.
        file: accelerate file; where it asks for replicas, there are as many as `SHARDS` leaves.
        num_ranks: of this test.
    """
    command = ["--config_file", str(FILES / file), "--main_process_ip", "127.0.0.1", "-m", "trainer.pretrain"]
    variables = prepare_multi_gpu_env(_validate_launch_command(launch_command_parser().parse_args(command))[0])
    for name, value in variables.items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    replicated = int(variables.get("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", 1)) > 1
    assert replicated == (num_ranks > SHARDS)

    def sharding(config):
        accelerator = make_accelerator(config)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        if replicated:
            assert variables["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
            layout = ParallelismConfig(dp_replicate_size=num_ranks // SHARDS, dp_shard_size=SHARDS)
            mesh = layout.get_device_mesh("cpu")
            AcceleratorState._shared_state.update(parallelism_config=layout, device_mesh=mesh)
        if config.mixed_precision != "no":
            plugin.set_mixed_precision(config.mixed_precision)
        return accelerator

    monkeypatch.setattr(trainer.loop, "make_accelerator", sharding)


def look_at_the_model(monkeypatch, num_ranks: int) -> None:
    """Make sure in every step that each layer and its weights are sharded, or copied where there are more ranks."""
    original, placements = TrainStep.run, (Shard(0),) if num_ranks == SHARDS else (Replicate(), Shard(0))

    def run(self, batch, factor):
        layers = [module for module in self.model.modules() if isinstance(module, Motif2DecoderLayer)]
        assert len(layers) == 2
        assert all(isinstance(module, FSDPModule) for module in (self.model, *layers))
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        assert all(isinstance(parameter, DTensor) and parameter.placements == placements for parameter in parameters)
        return original(self, batch, factor)

    monkeypatch.setattr(TrainStep, "run", run)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("file", "num_ranks", "settings"),
    [
        ("fsdp2_node.yaml", 2, {"tie_word_embeddings": True, "micro_batch_tokens": 32}),
        pytest.param(
            "fsdp2_node.yaml",
            2,
            {"optimizer": "adamw", "gradient_checkpointing": "selective"},
            marks=pytest.mark.slow,
        ),
        pytest.param("hsdp_nodes.yaml", 4, {"micro_batch_tokens": 32}, marks=pytest.mark.slow),
    ],
    ids=["muon_clip_tied", "adamw", "hsdp"],
)
def test_sharded_by_accelerate_a_run_trains_resumes_and_exports_as_one_rank(
    make_config, tmp_path, monkeypatch, file, num_ranks, settings
):
    length = {"total_tokens": 128 * 4, "warmup_tokens": 0, "decay_tokens": 0, "checkpoint_steps": 2}
    alone = make_config(output_dir=str(tmp_path / "alone"), **length, **settings)
    run_pretraining(alone)
    config = make_config(output_dir=str(tmp_path / "sharded"), **length, **settings)

    def cut_and_go_on(rank):
        shard_as_the_file_says(monkeypatch, file, num_ranks)
        look_at_the_model(monkeypatch, num_ranks)
        with monkeypatch.context() as patch:
            kill_at(patch, 4)
            with pytest.raises(Killed):
                run_pretraining(config)
        run_pretraining(config)

    run_distributed(cut_and_go_on, num_ranks)
    for one, other in zip(curve(alone.output_dir), curve(config.output_dir), strict=True):
        for name in ("loss", "loss_by_domain", "grad_norm", "max_logits", "eval"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=2e-5)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("alone", "sharded")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=2e-2, atol=2e-4)


@pytest.mark.distributed
@pytest.mark.slow
def test_losses_of_sharded_layers_in_bfloat16_are_not_rounded(make_config, tmp_path, monkeypatch):
    length = {"total_tokens": 256, "warmup_tokens": 0, "decay_tokens": 0, "mixed_precision": "bf16"}
    config = make_config(output_dir=str(tmp_path / "sharded"), **length)
    original = TrainStep.token_losses

    def token_losses(self, *args, **kwargs):
        losses, counted = original(self, *args, **kwargs)
        assert losses.dtype == torch.float32
        return losses, counted

    def sharded(rank):
        shard_as_the_file_says(monkeypatch, "fsdp2_node.yaml", SHARDS)
        monkeypatch.setattr(TrainStep, "token_losses", token_losses)
        run_pretraining(config)

    run_distributed(sharded, SHARDS)
    assert [entry["step"] for entry in curve(config.output_dir) if "loss" in entry] == [1, 2]


def test_fsdp2_hands_out_losses_as_the_model_gives_them():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16
    keep_losses_in_float32(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.output_dtype, policy.param_dtype, policy.reduce_dtype) == (None, torch.bfloat16, torch.bfloat16)
    keep_losses_in_float32(None)
