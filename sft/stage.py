"""One stage of supervised fine-tuning: TRL's SFTTrainer with MuonClip, PolyNorm kernels and packed conversations.

What TRL and transformers do (packing, loss on the assistant's tokens, schedule, checkpoints, sharding) is theirs; here
stand the settings that make it Motif's recipe, the checks before money is spent, and the record of what happened.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.trainer_callback import ProgressCallback
from trl import SFTConfig, SFTTrainer

import modeling_motif2  # noqa: F401 (registers the architecture with the Auto classes)
from kernels_hub import KernelChoice, polynorm_in_use, use_gda_attention, use_polynorm
from kernels_hub.gda import ATTENTIONS
from modeling_motif2.diagnostics import track_max_logits
from sft.callbacks import MetricsCallback, QuietProgress
from sft.chat import attach_chat_template, render_loss_mask, set_stop_tokens
from sft.checkpoints import changed_settings, claim_output_dir
from sft.config import RESUME_RULES, SftStageConfig
from sft.data import DataReport, load_conversations
from sft.export import CONFIG_FILE, METRICS_FILE, REPORT_FILE, save_final_model
from sft.guards import GuardedSteps
from trainer.execution import FP8_ALIGNMENT, convert_to_fp8
from trainer.optim import MuonClipFactory
from trainer.optim.groups import group_parameters


@dataclass(frozen=True)
class SftResult:
    """What a stage leaves behind.

    Args:
        output_dir: folder of the run.
        model_dir: the trained model and its tokenizer, for `from_pretrained`.
        steps: updates made.
        train_loss: mean loss over the stage.
        first_loss: loss of the first logged update.
        last_loss: loss of the last logged update.
        eval_loss: loss on eval_files after training; None without them.
        data: what became of the training rows.
        kernel: the PolyNorm implementation that ran, seen by its operators in the first micro-step.
    """

    output_dir: Path
    model_dir: Path
    steps: int
    train_loss: float
    first_loss: float
    last_loss: float
    eval_loss: float | None
    data: DataReport
    kernel: KernelChoice


class StageTrainer(GuardedSteps, SFTTrainer):
    """TRL's trainer, guarded."""


def run_stage(config: SftStageConfig) -> SftResult:
    """Fine-tune a model as the settings say.

    Args:
        config: one stage.

    Returns:
        SftResult: where the model lies and what was measured.

    Raises:
        ValueError: the output folder holds a run, a file, row or task cannot be used, model and tokenizer do not fit,
            or a continuation's settings or data differ from the run's.
        FloatingPointError: the loss is not finite.
        CheckpointError: a checkpoint or the model could not be written.

    Source: arXiv 2511.07464, post-training.
    """
    output_dir = Path(config.output_dir)
    checkpoint, notes = claim_output_dir(output_dir, config.resume)
    if checkpoint is not None:
        changed = changed_settings(config, output_dir / CONFIG_FILE, RESUME_RULES)
        notes = [f"goes on from {checkpoint}", *(f"passed over {line}" for line in notes), *changed]
    _check_evaluation(config)
    tokenizer = load_tokenizer(config.model_name_or_path)
    train_data, eval_data, report, eval_report = load_stage_data(config, tokenizer)
    if checkpoint is not None:
        _refuse_other_data(report, output_dir / REPORT_FILE)
    model = load_stage_model(config, tokenizer)
    metrics = MetricsCallback(output_dir / METRICS_FILE)
    trainer = build_trainer(config, model, tokenizer, train_data, eval_data, metrics)
    trainer.accelerator.wait_for_everyone()  # every rank has compared the files that are now written
    if trainer.is_world_process_zero():
        config.save(output_dir / CONFIG_FILE)
        report.save(output_dir / REPORT_FILE)
        shown = preview(tokenizer, train_data, config.preview_samples)
        print(*notes, *_summaries(report, eval_report), *shown, sep="\n")
    trainer.args.eval_on_start = eval_data is not None and checkpoint is None  # before `train` FSDP2 cannot
    output = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    eval_loss = trainer.evaluate()["eval_loss"] if eval_data is not None else None
    model_dir = save_final_model(trainer, tokenizer, config)
    losses = metrics.losses
    return SftResult(
        output_dir=output_dir,
        model_dir=model_dir,
        steps=output.global_step,
        train_loss=output.training_loss,
        first_loss=losses[0] if losses else output.training_loss,
        last_loss=losses[-1] if losses else output.training_loss,
        eval_loss=eval_loss,
        data=report,
        kernel=trainer.kernel or polynorm_in_use(trainer.model),
    )


