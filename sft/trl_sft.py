"""TRL's `trl sft` with its own flags and recipes, on Motif-2: MuonClip with QK-clip and PolyNorm kernels added.

`python -m sft.trl_sft --config recipes/sft/trl_sft.yaml`, or `accelerate launch -m sft.trl_sft --dataset_name …`. It
takes every argument of TRL's ScriptArguments, SFTConfig, ModelConfig and DatasetMixtureConfig under its own name.
"""

import argparse
from dataclasses import dataclass, field

from datasets import DatasetDict, load_dataset
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
from sft.chat import attach_chat_template, set_stop_tokens
from sft.config import KERNEL_SOURCES
from sft.export import gather_whole_weights
from sft.stage import StageTrainer
from trainer.optim import MuonClipFactory


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
    kernels: str = field(default="auto", metadata={"help": "PolyNorm kernel: auto, official, hub, local or torch"})

    def __post_init__(self):
        if self.kernels not in KERNEL_SOURCES:
            raise ValueError(f"kernels is {self.kernels!r}; use one of {', '.join(KERNEL_SOURCES)}")
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
        ValueError: no model or data is named, adapters or quantised weights are to train with MuonClip, or the
            tokenizer lacks the chat tokens.
    """
    if not model.model_name_or_path:
        raise ValueError("model_name_or_path is empty; set it in the recipe or on the command line")
    if motif2.muon_clip and (model.use_peft or model.load_in_4bit or model.load_in_8bit):
        raise ValueError(
            "MuonClip's QK-clip rescales q_proj and k_proj, which adapters and quantisation freeze; "
            "set muon_clip: false to train with optim"
        )
    data = _load_data(script, mixture)
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
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if arguments.eval_strategy != "no" else None,
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
    use_polynorm(loaded, source=motif2.kernels, training=True)
    if model.attn_implementation in ATTENTIONS:
        use_gda_attention(loaded, attn_implementation=model.attn_implementation)
    return loaded


def _load_data(script: ScriptArguments, mixture: DatasetMixtureConfig) -> DatasetDict:
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise ValueError("no data is named; set dataset_name, or datasets: a list of path and data_files")
    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


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
        trainer = build_trl_trainer(*groups)
        _, arguments, *_ = groups
        trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        raise SystemExit(f"sft.trl_sft: {error}") from error
    gather_whole_weights(trainer)
    trainer.model.config.use_cache = True
    trainer.save_model(arguments.output_dir)
    if arguments.push_to_hub:
        trainer.push_to_hub(dataset_name=groups[0].dataset_name)
    trainer.accelerator.print(f"PolyNorm by {trainer.kernel}; model in {arguments.output_dir}")


if __name__ == "__main__":
    main()
