"""A stage through TRL equals a plain loop, records attention, resumes exactly, and refuses what cannot work."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from kernels_hub import gda_attention_in_use
from sft import stage
from sft.callbacks import MetricsCallback
from sft.stage import run_stage
from sft.train import main
from trainer.optim import build_muon_clip


def metric_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def test_stage_learns_and_leaves_a_usable_model(settings, workplace, tokenizer):
    config = settings(
        max_steps=10, eval_files=[str(workplace / "eval.jsonl")], preview_samples=1, gradient_checkpointing=True
    )
    result = run_stage(config)
    lines = metric_lines(config.output_dir)
    updates = [line for line in lines if "loss" in line]
    before, after = (line["eval"]["loss"] for line in lines if "eval" in line)
    assert after < before - 0.5
    assert result.last_loss < result.first_loss - 0.5
    assert (result.steps, result.eval_loss, result.kernel.source) == (10, after, "torch")
    assert [line["step"] for line in updates] == list(range(1, 11))
    assert all(len(line["max_logits"]) == 2 and line["clipped_heads"] == 0 for line in updates)
    assert [line["max_logits_exact"] for line in updates] == [True] + [False] * 9
    assert updates[-1]["learning_rate"] < updates[1]["learning_rate"]

    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.config.use_cache
    loaded = AutoTokenizer.from_pretrained(result.model_dir)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.convert_ids_to_tokens(model.generation_config.eos_token_id) == ["<|endoftext|>", "<|endofturn|>"]
    assert not (result.model_dir / "training_args.bin").exists(), "it would be uploaded with this machine's paths"
    assert {path.name for path in Path(config.output_dir).iterdir()} >= {"config.yaml", "data_report.json", "model"}


def test_batches_are_packed_and_masked_to_the_token(settings, tokenizer):
    config = settings(max_length=200)
    data, _, report, _ = stage.load_stage_data(config, tokenizer)
    model = stage.load_stage_model(config, tokenizer)
    trainer = stage.build_trainer(config, model, tokenizer, data, None, MetricsCallback(Path(config.output_dir)))
    expected = {
        tuple(row["input_ids"]): [
            token if mark else -100 for token, mark in zip(row["input_ids"], row["assistant_masks"], strict=True)
        ]
        for row in data
    }
    seen = 0
    for batch in trainer.get_train_dataloader():
        assert batch["input_ids"].shape[1] <= 200
        assert "attention_mask" not in batch
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            ids = tuple(batch["input_ids"][0, start:end].tolist())
            assert batch["labels"][0, start:end].tolist() == expected[ids]
            assert batch["position_ids"][0, start:end].tolist() == list(range(end - start))
            seen += 1
    assert seen == report.kept == 120


def test_trl_with_muon_clip_equals_a_plain_loop(settings, workplace, monkeypatch):
    batches = []
    original = stage.StageTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        batches.append({name: inputs[name].clone() for name in ("input_ids", "labels", "position_ids")})
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(stage.StageTrainer, "compute_loss", record)
    config = settings(qk_clip_threshold=0.02, weight_decay=0.1, warmup_ratio=0.3, adamw_learning_rate=1e-3)
    result = run_stage(config)
    reported = metric_lines(config.output_dir)

    model = AutoModelForCausalLM.from_pretrained(workplace / "base", dtype=torch.float32)
    options = {"adamw_lr": 1e-3, "weight_decay": 0.1, "qk_clip_threshold": 0.02}
    optimizer = build_muon_clip(model, lr=config.learning_rate, **options)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=2, num_training_steps=4)
    for line, micro_batches in zip(reported, zip(batches[::2], batches[1::2], strict=True), strict=True):
        num_tokens = sum(int((batch["labels"] != -100).sum()) for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, :-1]
            loss = cross_entropy(logits, batch["labels"][0, 1:], reduction="sum") / num_tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert line["loss"] == pytest.approx(total, abs=2e-6)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert line["clipped_heads"] == optimizer.clip_report()["clipped_heads"]
    assert sum(line["clipped_heads"] for line in reported) > 0, "QK-clip saw the logits although TRL skips our head"
    trained = AutoModelForCausalLM.from_pretrained(result.model_dir, dtype=torch.float32).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-6)


def test_resumed_run_equals_an_uninterrupted_one(settings, monkeypatch):
    whole = run_stage(settings("whole", save_steps=2))

    class Stop(Exception):
        pass

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCallback, "on_step_begin", stop)
        with pytest.raises(Stop):
            run_stage(settings("broken", save_steps=2))
    with pytest.raises(ValueError, match="holds an unfinished run; set resume: true"):
        run_stage(settings("broken", save_steps=2))
    resumed = run_stage(settings("broken", save_steps=2, resume=True))

    lines = metric_lines(resumed.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == [line["loss"] for line in metric_lines(whole.output_dir)]
    expected = AutoModelForCausalLM.from_pretrained(whole.model_dir).state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(resumed.model_dir).state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_non_finite_loss_stops_before_the_weights(settings, workplace, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base")
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "spoilt")
    AutoTokenizer.from_pretrained(workplace / "base").save_pretrained(tmp_path / "spoilt")
    config = settings(model_name_or_path=str(tmp_path / "spoilt"))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at update 1; .*lower learning_rate"):
        run_stage(config)
    assert not (Path(config.output_dir) / "model").exists()


def test_non_finite_gradient_stops_before_the_weights(settings, monkeypatch):
    trained = []
    norm = stage.SFTTrainer._get_grad_norm

    def spoilt(self, model, grad_norm=None):
        value = norm(self, model, grad_norm)
        trained.append(next(self.model.parameters()).detach().clone())
        return float("inf") if self.state.global_step == 1 else value

    monkeypatch.setattr(stage.SFTTrainer, "_get_grad_norm", spoilt)
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is inf at update 2"):
        run_stage(settings())
    assert len(trained) == 2


def test_fp8_trains_on_padded_rows_and_leaves_a_plain_model(settings, workplace, tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    config = AutoConfig.from_pretrained(workplace / "base", head_dim=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(workplace / "base").save_pretrained(tmp_path / "base")
    lengths = []
    original = stage.StageTrainer.compute_loss

    def record(self, model, inputs, *args, **kwargs):
        lengths.append(inputs["input_ids"].shape[1])
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(stage.StageTrainer, "compute_loss", record)
    common = {"model_name_or_path": str(tmp_path / "base"), "max_steps": 2, "gradient_accumulation_steps": 1}
    plain = run_stage(settings("plain", **common))
    odd, lengths[:] = list(lengths), []
    low = run_stage(settings("fp8", fp8="rowwise", fp8_skip_edge_layers=0, fp8_emulate=True, **common))
    assert any(length % 16 for length in odd)
    assert all(length % 16 == 0 for length in lengths), "FP8 products take multiples of 16 tokens"
    assert low.first_loss != plain.first_loss
    assert low.first_loss == pytest.approx(plain.first_loss, rel=1e-2)
    first, second = (AutoModelForCausalLM.from_pretrained(run.model_dir).state_dict() for run in (plain, low))
    assert first.keys() == second.keys()
    assert {value.dtype for value in second.values()} == {torch.float32}
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="set fp8 none, or fp8_emulate true"):
            run_stage(settings("real", fp8="rowwise", fp8_skip_edge_layers=0, **common))


def test_adapters_train_alone_and_are_merged(settings, workplace):
    config = settings(lora_rank=4, optimizer="adamw", max_steps=3)
    result = run_stage(config)
    base = AutoModelForCausalLM.from_pretrained(workplace / "base").state_dict()
    merged = AutoModelForCausalLM.from_pretrained(result.model_dir).state_dict()
    changed = {name for name, value in base.items() if not torch.equal(value, merged[name])}
    assert changed == {name for name in base if any(target in name for target in config.lora_target_modules)}
    assert (result.output_dir / "adapter" / "adapter_model.safetensors").exists()
    lines = metric_lines(result.output_dir)
    assert all(line["max_logits_exact"] and None not in line["max_logits"] for line in lines)


def test_the_attention_kernel_trains_as_sdpa_does(settings, monkeypatch):
    held = []
    build = stage.build_trainer

    def look(config, model, *rest):
        held.append(gda_attention_in_use(model))
        return build(config, model, *rest)

    monkeypatch.setattr(stage, "build_trainer", look)
    plain, kernel = (
        run_stage(settings(name, max_steps=3, attn_implementation=name)) for name in ("sdpa", "gda_kernel")
    )
    assert held[0] == ""
    assert "gda" in held[1]
    losses = [
        [line["loss"] for line in metric_lines(result.model_dir.parent) if "loss" in line]
        for result in (plain, kernel)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_packing_changes_no_conversation(settings, workplace, packing):
    """Losses before any update, conversation by conversation, do not depend on what is packed beside them."""
    config = settings("packed" if packing else "plain", packing=packing)
    tokenizer = stage.load_tokenizer(config.model_name_or_path)
    data, *_ = stage.load_stage_data(config, tokenizer)
    data = data.select(range(6))
    model = stage.load_stage_model(config, tokenizer)
    trainer = stage.build_trainer(config, model, tokenizer, data, None, MetricsCallback(Path(config.output_dir)))
    total = tokens = 0
    for batch in trainer.get_train_dataloader():
        counted = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += trainer.compute_loss(trainer.model, dict(batch)).item() * counted
        tokens += counted
    reference = 0.0
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            logits = trainer.model(ids, use_cache=False).logits[0, :-1]
        mask = torch.tensor(row["assistant_masks"][1:]).bool()
        reference += cross_entropy(logits[mask], ids[0, 1:][mask], reduction="sum").item()
    assert tokens == sum(sum(row["assistant_masks"]) for row in data)
    assert total == pytest.approx(reference, rel=1e-5)


def test_folder_of_a_finished_run_is_refused(settings, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a finished run; choose another folder"):
        run_stage(settings())


def test_resume_without_checkpoint_is_refused(settings):
    with pytest.raises(ValueError, match="holds no complete checkpoint; set resume: false"):
        run_stage(settings(resume=True))


def test_tokenizer_that_does_not_fit_is_refused(settings, workplace, tmp_path, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(workplace / "base")
    model.resize_token_embeddings(len(tokenizer) - 10)
    model.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"the tokenizer has 400 tokens and the model 390 embeddings"):
        run_stage(settings(model_name_or_path=str(tmp_path / "small")))


def test_the_lock_of_kernels_reaches_the_loader(settings):
    with pytest.raises(ValueError, match=r"some.lock locks kernels, and source is 'torch'"):
        run_stage(settings(kernels="torch", kernels_lock="some.lock"))


def test_a_folder_without_weights_is_named(settings, workplace, tmp_path):
    shutil.copytree(workplace / "base", tmp_path / "empty", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"no model can be loaded from model_name_or_path .*empty.* with weights"):
        run_stage(settings(model_name_or_path=str(tmp_path / "empty")))


def test_dry_run_shows_sizes_and_masks_and_writes_nothing(settings, workplace, capsys, tmp_path):
    (tmp_path / "heldout.jsonl").write_text((workplace / "eval.jsonl").read_text() + "{}\n")
    settings(eval_files=[str(tmp_path / "heldout.jsonl")]).save(tmp_path / "recipe.yaml")
    main(["--config", str(tmp_path / "recipe.yaml"), "--dry_run", "--preview_samples", "1"])
    shown = capsys.readouterr().out
    for text in ("learning_rate: 0.005", "512 tokens at most", "parameters:", "120 of 120 conversations kept", "⟦"):
        assert text in shown
    assert "20 of 21 held-out conversations kept" in shown
    assert f"dropped 1: no messages (first: {tmp_path}/heldout.jsonl:21)" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("optimizer", "gibibytes"), [("muon_clip", "10.5"), ("adamw", "11.4")])
def test_dry_run_counts_a_moment_for_matrices_and_two_for_the_rest(
    settings, workplace, tmp_path, optimizer, gibibytes
):
    """256M parameters each in the embedding, the head and the feed-forward layer."""
    sizes = {"vocab_size": 4_000_000, "hidden_size": 64, "intermediate_size": 1_333_333, "num_hidden_layers": 1}
    AutoConfig.from_pretrained(workplace / "base", **sizes).save_pretrained(tmp_path / "large")
    config = settings(model_name_or_path=str(tmp_path / "large"), optimizer=optimizer)
    assert f"in float32: {gibibytes} GiB" in stage._describe_model(config)


def test_entry_point_trains_and_names_mistakes(settings, capsys, tmp_path):
    settings(max_steps=1).save(tmp_path / "recipe.yaml")
    main(["--config", str(tmp_path / "recipe.yaml")])
    assert "1 updates, loss" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"motif2-sft: output_dir .* holds a finished run"):
        main(["--config", str(tmp_path / "recipe.yaml")])
    with pytest.raises(SystemExit):
        main(["--config", str(tmp_path / "recipe.yaml"), "--learning_rat", "1"])
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("module", ["sft.train", "sft.trl_sft"])
def test_accelerate_launches_both_entries(settings, tmp_path, workplace, module):
    root = Path(__file__).resolve().parents[2]
    config = settings("run", max_steps=1, gradient_accumulation_steps=1)
    config.save(tmp_path / "recipe.yaml")
    if module == "sft.trl_sft":
        (tmp_path / "recipe.yaml").write_text(
            f"model_name_or_path: {workplace / 'base'}\noutput_dir: {tmp_path / 'run' / 'model'}\nmax_steps: 1\n"
            f"datasets: [{{path: json, data_files: {workplace / 'train.jsonl'}, columns: [messages]}}]\n"
            "packing: true\nassistant_only_loss: true\nmax_length: 256\nbf16: false\nuse_cpu: true\nkernels: torch\n"
            "per_device_train_batch_size: 1\ndtype: float32\nreport_to: none\nsave_strategy: 'no'\n"
        )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    command = [*launch, "-m", module, "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PolyNorm by" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").generation_config.eos_token_id
