"""What trainers here add to TRL's: they stop at numbers that are none, prove the kernel, and seal checkpoints."""

import math
from pathlib import Path

import torch
from safetensors import SafetensorError

from kernels_hub import KernelChoice, assert_polynorm_runs
from sft.checkpoints import seal, unseal
from trainer.errors import CheckpointError
from trainer.sharding import drop_gathered_weights, gather_backwards_in_order, keep_losses_in_float32


class GuardedSteps:
    """Mixed into TRL's trainers, before them.

    It stops at the first loss or gradient that is no number, before it reaches the weights. Every rank decides by the
    same reduced number, so that none waits for one that has stopped. In its first micro-step it counts PolyNorm's
    operators: `kernel` is what ran, and a kernel that did not run is an AssertionError. Under FSDP2 losses stay in
    float32, and evaluations leave no trace in the steps after them (`trainer/sharding.py`).
    """

    kernel: KernelChoice | None = None

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        # Before TRL shards a reference model: rounded, its answers would differ from those of the model it equals.
        keep_losses_in_float32(getattr(self.accelerator.state, "fsdp_plugin", None))

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        step = super().training_step
        if self.kernel is None:
            gather_backwards_in_order(self.accelerator.unwrap_model(self.model))
            losses = []
            self.kernel = assert_polynorm_runs(self.model, lambda: losses.append(step(*args, **kwargs)))
            loss = losses[0]
        else:
            loss = step(*args, **kwargs)
        self._refuse_non_finite("loss", self.accelerator.reduce(loss.detach(), "sum").item())
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self._refuse_non_finite("gradient's norm", norm)  # over all ranks already
        return norm

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        drop_gathered_weights(self.accelerator.unwrap_model(self.model))
        return metrics

    def _refuse_non_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the {what} is {value} at update {self.state.global_step + 1}; the weights are as the update "
                "before left them: look at the end of metrics.jsonl, lower learning_rate (which a continuation takes "
                "over), and go on from the last checkpoint with resume: true"
            )

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            unseal(folder)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                seal(folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder} could not be written ({error}); earlier checkpoints are as they were: make room, and go on "
                "with resume: true"
            ) from error

    def _load_optimizer_and_scheduler(self, checkpoint):
        """Moments and the place in the schedule are the checkpoint's; peak rates and decay are the settings'."""
        schedule = self.lr_scheduler
        if checkpoint is None or not hasattr(schedule, "base_lrs"):
            return super()._load_optimizer_and_scheduler(checkpoint)
        groups = self.optimizer.param_groups
        decays, peaks = [group["weight_decay"] for group in groups], list(schedule.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        groups = self.optimizer.param_groups
        for group, decay, peak, before in zip(groups, decays, peaks, schedule.base_lrs, strict=True):
            group.update(weight_decay=decay, initial_lr=peak, lr=group["lr"] * (peak / before))
        rates = [group["lr"] for group in groups]
        schedule.load_state_dict(schedule.state_dict() | {"base_lrs": peaks, "_last_lr": rates})