def _check_evaluation(config: SftStageConfig) -> None:
    """Refuse tasks that could not run after the stage; lm-eval is imported where tasks are named, and only there."""
    if config.eval_tasks:
        from sft.evaluation import check_evaluation

        check_evaluation(config)


def _refuse_other_data(report: DataReport, path: Path) -> None:
    """A continuation skips the rows that were trained on by their number: they must be the same rows."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    for name in ("kept", "tokens", "trained_tokens", "digest"):
        was, now = before.get(name), getattr(report, name)
        if was != now:
            raise ValueError(
                f"the training data is not the run's: {name} is {now} and was {was}; put the files back, or start a "
                "new run in another output_dir"
            )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer with Motif's chat template.

    Raises:
        ValueError: there is no tokenizer, or it lacks the chat tokens.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer can be loaded from {name_or_path!r}: {error}; give a folder or Hub name with a tokenizer"
        ) from error
    return attach_chat_template(tokenizer)


def load_stage_data(
    config: SftStageConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, Dataset | None, DataReport, DataReport | None]:
    """Training and held-out conversations of a stage, tokenized, and the reports on both."""
    rules = {
        "max_length": config.max_length,
        "bad_rows": config.bad_rows,
        "long_samples": config.long_samples,
        "max_characters": config.max_characters,
    }
    train_data, report = load_conversations(
        config.train_files, tokenizer, max_samples=config.max_samples, seed=config.seed, **rules
    )
    eval_data = eval_report = None
    if config.eval_files:
        eval_data, eval_report = load_conversations(config.eval_files, tokenizer, seed=None, **rules)
    return train_data, eval_data, report, eval_report


def _summaries(report: DataReport, eval_report: DataReport | None) -> list[str]:
    heldout = [eval_report.summary("held-out conversations")] if eval_report is not None else []
    return [report.summary(), *heldout]


def load_model(name: str, tokenizer: PreTrainedTokenizerBase, **options) -> PreTrainedModel:
    """A model in float32 with the tokenizer's stop tokens.

    Args:
        name: folder or Hub name.
        tokenizer: with Motif's markup.
        options: of `from_pretrained`.

    Raises:
        ValueError: there are no weights, or the tokenizer has more tokens than the model has embeddings.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    except OSError as error:
        raise ValueError(
            f"no model can be loaded from model_name_or_path {name!r}: {error}; give a folder or Hub name with weights"
        ) from error
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size} embeddings; "
            "use the tokenizer that the model was trained with, or resize the model's embeddings"
        )
    set_stop_tokens(model, tokenizer)
    return model


