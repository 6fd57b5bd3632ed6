"""TRL's `trl sft` with its own flags and recipes, on Motif-2: MuonClip with QK-clip and PolyNorm kernels added.

`python -m sft.trl_sft --config recipes/sft/trl_sft.yaml`, or `accelerate launch -m sft.trl_sft --dataset_name …`. It
takes every argument of TRL's ScriptArguments, SFTConfig, ModelConfig and DatasetMixtureConfig under its own name. Rows
of messages are checked one by one before they train, and the first sequences are printed with their loss mask.
"""

import argparse
import itertools
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from kernels_hub import use_gda_attention, use_polynorm
from kernels_hub.gda import ATTENTIONS
from sft.chat import attach_chat_template, render_loss_mask, set_stop_tokens
from sft.checkpoints import defect
from sft.config import KERNEL_SOURCES, ROW_RULES
from sft.data import DataReport, row_problem
from sft.export import gather_whole_weights
from sft.stage import StageTrainer
from trainer.errors import CheckpointError
from trainer.optim import MuonClipFactory

# Label of a token that the loss does not count.
IGNORED = -100


@dataclass
class Motif2Arguments:
    """What is added to TRL's arguments.

    Raises:
        ValueError: a value is out of range.
    """

    muon_clip: bool = field(
        default=True, metadata={"help": "train with MuonClip; false: with --optim, which adapters need"}
    )
    adamw_learning_rate: float = field(
        default=0.0, metadata={"help": "MuonClip's peak for embeddings, head and vectors; 0: as learning_rate"}
    )
    qk_clip_threshold: float = field(default=100.0, metadata={"help": "MuonClip clips heads above this logit"})
    bad_rows: str = field(
        default="skip", metadata={"help": "skip: malformed rows are counted and left out; refuse: the first one stops"}
    )
    preview_samples: int = field(default=2, metadata={"help": "sequences printed with their loss mask"})
    kernels: str = field(default="auto", metadata={"help": "PolyNorm kernel: auto, official, hub, local or torch"})
    kernels_lock: str = field(
        default="", metadata={"help": "file of `kernels lock`: a kernel from the Hub must be as locked"}
    )
    trust_kernels: bool = field(
        default=False, metadata={"help": "load kernels of publishers whom the Hub does not list as trusted"}
    )

    def __post_init__(self):
        if self.kernels not in KERNEL_SOURCES:
            raise ValueError(f"kernels is {self.kernels!r}; use one of {', '.join(KERNEL_SOURCES)}")
        if self.bad_rows not in ROW_RULES:
            raise ValueError(f"bad_rows is {self.bad_rows!r}; use one of {', '.join(ROW_RULES)}")
        if self.preview_samples < 0:
            raise ValueError(f"preview_samples is {self.preview_samples}; use 0 or more")
        if not self.adamw_learning_rate >= 0:
            raise ValueError(f"adamw_learning_rate is {self.adamw_learning_rate}; use 0 or more")
        if not self.qk_clip_threshold > 0:
            raise ValueError(f"qk_clip_threshold is {self.qk_clip_threshold}; use a number above 0")


def build_trl_trainer(
    script: ScriptArguments,
    arguments: SFTConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    motif2: Motif2Arguments,
) -> StageTrainer:
    """TRL's trainer as `trl sft` builds it, with MuonClip, kernels and stop tokens.

    Args:
        script, arguments, model, mixture: TRL's.
        motif2: ours.

    Returns:
        StageTrainer: ready to train.

    Raises:
        ValueError: no model or data is named, a split is missing, adapters or quantised weights are to train with
            MuonClip, the tokenizer lacks the chat tokens, or a row is refused.
    """
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is empty; set it in the recipe or on the command line")
    if motif2.muon_clip and (model.use_peft or model.load_in_4bit or model.load_in_8bit):
        raise ValueError(
            "MuonClip's QK-clip rescales q_proj and k_proj, which adapters and quantisation freeze; "
            "set muon_clip: false to train with optim"
        )
    data = _load_data(script, mixture)
    splits = [script.dataset_train_split]
    if arguments.eval_strategy != "no":
        splits.append(script.dataset_test_split)
    for split in splits:
        if split not in data:
            raise ValueError(
                f"the data has no split {split!r}, only {', '.join(data)}; set dataset_train_split and "
                "dataset_test_split, or eval_strategy: no"
            )
    rows = {split: check_rows(data[split], split, motif2.bad_rows) for split in splits}
    muon_clip = {
        "lr": arguments.learning_rate,
        "weight_decay": arguments.weight_decay,
        "qk_clip_threshold": motif2.qk_clip_threshold,
        "adamw_lr": motif2.adamw_learning_rate or None,
    }
    tokenizer = _load_tokenizer(model, arguments)
    return StageTrainer(
        model=_load_model(model, arguments, motif2, tokenizer),
        args=arguments,
        train_dataset=rows[script.dataset_train_split],
        eval_dataset=rows[script.dataset_test_split] if arguments.eval_strategy != "no" else None,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(MuonClipFactory, muon_clip) if motif2.muon_clip else None,
        peft_config=get_peft_config(model),
    )


