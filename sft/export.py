"""What a stage leaves for use: the whole model in one folder, its card with data and results, and its upload.

The card is written from the run's own records, so a finished run can be published later (`python -m sft.publish`).
"""

import json
import shutil
from pathlib import Path

import httpx
import torch
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer

from modeling_motif2.hub import upload_folder
from modeling_motif2.model_card import write_model_card
from sft.callbacks import read_metrics
from sft.chat import set_stop_tokens
from sft.config import SftStageConfig
from trainer.errors import CheckpointError

MODEL_DIR = "model"
ADAPTER_DIR = "adapter"
CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "data_report.json"
TABLE_FILE = Path("evaluation", "table.json")
MOST_SOURCES = 20
DESCRIPTION = """Fine-tuned on conversations. Ask it through the chat template that its tokenizer holds:

```python
messages = [{"role": "user", "content": "What is 47 + 38?"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=200)[0]))
```"""


def save_final_model(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, config: SftStageConfig) -> Path:
    """Write the whole model, the tokenizer and the stop tokens to `model/`, whatever way the weights are sharded.

    The folder gets its name once all of it is written: `model/` stands for a finished run.
    LoRA adapters are kept apart in `adapter/`, and merged into the base model by the main process.

    Args:
        trainer: after training; all ranks call this.
        tokenizer: with the chat template.
        config: of the stage.

    Returns:
        Path: the folder of the model.

    Raises:
        CheckpointError: it could not be written.
    """
    output_dir = Path(config.output_dir)
    adapter_dir = output_dir / ADAPTER_DIR
    unfinished = output_dir / f"{MODEL_DIR}.partial"
    gather_whole_weights(trainer)
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapters = isinstance(model, PeftModel)
    if not adapters:
        model.config.use_cache = True
    if trainer.is_world_process_zero():
        shutil.rmtree(unfinished, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        trainer.save_model(str(adapter_dir if adapters else unfinished))
        if trainer.is_world_process_zero():
            if adapters:
                merge_adapter(config.model_name_or_path, adapter_dir, tokenizer, unfinished)
            (unfinished / "training_args.bin").unlink(missing_ok=True)  # with this machine's paths; see config.yaml
            unfinished.rename(output_dir / MODEL_DIR)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"the model could not be written to {output_dir} ({error}); make room, and go on from the last checkpoint "
            "with resume: true"
        ) from error
    trainer.accelerator.wait_for_everyone()
    return output_dir / MODEL_DIR


def gather_whole_weights(trainer: Trainer) -> None:
    """Make `trainer.save_model` write a whole model under FSDP: with sharded checkpoints it would write none."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")


def merge_adapter(base: str, adapter: Path, tokenizer: PreTrainedTokenizerBase, model_dir: Path) -> None:
    """Write a model with its LoRA adapter merged in, in float32, with the tokenizer and the stop tokens.

    Args:
        base: folder or Hub name of the model that the adapter was trained on.
        adapter: folder of the adapter.
        tokenizer: with the chat template.
        model_dir: folder to write.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    set_stop_tokens(merged, tokenizer)
    merged.save_pretrained(model_dir)
    tokenizer.save_pretrained(model_dir)


def refuse_unfinished(run_dir: str | Path) -> None:
    """Refuse a folder that does not hold all of a finished stage.

    Raises:
        ValueError: it lacks a file; all that it lacks are named.
    """
    needed = (f"{MODEL_DIR}/config.json", CONFIG_FILE, METRICS_FILE, REPORT_FILE)
    missing = [name for name in needed if not Path(run_dir, name).is_file()]
    if missing:
        raise ValueError(f"{str(run_dir)!r} holds no finished run: it lacks {', '.join(missing)}")


