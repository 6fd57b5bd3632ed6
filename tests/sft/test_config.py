"""Settings that cannot work are refused with the mend, and a batch in tokens becomes micro-steps."""

import re

import pytest
import torch
from transformers import get_scheduler

from sft.config import LR_SCHEDULERS, SftStageConfig
from trainer.cli import parse_recipe

NEEDED = {"model_name_or_path": "m", "output_dir": "o", "train_files": ["t.jsonl"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_dir": ""}, "output_dir is empty"),
        ({"train_files": []}, "train_files is empty"),
        ({"bad_rows": "ignore"}, "bad_rows is 'ignore'; use one of skip, refuse"),
        ({"kernels": "magic"}, "kernels is 'magic'; use one of auto"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"warmup_ratio": 1.0}, "warmup_ratio is 1.0"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"num_epochs": 0}, "num_epochs is 0"),
        ({"num_epochs": float("nan"), "max_steps": 3}, "num_epochs is nan; use a finite number"),
        ({"num_epochs": float("inf")}, "num_epochs is inf; use a finite number"),
        ({"lr_scheduler": "cosin"}, "lr_scheduler is 'cosin'; use one of cosine, linear"),
        ({"report_to": "wandbb"}, "report_to is 'wandbb', no tracker that is installed here"),
        ({"seed": -1}, "seed is -1; use 0 to"),
        ({"eval_steps": 5}, "eval_steps is 5 and eval_files is empty; name files"),
        ({"per_device_batch_size": 0}, "per_device_batch_size is 0"),
        ({"lora_rank": 8}, "set optimizer: adamw"),
        ({"optimizer": "adamw", "adamw_learning_rate": 1e-3}, "which has one rate; set learning_rate"),
        ({"fp8": "tensorwise"}, "fp8 is 'tensorwise'; use one of none, rowwise"),
        ({"lora_rank": 8, "optimizer": "adamw", "fp8": "rowwise"}, "set fp8 none"),
        ({"global_batch_tokens": 1 << 20, "gradient_accumulation_steps": 2}, "both set the batch"),
    ],
)
def test_bad_values_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        SftStageConfig(**(NEEDED | settings))


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_schedule_that_is_offered_can_be_made(name):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
    assert schedule.base_lrs == [1.0], "a continuation sets the peak anew"


def test_batch_in_tokens_becomes_micro_steps():
    config = SftStageConfig(**NEEDED, global_batch_tokens=1 << 25, per_device_batch_size=2, max_length=16_384)
    assert config.accumulation_steps(world_size=64) == 16
    assert config.batch_tokens(world_size=64) == 1 << 25
    with pytest.raises(ValueError, match=r"not a multiple .* = 98304; use 33521664"):
        config.accumulation_steps(world_size=3)


def test_saved_settings_are_a_recipe(tmp_path):
    config = SftStageConfig(**NEEDED, learning_rate=1e-3, lora_rank=4, optimizer="adamw", max_steps=5)
    config.save(tmp_path / "config.yaml")
    (again,) = parse_recipe(SftStageConfig, description="", argv=["--config", str(tmp_path / "config.yaml")])
    assert again == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train_files: rows.jsonl", r"train_files: 'rows.jsonl' in .* is a str; write a list, each entry text"),
        ("max_steps: many", r"max_steps: 'many' in .* cannot be read"),
        ("max_steps: 2.5", r"max_steps: 2.5 in .* is a float; write a whole number"),
        ("learning_rate: null", r"learning_rate: None in .* is empty; write a number"),
        ("packing: 3", r"packing: 3 in .* write true or false"),
        ("output_dir: [a]", r"output_dir: \['a'\] in .* is a list; write text"),
    ],
)
def test_recipe_values_of_another_type_name_key_value_and_mend(tmp_path, capsys, line, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{line}\n")
    with pytest.raises(SystemExit):
        parse_recipe(SftStageConfig, description="", argv=["--config", str(recipe)])
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))
