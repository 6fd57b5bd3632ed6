"""What a stage records: one JSON line an update, and a progress bar that stays one line."""

import json
import math
import os
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from modeling_motif2.diagnostics import attention_modules, reset_max_logits

# Steps between exact maximum logits (assumption); in others a bound stands for those under QK-clip's threshold.
_EXACT_LOGIT_STEPS = 10
_NAMES = {"mean_token_accuracy": "token_accuracy", "num_tokens": "tokens"}


def read_metrics(path: Path) -> list[dict]:
    """The lines of a `metrics.jsonl`; a last line that a kill or a full disk cut short is left out.

    Raises:
        ValueError: another line is no JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is no JSON ({error}); remove it") from error
    return found


class MetricsCallback(TrainerCallback):
    """Appends every log of the trainer to `metrics.jsonl`, with the largest attention logits by layer.

    TRL runs the backbone without our head's forward; the logits are recorded inside the attention modules.

    Args:
        path: the file. A run that goes on from a checkpoint drops the lines of the updates it makes again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.losses: list[float] = []
        self._attention: dict = {}
        self._gates: list[float | None] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._gates = [attention.max_logits_gate for attention in attention_modules(model)]
        if state.is_world_process_zero and self.path.exists():
            kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
            unfinished = self.path.with_suffix(".partial")
            unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            os.replace(unfinished, self.path)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        exact = state.global_step % _EXACT_LOGIT_STEPS == 0
        for attention, gate in zip(attention_modules(model), self._gates, strict=True):
            attention.max_logits_gate = None if exact else gate
        self._attention = {"max_logits_exact": exact or all(gate is None for gate in self._gates)}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        maxima = torch.stack([attention.max_logits.max() for attention in attention_modules(model)])  # (layers,)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX)
        self._attention["max_logits"] = [value if math.isfinite(value) else None for value in maxima.tolist()]

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        if hasattr(inner, "clip_report"):
            self._attention["clipped_heads"] = inner.clip_report()["clipped_heads"]
        else:
            reset_max_logits(model)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        line = {"step": state.global_step}
        if "eval_loss" in logs:
            line["eval"] = {"loss": logs["eval_loss"], "token_accuracy": logs["eval_mean_token_accuracy"]}
        else:
            self.losses.append(logs["loss"])
            line.update({_NAMES.get(key, key): value for key, value in logs.items()}, **self._attention)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=float) + "\n")


class QuietProgress(ProgressCallback):
    """transformers' progress bar with the loss beside it, instead of a printed line a log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if (
            state.is_world_process_zero
            and self.training_bar is not None
            and logs
            and math.isfinite(logs.get("loss", math.nan))
        ):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}")
