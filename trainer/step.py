"""One optimizer step: micro-batches, loss by domain, gradient norm, MuonClip, and a stop before anything non-finite.

Legend: R rows of this rank, T tokens of a row, V vocabulary, N domains.
"""

import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from modeling_motif2.diagnostics import attention_modules, reset_max_logits
from trainer.data.loader import Batch
from trainer.data.packing import IGNORE_INDEX


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient of a step is NaN or infinite; weights and checkpoints are as before that step."""


@dataclass
class StepOutcome:
    """What a step measured, over all ranks.

    Args:
        loss: mean over the predicted tokens, nats.
        loss_by_domain: the same for each domain that had rows in the step.
        grad_norm: gradient norm before clipping.
        max_logits: largest attention logit of each layer; empty when not tracked.
        lambdas: lambda of each layer, before the update.
        clipped_heads: heads that QK-clip scaled down.
        skipped: the update was left out because loss or gradient were not finite.
    """

    loss: float
    loss_by_domain: dict[str, float]
    grad_norm: float
    max_logits: list[float]
    lambdas: list[float]
    clipped_heads: int
    skipped: bool


class TrainStep:
    """Runs training steps and held-out evaluations of one prepared model.

    Args:
        accelerator: that prepared model and optimizer.
        model: prepared model.
        optimizer: prepared MuonClip.
        domains: names by domain number.
        max_grad_norm: clips the gradient norm; None is off.
        micro_batch_tokens: tokens of one forward; None takes all rows at once.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer,
        domains: list[str],
        max_grad_norm: float | None,
        micro_batch_tokens: int | None,
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.domains = domains
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.micro_batch_tokens = micro_batch_tokens
        self.attentions = attention_modules(model)
        for attention in self.attentions:  # they are no buffers: moving the model left them behind
            if attention.max_logits is not None:
                attention.max_logits = attention.max_logits.to(accelerator.device)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def run(self, batch: Batch, lr_factor: float) -> StepOutcome:
        """Train on one batch.

        Args:
            batch: this rank's rows.
            lr_factor: factor of every group's peak learning rate.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self.model.train()
        sums = self._backward(batch)  # (2, N)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        grad_norm = float(grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm)
        losses, counts = self.accelerator.reduce(sums, "sum").tolist()
        loss = sum(losses) / batch.predicted_tokens
        max_logits, lambdas = self._attention_state()
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        clipped_heads = 0
        if skipped:
            reset_max_logits(self.model)
        else:
            self.optimizer.step()
            clipped_heads = int(self.optimizer.optimizer.clip_report()["clipped_heads"])
        self.optimizer.zero_grad()
        by_domain = {name: losses[i] / counts[i] for i, name in enumerate(self.domains) if counts[i]}
        return StepOutcome(loss, by_domain, grad_norm, max_logits, lambdas, clipped_heads, skipped)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Accumulate gradients of the step's mean loss; returns sums of losses and counts by domain, (2, N)."""
        rows, length = batch.input_ids.shape
        at_once = rows if self.micro_batch_tokens is None else max(1, self.micro_batch_tokens // length)
        scale = self.accelerator.num_processes / batch.predicted_tokens  # ranks are averaged
        sums = torch.zeros(2, len(self.domains), device=self.accelerator.device)  # (2, N)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            last = start + at_once >= rows
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                losses, counted = self.token_losses(
                    batch.input_ids[part], batch.labels[part], batch.position_ids[part]
                )
                self.accelerator.backward(losses.sum() * scale)
            domain_ids = batch.domain_ids[part].to(sums.device)
            member = F.one_hot(domain_ids, len(self.domains)).to(sums.dtype)  # (R, N)
            sums += torch.stack([losses.detach().sum(1), counted.sum(1).to(sums.dtype)]) @ member
        return sums

    def token_losses(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each position's next token.

        Args:
            input_ids, labels, position_ids: (R, T) int64, on any device.

        Returns:
            tuple: losses (R, T) float32, 0 where nothing is predicted; and which positions are predicted, (R, T) bool.
        """
        device = self.accelerator.device
        input_ids, labels, position_ids = (
            tensor.to(device, non_blocking=True) for tensor in (input_ids, labels, position_ids)
        )
        logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits  # (R, T, V)
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (R, T)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        return losses.view_as(targets), targets != IGNORE_INDEX

    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, torch.Tensor]]) -> float:
        """Mean held-out loss over `batches`, which all ranks give alike and share."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        tracked = [attention.max_logits for attention in self.attentions]
        for attention in self.attentions:
            attention.max_logits = None
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for index in range(rank, math.ceil(len(batches) / ranks) * ranks, ranks):
            losses, counted = self.token_losses(**batches[min(index, len(batches) - 1)])
            if index < len(batches):  # a rank without a batch of its own only keeps the others company
                sums += torch.stack([losses.double().sum(), counted.sum().double()])
        for attention, max_logits in zip(self.attentions, tracked, strict=True):
            attention.max_logits = max_logits
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return total / count

    @torch.no_grad()
    def _attention_state(self) -> tuple[list[float], list[float]]:
        """Largest logit and lambda of each layer."""
        lambdas = torch.stack([_whole(attention.lambda_value()) for attention in self.attentions]).tolist()
        tracked = [attention.max_logits for attention in self.attentions if attention.max_logits is not None]
        if not tracked:
            return [], lambdas
        largest = torch.stack([logits.amax() for logits in tracked])
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        return largest.tolist(), lambdas


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
