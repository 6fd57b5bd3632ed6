"""What a stage leaves for use: the whole model in one folder, its card with data and results, and its upload.

Source: the card's form is the Hub's; what it says is read from the run's own records.
"""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer

from modeling_motif2.hub import upload_folder
from modeling_motif2.model_card import write_model_card
from sft.chat import set_stop_tokens
from sft.config import SftStageConfig

MODEL_DIR = "model"
ADAPTER_DIR = "adapter"
REPORT_FILE = "data_report.json"


def save_final_model(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, config: SftStageConfig) -> Path:
    """Write the whole model, the tokenizer and the stop tokens to `model/`, whatever way the weights are sharded.

    LoRA adapters are kept apart in `adapter/`, and merged into the base model by the main process.

    Args:
        trainer: after training; all ranks call this.
        tokenizer: with the chat template.
        config: of the stage.

    Returns:
        Path: the folder of the model.
    """
    output_dir = Path(config.output_dir)
    model_dir = output_dir / MODEL_DIR
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None:  # sharded checkpoints are for going on; transformers writes no model from them
        plugin.set_state_dict_type("FULL_STATE_DICT")
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, PeftModel):
        model.config.use_cache = True
        trainer.save_model(str(model_dir))
        return model_dir
    trainer.save_model(str(output_dir / ADAPTER_DIR))
    if trainer.is_world_process_zero():
        merge_adapter(config.model_name_or_path, output_dir / ADAPTER_DIR, tokenizer, model_dir)
    trainer.accelerator.wait_for_everyone()
    return model_dir


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
