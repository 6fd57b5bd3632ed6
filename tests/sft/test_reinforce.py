"""DPO and GRPO run with MuonClip; rewards and pairs are right; DPO learns to prefer the true answer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.examples import worked_solution_problem
from sft.reinforce import ReinforceConfig, answer_reward, main, preference_pairs, run_reinforce
from trainer.cli import parse_recipe
from trainer.data.arithmetic import generate_problems

RECIPES = Path(__file__).parents[2] / "recipes" / "sft"


@pytest.fixture
def config(workplace, tmp_path):
    def make(method: str, **changes) -> ReinforceConfig:
        settings = {
            "method": method,
            "model_name_or_path": str(workplace / "base"),
            "output_dir": str(tmp_path / method),
        }
        settings |= {"num_problems": 16, "max_steps": 1, "batch_size": 4, "num_generations": 2, "max_answer_tokens": 6}
        return ReinforceConfig(**(settings | {"kernels": "torch", "use_cpu": True} | changes))

    return make


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("4 + 3 = 7.\n#### 7", 1.0),
        ("#### 7\n", 1.0),
        ("#### 17", 0.0),
        ("#### 7 or 8", 0.0),
        ("7", 0.0),
        ("it is 7", 0.0),
    ],
)
def test_reward_is_for_the_right_number_alone(text, reward):
    assert answer_reward([[{"role": "assistant", "content": text}]], [7]) == [reward]


def test_rejected_answers_are_wrong_and_chosen_ones_right():
    problems = generate_problems(seed=0, count=100)
    for problem, pair in zip(problems, preference_pairs(problems, seed=0), strict=True):
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert worked_solution_problem(chosen) is None
        assert worked_solution_problem(rejected) == "incoherent"
        assert answer_reward([pair["chosen"], pair["rejected"]], [problem.answer] * 2) == [1.0, 0.0]


def test_dpo_learns_to_prefer_the_true_answer(config):
    run = config("dpo", max_steps=6, learning_rate=2e-3)
    run_reinforce(run)
    lines = [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all("clipped_heads" in line for line in lines)
    with pytest.raises(ValueError, match="holds a finished run"):
        run_reinforce(run)


def test_grpo_takes_an_update_with_muon_clip(config, workplace, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "sft.reinforce.answer_reward", lambda completions, **_: calls.append(1) or [0.0, 1.0] * (len(completions) // 2)
    )
    model_dir = run_reinforce(config("grpo", max_steps=2))
    before = AutoModelForCausalLM.from_pretrained(workplace / "base").state_dict()
    after = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert calls
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ppo"}, "method is 'ppo'; use one of dpo, grpo"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"num_generations": 3}, "divide batch_size"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"kernels": "fast"}, "kernels is 'fast'; use one of auto"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_bad_settings_are_named(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**({"method": "dpo"} | settings))


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_recipes_load(method):
    words = ["--config", str(RECIPES / f"{method}_arithmetic.yaml")]
    assert parse_recipe(ReinforceConfig, description="", argv=words)[0].method == method


@pytest.mark.parametrize(("method", "shown"), [("dpo", "[rejected]"), ("grpo", "[rewarded]")])
def test_dry_run_shows_an_example_and_writes_nothing(method, shown, capsys, tmp_path):
    words = ["--config", str(RECIPES / f"{method}_arithmetic.yaml"), "--dry_run", "--output_dir", str(tmp_path / "x")]
    main(words)
    out = capsys.readouterr().out
    assert shown in out
    assert f"method: {method}" in out
    assert not (tmp_path / "x").exists()


def test_entry_point_names_mistakes(capsys):
    with pytest.raises(SystemExit):
        main(["--methd", "dpo"])
    assert "did you mean 'method'" in capsys.readouterr().err
