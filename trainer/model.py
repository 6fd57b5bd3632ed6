"""The model of a run: new from the recipe's fields, or continued from a checkpoint."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import modeling_motif2  # noqa: F401  registers the model with the Auto classes
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from trainer.config import PretrainConfig


def model_config(config: PretrainConfig, tokenizer) -> Motif2Config:
    """Configuration of the run's model.

    Raises:
        ValueError: the tokenizer has more entries than the checkpoint to continue from, or the shape is inconsistent.
    """
    if config.model_name_or_path is None:
        settings = config.model_settings()
        theta = settings.pop("rope_theta")
        return Motif2Config(
            vocab_size=len(tokenizer),
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    continued = AutoConfig.from_pretrained(config.model_name_or_path)
    if len(tokenizer) > continued.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, {config.model_name_or_path} has {continued.vocab_size}: "
            "use the checkpoint's own tokenizer"
        )
    return continued


def build_model(config: PretrainConfig, tokenizer) -> Motif2ForCausalLM:
    """The run's model in float32, with random weights from the current seed or those of a checkpoint."""
    if config.model_name_or_path is None:
        architecture = model_config(config, tokenizer)
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    else:
        model_config(config, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            config.model_name_or_path, dtype=torch.float32, attn_implementation=config.attn_implementation
        )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