def write_stage_card(run_dir: str | Path, license: str = "", name: str | None = None) -> Path:
    """Write the card of a finished stage's model from the run's records.

    Args:
        run_dir: folder of the run.
        license: of the weights; empty: as the run's settings say.
        name: title; default: the run's name.

    Returns:
        Path: the card.

    Raises:
        ValueError: the folder holds no finished run.
    """
    run_dir = Path(run_dir)
    refuse_unfinished(run_dir)
    settings = yaml.safe_load((run_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    report = json.loads((run_dir / REPORT_FILE).read_text(encoding="utf-8"))
    table_file = run_dir / TABLE_FILE
    table = json.loads(table_file.read_text(encoding="utf-8")) if table_file.is_file() else []
    sections = [_training(settings, run_dir), _data(report), *_results(table)]
    evaluation: dict[str, dict[str, float]] = {}
    for row in table:
        if row["after"] is not None and row["stage"] == table[-1]["stage"]:
            evaluation.setdefault(row["task"], {})[row["metric"]] = row["after"]
    return write_model_card(
        run_dir / MODEL_DIR,
        name=name or run_dir.resolve().name,
        description=DESCRIPTION,
        training="\n\n".join(sections),
        license=license or settings["license"] or None,
        base_model=base_repository(settings["model_name_or_path"]),
        evaluation=evaluation or None,
    )


def base_repository(name_or_path: str) -> str | None:
    """The Hub name that a chain of stages started from; None where it started from a local model."""
    if not Path(name_or_path).exists():
        try:
            validate_repo_id(name_or_path)
        except HFValidationError:  # a folder that is no longer there
            return None
        return name_or_path
    before = Path(name_or_path).parent / CONFIG_FILE
    if not before.is_file():
        return None
    name = yaml.safe_load(before.read_text(encoding="utf-8")).get("model_name_or_path")
    return base_repository(name) if name else None


def _training(settings: dict, run_dir: Path) -> str:
    """One paragraph on the stage, and the losses it recorded."""
    logged = read_metrics(run_dir / METRICS_FILE)
    losses = [(line["step"], line["loss"]) for line in logged if "loss" in line]
    heldout = [(line["step"], line["eval"]["loss"]) for line in logged if "eval" in line]
    adapters = f"LoRA adapters of rank {settings['lora_rank']}, merged" if settings["lora_rank"] else "all parameters"
    fp8 = "" if settings["fp8"] == "none" else f" with products in FP8 ({settings['fp8']})"
    text = (
        f"One stage of supervised fine-tuning of {adapters}, from `{settings['model_name_or_path']}`: "
        f"{settings['optimizer']}, peak learning rate {settings['learning_rate']:g}, weight decay "
        f"{settings['weight_decay']:g}, {settings['lr_scheduler']} schedule with {100 * settings['warmup_ratio']:g}% "
        f"warm-up, conversations {'packed' if settings['packing'] else 'up'} to {settings['max_length']:,} tokens, "
        f"{settings['dtype']}{fp8}. The loss counts the assistant's tokens alone."
    )
    if losses:
        text += f" {losses[-1][0]:,} updates; training loss {losses[0][1]:.4f} at first, {losses[-1][1]:.4f} at last."
    if len(heldout) > 1 and heldout[0][0] == 0:
        text += f" Held-out loss {heldout[0][1]:.4f} before, {heldout[-1][1]:.4f} after."
    return text


def _data(report: dict) -> str:
    """What it was trained on, by source, licence and origin, and what was dropped."""
    lines = [
        f"### Data\n\n{report['kept']:,} of {report['rows']:,} conversations, {report['tokens']:,} tokens, "
        f"{report['trained_tokens']:,} of them trained."
    ]
    for column, counts in report["provenance"].items():
        ranked = sorted(counts.items(), key=lambda item: -item[1])
        lines.append(f"| {column} | conversations |\n|---|---:|")
        lines[-1] += "".join(f"\n| {value} | {count:,} |" for value, count in ranked[:MOST_SOURCES])
        if len(ranked) > MOST_SOURCES:
            others = sum(count for _, count in ranked[MOST_SOURCES:])
            lines[-1] += f"\n| {len(ranked) - MOST_SOURCES} others | {others:,} |"
    if report["dropped"]:
        lines.append(
            "Dropped: " + "; ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()) + "."
        )
    return "\n\n".join(lines)


def _results(table: list[dict]) -> list[str]:
    if not table:
        return []
    from sft.evaluation import render_table

    return [
        "### Before and after each stage\n\nThe same rows on both sides, through the chat template.\n\n"
        + render_table(table)
    ]


def push_stage(run_dir: str | Path, repository: str, private: bool = False) -> str:
    """Upload a finished stage's model, card and tokenizer in one commit; a card that is already there is kept.

    Args:
        run_dir: folder of the run.
        repository: "you/name"; made where it does not exist.
        private: whether a new repository is private.

    Returns:
        str: URL of the commit.

    Raises:
        ValueError: the Hub refused; the message says what to check.
    """
    message = f"Upload the model of {Path(run_dir).resolve().name}"
    try:
        return upload_folder(Path(run_dir) / MODEL_DIR, repository, commit_message=message, private=private)
    except (httpx.HTTPError, OSError) as error:
        raise ValueError(
            f"{repository!r} could not be uploaded to ({error}); check its name and your token (hf auth login); the "
            f"model is in {run_dir}: python -m sft.publish --run_dir {run_dir} --push_to_hub {repository} tries again"
        ) from error
