"""The model of a run: new from the recipe's fields, or continued from a checkpoint."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import modeling_motif2  # noqa: F401  registers the model with the Auto classes
from kernels_hub import use_gda_attention
from kernels_hub.gda import ATTENTIONS
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from trainer.config import PretrainConfig
from trainer.execution import (
    bfloat16_residual,
    compile_layers,
    convert_to_fp8,
    recompute_layers,
)


def load_tokenizer(name_or_path: str):
    """The run's tokenizer.

    Raises:
        ValueError: there is none under that name.
    """
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer can be loaded from tokenizer {name_or_path!r}: {error}; give a folder or Hub name with one"
        ) from error


def model_config(config: PretrainConfig, tokenizer=None) -> Motif2Config:
    """Configuration of the run's model.

    Args:
        config: of the run.
        tokenizer: may be left out where the recipe or a checkpoint gives the vocabulary's size.

    Raises:
        ValueError: the tokenizer has more entries than the embedding has rows, or the shape is inconsistent.
    """
    if config.model_name_or_path is not None:
        try:
            architecture = AutoConfig.from_pretrained(config.model_name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no model can be loaded from model_name_or_path {config.model_name_or_path!r}: {error}; give a "
                "folder or Hub name with one"
            ) from error
    else:
        settings = config.model_settings()
        theta = settings.pop("rope_theta")
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        architecture = Motif2Config(
            vocab_size=config.vocab_size or len(tokenizer),
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            **{name: getattr(tokenizer, name, None) for name in special},
            **settings,
        )
    if tokenizer is not None and len(tokenizer) > architecture.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the embedding {architecture.vocab_size} rows: raise "
            "vocab_size, or use the checkpoint's own tokenizer"
        )
    return architecture


def build_model(config: PretrainConfig, tokenizer) -> Motif2ForCausalLM:
    """The run's model in float32, with random weights from the current seed or those of a checkpoint.

    Its layers compute as the settings say: in FP8, recomputed, compiled.

    Raises:
        ValueError: the settings ask for what this machine or the model's sizes do not allow.
    """
    architecture = model_config(config, tokenizer)
    name = config.attn_implementation
    if name == "flex_attention" and not torch.accelerator.is_available():
        raise ValueError("attn_implementation flex_attention has no backward pass on CPUs: set sdpa, or gda_kernel")
    options = {"dtype": torch.float32, "attn_implementation": "sdpa" if name in ATTENTIONS else name}
    if config.model_name_or_path is None:
        model = AutoModelForCausalLM.from_config(architecture, **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, **options)
    if name in ATTENTIONS:
        use_gda_attention(model, attn_implementation=name)
    if config.residual == "bfloat16":
        bfloat16_residual(model)
    if config.fp8 != "none":
        convert_to_fp8(model, config.fp8, config.fp8_skip_edge_layers, config.fp8_emulate)
    if config.gradient_checkpointing != "none":
        recompute_layers(model, config.gradient_checkpointing, config.gradient_checkpointing_every)
    if config.compile_layers:
        compile_layers(model)
    return model
