"""The pre-trainer under accelerate's own FSDP2 path, as the accelerate file of a node says, on two CPU ranks."""

from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import trainer.loop
from modeling_motif2.modeling_motif2 import Motif2DecoderLayer
from tests.distributed import run_distributed
from tests.trainer.test_loop import Killed, curve, kill_at
from trainer.assemble import make_accelerator
from trainer.loop import run_pretraining
from trainer.step import TrainStep

FILE = Path(__file__).resolve().parents[2] / "recipes/accelerate/fsdp2_node.yaml"


def shard_as_the_file_says(monkeypatch) -> None:
    """In this rank, let accelerate shard on the CPU: it takes up what `accelerate launch` sets only beside a GPU."""
    arguments = launch_command_parser().parse_args(["--config_file", str(FILE), "-m", "trainer.pretrain"])
    for name, value in prepare_multi_gpu_env(_validate_launch_command(arguments)[0]).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)

    def sharding(config):
        accelerator = make_accelerator(config)
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        if config.mixed_precision != "no":
            plugin.set_mixed_precision(config.mixed_precision)
        return accelerator

    monkeypatch.setattr(trainer.loop, "make_accelerator", sharding)


def look_at_the_model(monkeypatch) -> None:
    """Make sure in every step that each layer and its weights are sharded."""
    original = TrainStep.run

    def run(self, batch, factor):
        layers = [module for module in self.model.modules() if isinstance(module, Motif2DecoderLayer)]
        assert len(layers) == 2
        assert all(isinstance(module, FSDPModule) for module in (self.model, *layers))
        assert all(isinstance(parameter, DTensor) for layer in layers for parameter in layer.parameters())
        return original(self, batch, factor)

    monkeypatch.setattr(TrainStep, "run", run)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True, "micro_batch_tokens": 32},
        pytest.param({"optimizer": "adamw", "gradient_checkpointing": "selective"}, marks=pytest.mark.slow),
    ],
    ids=["muon_clip_tied", "adamw"],
)
def test_sharded_by_accelerate_a_run_trains_resumes_and_exports_as_one_rank(
    make_config, tmp_path, monkeypatch, settings
):
    length = {"total_tokens": 128 * 4, "warmup_tokens": 0, "decay_tokens": 0, "checkpoint_steps": 2}
    alone = make_config(output_dir=str(tmp_path / "alone"), **length, **settings)
    run_pretraining(alone)
    config = make_config(output_dir=str(tmp_path / "sharded"), **length, **settings)

    def cut_and_go_on(rank):
        shard_as_the_file_says(monkeypatch)
        look_at_the_model(monkeypatch)
        with monkeypatch.context() as patch:
            kill_at(patch, 4)
            with pytest.raises(Killed):
                run_pretraining(config)
        run_pretraining(config)

    run_distributed(cut_and_go_on, 2)
    for one, other in zip(curve(alone.output_dir), curve(config.output_dir), strict=True):
        for name in ("loss", "loss_by_domain", "grad_norm", "max_logits", "eval"):
            if name in one:
                assert other[name] == pytest.approx(one[name], rel=2e-5)
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("alone", "sharded")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=2e-2, atol=2e-4)