def load_stage_model(config: SftStageConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model in float32 with its kernels and stop tokens, recording the largest attention logits; FP8 if set.

    Raises:
        ValueError: as `load_model`, or FP8 is not possible here.
    """
    model = load_model(config.model_name_or_path, tokenizer, attn_implementation=config.attn_implementation)
    model.config.use_cache = False
    use_polynorm(model, config.kernels, lockfile=config.kernels_lock, trust_remote_code=config.trust_kernels)
    if config.attn_implementation in ATTENTIONS:
        use_gda_attention(model, attn_implementation=config.attn_implementation)
    track_max_logits(model, only_with_grad=True)
    if config.fp8 != "none":
        convert_to_fp8(model, config.fp8, config.fp8_skip_edge_layers, config.fp8_emulate)
    return model


def build_trainer(
    config: SftStageConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_data: Dataset,
    eval_data: Dataset | None,
    metrics: MetricsCallback,
) -> StageTrainer:
    """TRL's trainer with the stage's settings, MuonClip and the record of every update."""
    muon_clip = None
    if config.optimizer == "muon_clip":
        options = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        options["qk_clip_threshold"] = config.qk_clip_threshold
        options["adamw_lr"] = config.adamw_learning_rate or None
        muon_clip = (MuonClipFactory, options)
    lora = None
    if config.lora_rank:
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_target_modules),
        )
    trainer = StageTrainer(
        model=model,
        args=trl_arguments(config),
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=tokenizer,
        callbacks=[metrics],
        optimizer_cls_and_kwargs=muon_clip,
        peft_config=lora,
    )
    trainer.remove_callback(ProgressCallback)
    if config.progress:
        trainer.add_callback(QuietProgress())
    return trainer


def trl_arguments(config: SftStageConfig) -> SFTConfig:
    """The stage's settings in TRL's words."""
    arguments = SFTConfig(
        output_dir=str(Path(config.output_dir) / "checkpoints"),
        max_length=config.max_length,
        packing=config.packing,
        packing_strategy="bfd",
        eval_packing=False,
        pad_to_multiple_of=None if config.fp8 == "none" else FP8_ALIGNMENT,
        assistant_only_loss=True,
        per_device_train_batch_size=config.per_device_batch_size,
        per_device_eval_batch_size=config.per_device_batch_size,
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps,
        optim="adamw_torch",
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=config.lr_scheduler,
        max_grad_norm=config.max_grad_norm,
        bf16=config.dtype == "bfloat16",
        gradient_checkpointing=config.gradient_checkpointing,
        use_cpu=config.use_cpu,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_steps and config.eval_files else "no",
        eval_steps=config.eval_steps or None,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=config.save_total_limit,
        report_to=config.report_to,
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not config.progress,
    )
    arguments.gradient_accumulation_steps = config.accumulation_steps(arguments.world_size)
    return arguments


def preview(tokenizer: PreTrainedTokenizerBase, data: Dataset, count: int) -> list[str]:
    """The first `count` conversations, decoded, with brackets around what the loss counts."""
    rows = data.select(range(min(count, len(data))))
    return [render_loss_mask(tokenizer, row["input_ids"], row["assistant_masks"]) + "\n" for row in rows]


def describe_stage(config: SftStageConfig) -> str:
    """What `run_stage` would do: settings, sizes, data and samples with their loss mask; nothing is written.

    A model or file that is not on this machine is named as missing and left out.
    """
    world_size = PartialState().num_processes
    lines = [yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True)]
    lines.append(
        f"update: {config.batch_tokens(world_size):,} tokens at most = {config.per_device_batch_size} sequences of "
        f"{config.max_length:,} x {config.accumulation_steps(world_size)} micro-steps x {world_size} devices"
    )
    lines.append(_describe_model(config))
    _check_evaluation(config)
    if config.eval_tasks:
        lines.append(f"evaluation before and after: {', '.join(config.eval_tasks)}")
    missing = [file for file in (*config.train_files, *config.eval_files) if not Path(file).is_file()]
    if missing:
        lines.append(f"not on this machine, data not read: {', '.join(missing)}")
        return "\n".join(lines)
    try:
        tokenizer = load_tokenizer(config.model_name_or_path)
    except ValueError as error:
        lines.append(f"data not read: {error}")
        return "\n".join(lines)
    train_data, _, *reports = load_stage_data(config, tokenizer)
    lines += _summaries(*reports)
    lines += preview(tokenizer, train_data, config.preview_samples)
    return "\n".join(lines)


def _describe_model(config: SftStageConfig) -> str:
    """Parameters and the memory of weights, gradients and optimizer, from the model's configuration alone."""
    try:
        model_config = AutoConfig.from_pretrained(config.model_name_or_path)
    except (OSError, ValueError):
        return f"model {config.model_name_or_path!r} is not on this machine: parameters not counted"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if config.lora_rank:
        return f"parameters: {parameters:,}, frozen; weights {4 * parameters / 2**30:.1f} GiB, adapters extra"
    moments = 2 * parameters
    if config.optimizer == "muon_clip":
        groups = group_parameters(model.named_parameters(), config.learning_rate)
        muon = [group["params"] for group in groups if group["algorithm"] == "muon"]
        moments -= sum(parameter.numel() for group in muon for parameter in group)  # Muon has one, AdamW two
    return (
        f"parameters: {parameters:,}; weights, gradients and optimizer in float32: "
        f"{4 * (2 * parameters + moments) / 2**30:.1f} GiB over all devices, activations extra"
    )
