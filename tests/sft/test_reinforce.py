"""DPO and GRPO run with MuonClip; rewards and pairs are right; DPO learns to prefer the true answer."""

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernels_hub import KernelChoice
from sft.examples import worked_solution_problem
from sft.reinforce import (
    ReinforceConfig,
    answer_reward,
    build_reinforce_trainer,
    main,
    preference_pairs,
    run_reinforce,
)
from sft.stage import load_tokenizer
from trainer.cli import parse_recipe
from trainer.data.arithmetic import Problem, generate_problems

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


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_the_first_model_is_not_spread_over_devices(config, method, monkeypatch):
    """On CPUs nothing is; with GPUs TRL would spread it under FSDP."""
    module = importlib.import_module(f"trl.trainer.{method}_trainer")
    load, asked = module.create_model_from_path, []

    def note(path, **options):
        asked.append(options)
        return load(path, **options)

    monkeypatch.setattr(module, "create_model_from_path", note)
    settings = config(method)
    trainer = build_reinforce_trainer(settings, load_tokenizer(settings.model_name_or_path))
    assert [options["device_map"] for options in asked] == [None]
    assert trainer.ref_model is not None


def test_rejected_answers_are_wrong_and_chosen_ones_right():
    problems = generate_problems(seed=0, count=100)
    for problem, pair in zip(problems, preference_pairs(problems, seed=0), strict=True):
        chosen, rejected = (pair[side][0]["content"] for side in ("chosen", "rejected"))
        assert worked_solution_problem(chosen) is None
        assert worked_solution_problem(rejected) == "incoherent"
        assert answer_reward([pair["chosen"], pair["rejected"]], [problem.answer] * 2) == [1.0, 0.0]


def lines_of(run: ReinforceConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def test_dpo_learns_to_prefer_the_true_answer(config):
    run = config("dpo", max_steps=6, learning_rate=2e-3)
    run_reinforce(run)
    lines = lines_of(run)
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all("clipped_heads" in line for line in lines)
    with pytest.raises(ValueError, match="holds a finished run"):
        run_reinforce(run)


def test_an_interrupted_run_goes_on_to_the_same_losses(config):
    whole = config("dpo", max_steps=3, save_steps=2, output_dir=config("dpo").output_dir + "_whole")
    run_reinforce(whole)
    broken = replace(whole, output_dir=config("dpo").output_dir, resume=True)
    rest = shutil.ignore_patterns("model", "checkpoint-3")
    shutil.copytree(whole.output_dir, broken.output_dir, ignore=rest)
    with pytest.raises(ValueError, match="holds an unfinished run; set resume: true"):
        run_reinforce(replace(broken, resume=False))
    with pytest.raises(ValueError, match="num_problems is 17 and was 16: set them back"):
        run_reinforce(replace(broken, num_problems=17))
    run_reinforce(broken)
    assert [line["loss"] for line in lines_of(broken)] == [line["loss"] for line in lines_of(whole)]


def test_a_model_of_no_numbers_stops_before_anything_is_written(config, workplace, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "spoilt")
    AutoTokenizer.from_pretrained(workplace / "base").save_pretrained(tmp_path / "spoilt")
    run = config("dpo", model_name_or_path=str(tmp_path / "spoilt"))
    with pytest.raises(FloatingPointError, match="the loss is nan at update 1"):
        run_reinforce(run)
    assert not (Path(run.output_dir) / "model").exists()


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_a_kernel_that_does_not_run_stops_the_run(config, method, monkeypatch):
    """The model says it runs a kernel, but torch runs."""
    monkeypatch.setattr("kernels_hub.loader.polynorm_in_use", lambda model: KernelChoice("local", "nowhere", 2))
    with pytest.raises(AssertionError, match="PolyNorm was to run"):
        run_reinforce(config(method))


def test_a_model_without_weights_is_named(config, workplace, tmp_path):
    shutil.copytree(workplace / "base", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"no model can be loaded from model_name_or_path .*empty.* with weights"):
        run_reinforce(config("dpo", model_name_or_path=str(tmp_path / "empty")))


def test_the_lock_of_kernels_reaches_the_loader(config):
    with pytest.raises(ValueError, match=r"some.lock locks kernels, and source is 'torch'"):
        run_reinforce(config("dpo", kernels="torch", kernels_lock="some.lock"))


def answers_by_hand(trainer, problems: dict[str, Problem], right: list[bool]):
    """Sampling replaced: the worked solution of each prompt's problem, or one with a wrong last line, in turn."""
    tokenizer = trainer.processing_class

    def generate(prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        completions = []
        for ids, is_right in zip(prompt_ids, right, strict=True):
            (problem,) = (problem for question, problem in problems.items() if question in tokenizer.decode(ids))
            wrong = problem.solution.rpartition("####")[0] + f"#### {problem.answer + 1}"
            completions.append(tokenizer((problem.solution if is_right else wrong) + "<|endofturn|>")["input_ids"])
        return completions, None

    return generate


def test_grpo_rewards_right_answers_and_makes_them_likelier(config):
    """The reward is the one that is used; the answers are made by hand, so that half of them are right."""
    run = config("grpo", max_steps=8, learning_rate=2e-3, num_problems=2, max_answer_tokens=128)
    Path(run.output_dir).mkdir()
    tokenizer = load_tokenizer(run.model_name_or_path)
    trainer = build_reinforce_trainer(run, tokenizer)
    problems = {problem.question: problem for problem in generate_problems(run.seed, run.num_problems)}
    trainer._generate_single_turn = answers_by_hand(trainer, problems, [True, False, True, False])

    def margin() -> float:
        """Mean over the problems of the right last line's log-probability over the wrong one's."""
        total = 0.0
        for problem in problems.values():
            messages = [{"role": "user", "content": problem.question}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompt += problem.solution.rpartition("####")[0]
            for sign, answer in ((1, problem.answer), (-1, problem.answer + 1)):
                ids = tokenizer(f"{prompt}#### {answer}<|endofturn|>", return_tensors="pt")["input_ids"]
                start = len(tokenizer(prompt)["input_ids"])
                with torch.no_grad():
                    scores = trainer.model(ids.to(trainer.model.device)).logits[0, start - 1 : -1].log_softmax(-1)
                total += sign * scores.gather(1, ids[0, start:, None].to(scores.device)).sum().item()
        return total / len(problems)

    before = margin()
    trainer.train()
    assert margin() > before
    lines = lines_of(run)
    assert [line["reward"] for line in lines] == [0.5] * 8
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["kl"] > 1e-5, "it has left the model that it started from"
    assert all(line["clipped_heads"] == 0 for line in lines)


def test_grpo_samples_and_leaves_a_model(config):
    run = config("grpo", max_steps=2)
    model_dir = run_reinforce(run)
    assert AutoModelForCausalLM.from_pretrained(model_dir).config.use_cache
    assert [line["reward"] for line in lines_of(run)] == [0, 0], "a model that was never trained is never right"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ppo"}, "method is 'ppo'; use one of dpo, grpo"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"method": "grpo", "num_generations": 3}, "divide batch_size"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"kernels": "fast"}, "kernels is 'fast'; use one of auto"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"save_steps": -1}, "save_steps is -1"),
    ],
)
def test_bad_settings_are_named(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**({"method": "dpo"} | settings))


def test_pairs_need_no_generations(config):
    assert config("dpo", batch_size=3, num_generations=8).batch_size == 3


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
