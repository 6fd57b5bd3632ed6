"""Every fine-tuning recipe loads, says what it needs, and the full-size ones carry the report's numbers."""

import re
from pathlib import Path

import pytest

from sft.config import SftStageConfig
from sft.curate import CurateConfig
from sft.prepare import PrepareConfig
from sft.prune import PruneConfig
from trainer.cli import parse_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "sft"
TASK_FILES = (FOLDER.parents[1] / "eval_harness" / "tasks").glob("*.yaml")
TASKS = {
    name for file in TASK_FILES for name in re.findall(r"^(?:task|group): (\w+)$", file.read_text(), re.MULTILINE)
}
STAGES = sorted(FOLDER.glob("*stage[123]*.yaml"))
STAGES = [path for path in STAGES if not path.name.startswith("prepare")]


def load(path: Path) -> SftStageConfig:
    return parse_recipe(SftStageConfig, description="", argv=["--config", str(path)])[0]


def test_each_stage_has_four_sizes():
    names = {path.stem for path in STAGES}
    assert names >= {f"stage{n}" for n in (1, 2, 3)} | {f"stage{n}_lora" for n in (1, 2, 3)}
    assert names >= {f"{size}_stage{n}" for n in (1, 2, 3) for size in ("small", "cpu")}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_recipe_loads_and_says_what_it_needs(path):
    config = load(path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Hardware:", "Time:", "Launch:", "Evaluation:", "Report:"):
        assert any(word in line for line in header), word
    assert config.output_dir == f"runs/sft/{path.stem}"
    assert config.packing
    assert config.batch_tokens(world_size=1) >= config.max_length
    assert config.eval_tasks, "every stage is measured before and after"
    assert set(config.eval_tasks) <= TASKS


def test_full_size_stage_1_is_the_report():
    config = load(FOLDER / "stage1.yaml")
    assert (config.optimizer, config.learning_rate, config.weight_decay) == ("muon_clip", 2e-5, 0.1)
    assert (config.max_length, config.packing, config.warmup_ratio) == (16_384, True, 0.05)
    assert (config.lr_scheduler, config.lora_rank) == ("cosine", 0)
    assert config.batch_tokens(world_size=64) == pytest.approx(32e6, rel=0.05)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp8_changes_the_precision_alone(stage):
    plain, low = vars(load(FOLDER / f"stage{stage}.yaml")), vars(load(FOLDER / f"stage{stage}_fp8.yaml"))
    changed = {name for name in plain if plain[name] != low[name]}
    assert changed - {"model_name_or_path", "output_dir"} == {"fp8"}
    assert low["fp8"] == "rowwise_with_gw_hp"


@pytest.mark.parametrize("devices", [8, 64])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_full_size_batches_divide_over_one_node_and_eight(stage, devices):
    config = load(FOLDER / f"stage{stage}.yaml")
    assert config.batch_tokens(world_size=devices) == config.global_batch_tokens


@pytest.mark.parametrize("name", ["stage{}", "stage{}_lora", "stage{}_fp8", "small_stage{}", "cpu_stage{}"])
def test_later_stages_are_gentler_and_start_where_the_one_before_ended(name):
    one, two, three = (load(FOLDER / f"{name.format(number)}.yaml") for number in (1, 2, 3))
    assert one.learning_rate > two.learning_rate > three.learning_rate
    if one.max_steps == -1:  # shorter by their data: stage 2 keeps half, stage 3 prunes what is left
        assert two.max_steps == three.max_steps == -1
        assert one.num_epochs >= two.num_epochs >= three.num_epochs
    else:
        assert one.max_steps > two.max_steps > three.max_steps
    assert two.model_name_or_path == f"{one.output_dir}/model"
    assert three.model_name_or_path == f"{two.output_dir}/model"


@pytest.mark.parametrize(
    ("name", "config_class"),
    [("prepare_stage1", PrepareConfig), ("prepare_stage2", CurateConfig), ("prepare_stage3", PruneConfig)],
)
def test_data_recipes_feed_the_stages(name, config_class):
    config = parse_recipe(config_class, description="", argv=["--config", str(FOLDER / f"{name}.yaml")])[0]
    stage = load(FOLDER / f"{name.removeprefix('prepare_')}.yaml")
    assert stage.train_files == [f"{config.output_dir}/train.jsonl"]
