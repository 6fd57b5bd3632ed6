"""One optimizer step: micro-batches, loss by domain, gradient norm, MuonClip, and a stop before anything non-finite.

Legend: R rows of this rank, T tokens of a row, V vocabulary, N domains.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from kernels_hub import assert_polynorm_runs, polynorm_in_use
from modeling_motif2.diagnostics import attention_modules, reset_max_logits
from trainer.data.loader import Batch
from trainer.data.packing import IGNORE_INDEX
from trainer.execution import fast_attention
from trainer.head_loss import HeadLoss
from trainer.masks import attention_masks, send
from trainer.optim.layout import local_of
from trainer.sharding import drop_gathered_weights, gather_backwards_in_order


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient of a step is NaN or infinite; weights and checkpoints are as before that step."""


@dataclass
class StepOutcome:
    """What a step measured, over all ranks.

    Args:
        loss: mean over the predicted tokens, nats.
        loss_by_domain: the same for each domain that had rows in the step.
        grad_norm: gradient norm before clipping.
        max_logits: largest attention logit of each layer, behind a gate an upper bound; empty when not tracked.
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
        loss: how the head's loss is computed, see `HeadLoss`.
        compile_loss: compile the cross-entropy.
        tensor_ranks: ranks that share a row's computation by tensor parallelism, and so have the same rows.

    Raises:
        ValueError: accelerate was launched with another number of tensor parallel ranks.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer,
        domains: list[str],
        max_grad_norm: float | None,
        micro_batch_tokens: int | None,
        loss: str = "auto",
        compile_loss: bool = False,
        tensor_ranks: int = 1,
    ):
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.domains = domains
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.micro_batch_tokens = micro_batch_tokens
        launched = getattr(accelerator.parallelism_config, "tp_size", 1)
        if launched not in (1, tensor_ranks):  # 1: whoever split the model did so without accelerate
            raise ValueError(
                f"accelerate was launched with tp_size {launched}, and rows are dealt out for {tensor_ranks}: set "
                "parallelism_config_tp_size 1 and shard with FSDP2 or HSDP"
            )
        self.data_ranks = accelerator.num_processes // tensor_ranks
        self.data_rank = accelerator.process_index // tensor_ranks  # tensor parallelism is the mesh's innermost axis
        self.bare_model = accelerator.unwrap_model(model)
        gather_backwards_in_order(self.bare_model)
        self.head_loss = HeadLoss(self.bare_model.get_output_embeddings(), loss, compile_loss)
        compiled = any(hasattr(module.forward, "_torchdynamo_orig_callable") for module in model.modules())
        self._compiled = compiled
        self._steps_to_proof = None if polynorm_in_use(model).source == "torch" else int(compiled)
        self._summed = summed_parameters(self.bare_model) if tensor_ranks > 1 else []
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

        Raises:
            AssertionError: the PolyNorm kernel in use did not run in the first step, or compiled in the second.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self.model.train()
        with fast_attention():  # over the backward too, which may recompute the forward
            sums = self._backward_with_proof(batch)  # (2, N)
        grad_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        numbers = self._numbers(sums, whole(grad_norm))
        self._spoil_gradients(numbers)
        self.optimizer.step()  # leaves the update out, on all ranks, where a gradient is not finite
        self.optimizer.zero_grad()
        measured = self._read(numbers)
        loss, grad_norm = sum(measured.losses) / batch.predicted_tokens, measured.grad_norm
        skipped = not (math.isfinite(loss) and math.isfinite(grad_norm))
        clipped_heads = 0
        if skipped:
            reset_max_logits(self.model)
        else:
            clipped_heads = int(self.optimizer.optimizer.clip_report()["clipped_heads"])
        counted = zip(self.domains, measured.losses, measured.counts, strict=True)
        by_domain = {name: total / count for name, total, count in counted if count}
        return StepOutcome(loss, by_domain, grad_norm, measured.max_logits, measured.lambdas, clipped_heads, skipped)

    def _backward_with_proof(self, batch: Batch) -> torch.Tensor:
        """`_backward`; in the first step, compiled in the second, with a proof that the PolyNorm kernels ran."""
        if self._steps_to_proof != 0:
            self._steps_to_proof = self._steps_to_proof and self._steps_to_proof - 1
            return self._backward(batch)
        self._steps_to_proof, sums = None, []
        assert_polynorm_runs(self.model, lambda: sums.append(self._backward(batch)), compiled=self._compiled)
        return sums[0]

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Accumulate gradients of the step's mean loss; returns sums of losses and counts by domain, (2, N)."""
        rows, length = batch.input_ids.shape
        at_once = rows if self.micro_batch_tokens is None else max(1, self.micro_batch_tokens // length)
        scale = self.data_ranks / batch.predicted_tokens  # ranks are averaged
        sums = torch.zeros(2, len(self.domains), device=self.accelerator.device)  # (2, N)
        for start in range(0, rows, at_once):
            part = slice(start, start + at_once)
            with self._gradient_sync(start + at_once >= rows), self._summed_apart():
                losses, counted = self.token_losses(
                    batch.input_ids[part], batch.labels[part], batch.position_ids[part]
                )
                self.accelerator.backward(losses.sum() * scale)
            member = F.one_hot(batch.domain_ids[part], len(self.domains)).to(sums.dtype)  # (R, N)
            sums += torch.stack([losses.detach().sum(1), counted.sum(1).to(sums.dtype)]) @ send(member, sums.device)
        return sums * self.data_ranks / self.accelerator.num_processes  # tensor parallel ranks count the same rows

    @contextlib.contextmanager
    def _gradient_sync(self, wanted: bool) -> Iterator[None]:
        """Gradients go to the other ranks only in the last micro-batch of a step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(wanted)
            yield
        else:
            with contextlib.nullcontext() if wanted else self.accelerator.no_sync(self.model):
                yield

    @contextlib.contextmanager
    def _summed_apart(self) -> Iterator[None]:
        """Keep a micro-batch's sums of gradients over tensor parallel ranks from summing the earlier ones' again."""
        earlier = [parameter.grad for parameter in self._summed]
        for parameter in self._summed:
            parameter.grad = None
        yield
        for parameter, gradient in zip(self._summed, earlier, strict=True):
            if gradient is not None:
                parameter.grad += gradient

    def token_losses(
        self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of each position's next token.

        Args:
            input_ids, labels, position_ids: (R, T) int64, best on the host.

        Returns:
            tuple: losses (R, T) float32, 0 where nothing is predicted; and which positions are predicted, (R, T) bool.
        """
        device = self.accelerator.device
        masks = attention_masks(self.bare_model.config, position_ids, device)
        input_ids, labels, position_ids = (send(tensor, device) for tensor in (input_ids, labels, position_ids))
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)  # (R, T)
        with self.head_loss.targets(targets):
            output = self.model(input_ids=input_ids, attention_mask=masks, position_ids=position_ids, use_cache=False)
        return output.logits, targets != IGNORE_INDEX

    @torch.no_grad()
    def evaluate(self, batches: list[dict[str, torch.Tensor]]) -> float:
        """Mean held-out loss over `batches`, which all ranks give alike and share."""
        rank, ranks = self.data_rank, self.data_ranks
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        for index in range(rank, math.ceil(len(batches) / ranks) * ranks, ranks):
            with fast_attention():
                losses, counted = self.token_losses(**batches[min(index, len(batches) - 1)])
            if index < len(batches):  # a rank without a batch of its own only keeps the others company
                sums += torch.stack([losses.double().sum(), counted.sum().double()])
        drop_gathered_weights(self.bare_model)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return total / count

    @torch.no_grad()
    def _numbers(self, sums: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """A step's numbers before the update, over all ranks, on the device: sums of losses and counts (N each),
        gradient norm, lambdas and largest logits by layer."""
        tracked = [attention.max_logits for attention in self.attentions if attention.max_logits is not None]
        largest = torch.stack([logits.amax() for logits in tracked]) if tracked else sums.new_empty(0)
        if tracked and self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        lambdas = [whole(attention.lambda_value()) for attention in self.attentions]
        sums = self.accelerator.reduce(sums, "sum")
        parts = [sums.flatten(), grad_norm.reshape(1), torch.stack(lambdas), largest]
        return torch.cat([part.float() for part in parts])

    @torch.no_grad()
    def _spoil_gradients(self, numbers: torch.Tensor) -> None:
        """Make a gradient NaN where a loss or the norm is not finite, without waiting for the device to know."""
        spoilt = 0 * numbers[: 2 * len(self.domains) + 1].sum()
        gradients = (p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None)
        local = next((part for part in map(local_of, gradients) if part.numel()), None)
        if local is not None:
            local += spoilt.to(local.dtype)

    def _read(self, numbers: torch.Tensor) -> "_Measured":
        """Bring a step's numbers to the host at once."""
        values = numbers.tolist()
        ends = [*itertools.accumulate([len(self.domains), len(self.domains), 1, len(self.attentions)])]
        losses, counts, (norm,), lambda_values, max_logits = (
            values[start:stop] for start, stop in zip([0, *ends], [*ends, None], strict=True)
        )
        return _Measured(losses, counts, norm, lambda_values, max_logits)


@dataclass
class _Measured:
    """A step's numbers on the host: sums of losses and counts by domain, the norm, and each layer's two."""

    losses: list[float]
    counts: list[float]
    grad_norm: float
    lambdas: list[float]
    max_logits: list[float]


def summed_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Replicated parameters whose gradients transformers' tensor parallelism adds over the ranks in each backward.

    It adds what `.grad` holds by then, an earlier micro-batch's sum included.
    """
    return [
        parameter
        for name, module in model.named_modules()
        if model.tp_plan.get(re.sub(r"\.\d+\.", ".*.", name)) == "replicated_with_grad_allreduce"
        for parameter in module.parameters(recurse=False)
    ]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that may be spread over ranks, all of it on each; all of them call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