def _load_model(
    model: ModelConfig, arguments: SFTConfig, motif2: Motif2Arguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model as `trl sft` loads it, with kernels and stop tokens."""
    options = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "quantization_config": get_quantization_config(model),
    }
    options |= arguments.model_init_kwargs or {}
    arguments.model_init_kwargs = None  # used up: the trainer gets a model, not a name
    loaded = AutoModelForCausalLM.from_pretrained(model.model_name_or_path, **options)
    set_stop_tokens(loaded, tokenizer)
    use_polynorm(loaded, motif2.kernels, lockfile=motif2.kernels_lock, trust_remote_code=motif2.trust_kernels)
    if model.attn_implementation in ATTENTIONS:
        use_gda_attention(loaded, attn_implementation=model.attn_implementation)
    return loaded


def _load_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict:
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise ValueError("no data is named; set dataset_name, or datasets: a list of path and data_files")
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def check_rows(rows: Dataset | IterableDataset, split: str, rule: str) -> Dataset | IterableDataset:
    """Leave out, or refuse, the rows of messages that cannot train; what they are and where is printed.

    Rows of a stream are checked as they come, and not counted. Rows of plain text pass.

    Args:
        rows: with `messages`, or `prompt` and `completion`.
        split: its name, for the message.
        rule: "skip" or "refuse".

    Raises:
        ValueError: a row is refused, or none is left.
    """
    report = DataReport()

    def stays(row: dict, index: int) -> bool:
        report.rows += 1
        conversation = _conversation(row)
        problem = row_problem(conversation) if conversation is not None else None
        if problem and rule == "refuse":
            raise ValueError(f"row {index} of {split} is malformed: {problem}; mend it, or set bad_rows: skip")
        if problem:
            report.drop(problem, f"{split}:{index}")
        return problem is None

    if isinstance(rows, IterableDataset):
        return rows.filter(stays, with_indices=True)
    kept = [index for index, row in enumerate(rows) if stays(row, index)]
    lines = [f"{len(kept)} of {report.rows} rows of {split} kept", *report.dropped_lines()]
    if not kept:
        raise ValueError("; ".join(line.strip() for line in lines))
    PartialState().print("\n".join(lines))
    return rows.select(kept)


def _conversation(row: dict) -> dict | None:
    """A row in the form that `row_problem` reads; None for one of plain text."""
    if "messages" in row:
        return row
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return row | {"messages": [*prompt, *completion]}
    return None


def preview_sequences(trainer: StageTrainer, count: int) -> list[str]:
    """The first `count` sequences as the trainer gets them, decoded, with brackets around what the loss counts."""
    shown = []
    for row in itertools.islice(iter(trainer.train_dataset), count):
        token_ids = row["input_ids"]
        marks = [int(label != IGNORED) for label in row.get("labels", token_ids)]
        shown.append(render_loss_mask(trainer.processing_class, token_ids, marks) + "\n")
    return shown


def _load_tokenizer(model: ModelConfig, arguments: SFTConfig) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(model.model_name_or_path, revision=model.model_revision)
    if tokenizer.chat_template is None and arguments.chat_template_path is None:
        attach_chat_template(tokenizer)
    return tokenizer


def main(argv: list[str] | None = None) -> None:
    """Parse TRL's arguments and ours, train, and save to `output_dir`.

    Raises:
        SystemExit: an argument is unknown or does not fit; the message says why.
    """
    parser = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, Motif2Arguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        groups = parser.parse_args_and_config(argv)
        _, arguments, *_, motif2 = groups
        checkpoint = arguments.resume_from_checkpoint
        if checkpoint and (problem := defect(Path(checkpoint))):
            raise ValueError(f"resume_from_checkpoint {checkpoint!r} is not complete: {problem}; name another one")
        trainer = build_trl_trainer(*groups)
        trainer.accelerator.print(*preview_sequences(trainer, motif2.preview_samples), sep="\n")
        trainer.train(resume_from_checkpoint=checkpoint)
        gather_whole_weights(trainer)
        trainer.model.config.use_cache = True
        trainer.save_model(arguments.output_dir)
    except DatasetGenerationError as error:  # says what happened in its cause
        raise SystemExit(f"sft.trl_sft: the data cannot be read: {error.__cause__ or error}") from error
    except (ValueError, OSError, FloatingPointError, CheckpointError, SafetensorError) as error:
        raise SystemExit(f"sft.trl_sft: {error}") from error
    if arguments.push_to_hub:
        trainer.push_to_hub(dataset_name=groups[0].dataset_name)
    trainer.accelerator.print(f"PolyNorm by {trainer.kernel}; model in {arguments.output_dir}")


if __name__ == "__main__":
    main()
