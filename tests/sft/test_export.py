"""A finished stage is usable: its card says what was trained on and what came of it, and the Hub gets all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from sft.evaluation import evaluate_stage
from sft.export import base_repository, push_stage, write_stage_card
from sft.publish import main
from sft.stage import run_stage
from tests.modeling_motif2.recording_hub import RecordingHub
from trainer.data.arithmetic import generate_problems

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def finished(workplace, tmp_path_factory):
    """A stage of adapters with held-out rows, an evaluation and its card."""
    from sft.config import SftStageConfig

    folder = tmp_path_factory.mktemp("export")
    problems = generate_problems(seed=5, count=2, split="heldout")
    lines = [json.dumps({"question": problem.question, "answer": problem.solution}) + "\n" for problem in problems]
    (folder / "arithmetic.jsonl").write_text("".join(lines))
    config = SftStageConfig(
        model_name_or_path=str(workplace / "base"),
        output_dir=str(folder / "stage"),
        train_files=[str(workplace / "train.jsonl")],
        eval_files=[str(workplace / "eval.jsonl")],
        max_length=256,
        max_steps=1,
        optimizer="adamw",
        lora_rank=2,
        kernels="torch",
        dtype="float32",
        gradient_checkpointing=False,
        use_cpu=True,
        preview_samples=0,
        progress=False,
        eval_tasks=["motif2_arithmetic"],
        eval_data_dir=str(folder),
        license="apache-2.0",
    )
    run_stage(config)
    evaluate_stage(config)
    write_stage_card(config.output_dir)
    return config


def test_card_tells_data_licences_and_results(finished):
    card = (Path(finished.output_dir) / "model" / "README.md").read_text()
    for text in (
        "license: apache-2.0",
        "LoRA adapters of rank 2, merged",
        "120 of 120 conversations",
        "| source | conversations |\n|---|---:|\n| generated | 120 |",
        "| license | conversations |\n|---|---:|\n| CC0-1.0 | 120 |",
        "| origin | conversations |\n|---|---:|\n| program | 120 |",
        "1 updates; training loss",
        "Held-out loss",
        "| stage | motif2_arithmetic | exact_match | 2 |",
        "95% interval",
    ):
        assert text in card, text
    assert "base_model" not in card, "it started from no repository"


def test_base_model_is_followed_through_the_stages(tmp_path):
    for stage, base in (("one", "someone/base"), ("two", str(tmp_path / "one" / "model"))):
        (tmp_path / stage / "model").mkdir(parents=True)
        (tmp_path / stage / "config.yaml").write_text(f"model_name_or_path: {base}\n")
    assert base_repository(str(tmp_path / "two" / "model")) == "someone/base"
    assert base_repository(str(tmp_path)) is None
    for gone in ("runs/sft/gone/model", "/gone/model", "./model"):
        assert base_repository(gone) is None


class WriteEndOfTurn(LogitsProcessor):
    """Makes the model write one token three places after the prompt."""

    def __init__(self, token: int, prompt: int):
        self.token, self.position = token, prompt + 3

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self.token if input_ids.shape[1] == self.position else 10] = 0
        return forced


def test_generation_after_loading_ends_with_the_turn(finished):
    folder = Path(finished.output_dir) / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is 1 + 1?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    for name in ("<|endofturn|>", "<|endoftext|>"):
        processor = WriteEndOfTurn(tokenizer.convert_tokens_to_ids(name), length)
        written = model.generate(**prompt, max_new_tokens=20, do_sample=False, logits_processor=[processor])
        assert written.shape[1] == length + 4, name


@pytest.mark.slow
def test_upload_carries_weights_card_template_and_sources(finished, tmp_path):
    """In a process of its own: huggingface_hub reads its endpoint when imported."""
    with RecordingHub() as hub:
        env = os.environ | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_TOKEN": "secret",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "sft.publish", "--run_dir", finished.output_dir, "--license", "apache-2.0"]
        command += ["--push_to_hub", "someone/motif-sft", "--name", "Motif SFT"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("/someone/motif-sft/commit/" + "0" * 40)
    ((repository, message, *_),) = hub.commits
    assert (repository, message) == ("someone/motif-sft", "Upload the model of stage")
    files = hub.files["someone/motif-sft"]
    card = files["README.md"].decode()
    assert "# Motif SFT" in card
    assert "| CC0-1.0 | 120 |" in card
    folder = tmp_path / "download"
    folder.mkdir()
    for path, content in files.items():
        (folder / path).write_bytes(content)
    assert "modeling_motif2.py" in files
    again, saved = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (folder, Path(finished.output_dir) / "model")
    )
    assert all(torch.equal(value, saved[name]) for name, value in again.items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "<|startofturn|>" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    stops = json.loads(files["generation_config.json"])["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|endoftext|>", "<|endofturn|>"]


def test_an_upload_that_fails_says_how_to_try_again(finished):
    with pytest.raises(ValueError, match=r"could not be uploaded .*python -m sft.publish --run_dir"):
        push_stage(finished.output_dir, "someone/motif-sft")


def test_unfinished_runs_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds no finished run: it lacks model/config\.json, config\.yaml"):
        main(["--run_dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        main([])
