"""Two ranks under FSDP2 train as one does: the same losses, the same weights, the same heads clipped."""

import json
import os
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import AutoModelForCausalLM

from sft import stage
from sft.stage import run_stage
from tests.distributed import run_distributed

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def run_sharded(rank: int, config) -> bool:
    """One rank of a stage; accelerate ignores FSDP on CPU, so the state is told that the ranks are accelerators."""
    os.environ.update(FSDP2)
    AcceleratorState._reset_state(reset_partial_state=True)
    arguments_of = stage.trl_arguments

    def arguments_then_fsdp(config):
        arguments = arguments_of(config)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return arguments

    stage.trl_arguments = arguments_then_fsdp
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
    return set(sharded) == {"DTensor"}


@pytest.mark.distributed
def test_two_ranks_equal_one(settings):
    clip = {"qk_clip_threshold": 0.02, "max_steps": 3}
    one = run_stage(settings("one", gradient_accumulation_steps=2, **clip))
    two = settings("two", gradient_accumulation_steps=1, **clip)
    assert run_distributed(run_sharded, 2, two) == [True, True]
    lines = [
        [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        for folder in (one.output_dir, two.output_dir)
    ]
    for alone, together in zip(*lines, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-4)
        assert together["clipped_heads"] == alone["clipped_heads"]
    expected = AutoModelForCausalLM.from_pretrained(one.model_dir).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(Path(two.output_dir) / "model").state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)
