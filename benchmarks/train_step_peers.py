"""The same rows by transformers' Trainer: what train_step.py times beside our step."""

import tempfile

import torch
from accelerate.state import AcceleratorState
from transformers import DiffLlamaForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from benchmarks.train_step_cases import Shape, Timing, clock, motif_flops, peak_bytes, peer_flops, synchronize
from kernels_hub import use_polynorm
from modeling_motif2 import Motif2ForCausalLM


class StepClock(TrainerCallback):
    """Seconds of each of a Trainer's steps after the first `warm_ups`."""

    def __init__(self, warm_ups: int):
        self.warm_ups, self.seconds = warm_ups, []
        self._last = None

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(reset_peak=state.global_step == self.warm_ups)
        now = clock()
        if state.global_step > self.warm_ups:
            self.seconds.append(now - self._last)
        self._last = now


def trainer_run(shape: Shape, kind: str, warm_ups: int, repeats: int, compiled: bool = False) -> Timing:
    """The same rows through transformers' Trainer with fused AdamW.

    Args:
        shape: sizes.
        kind: "Motif2", "Llama" or "DiffLlama".
        warm_ups: steps before timing.
        repeats: steps timed.
        compiled: torch.compile the whole model, as the Trainer's own setting does.

    Raises:
        ValueError: a step's rows do not go through in whole parts, so the Trainer would take others.
    """
    if shape.rows % shape.micro_rows:
        raise ValueError(f"{shape.rows} rows a step, {shape.micro_rows} at once: the Trainer needs a divisor of them")
    AcceleratorState._reset_state(reset_partial_state=True)
    cuda = torch.cuda.is_available()
    config = shape.motif() if kind == "Motif2" else shape.peer(kind)
    model_class = {"Motif2": Motif2ForCausalLM, "Llama": LlamaForCausalLM, "DiffLlama": DiffLlamaForCausalLM}[kind]
    config._attn_implementation = "sdpa"
    config.use_cache = False
    torch.manual_seed(0)
    with torch.device("cuda" if cuda else "cpu"):
        model = model_class(config)
    if kind == "Motif2":
        use_polynorm(model, "auto")
    # All steps lie in one epoch: the Trainer's last step of an epoch has what rows are left, fewer than a step's.
    rows = torch.randint(0, shape.vocabulary, (shape.rows * (warm_ups + repeats), shape.length))
    data = [{"input_ids": row, "labels": row} for row in rows]
    steps = StepClock(warm_ups)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=warm_ups + repeats,
            per_device_train_batch_size=shape.micro_rows,
            gradient_accumulation_steps=shape.rows // shape.micro_rows,
            learning_rate=4e-6,
            optim="adamw_torch_fused" if cuda else "adamw_torch",
            bf16=cuda,
            use_cpu=not cuda,
            torch_compile=compiled,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_num_workers=0,
        )
        Trainer(model, settings, train_dataset=data, callbacks=[steps]).train()
    tokens = shape.rows * shape.length
    pairs = shape.rows * shape.length * (shape.length + 1) // 2
    flops = (motif_flops if kind == "Motif2" else peer_flops)(config, tokens, pairs)
    count = sum(parameter.numel() for parameter in model.parameters())
    AcceleratorState._reset_state(reset_partial_state=True)
    return Timing(steps.seconds, tokens, flops, count, peak_bytes())
