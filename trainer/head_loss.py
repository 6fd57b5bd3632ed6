"""Cross-entropy at the model's output head, without keeping logits over a large vocabulary.

The head module itself gives the losses while targets are set: its call goes through whatever is wrapped around it
(FSDP2's transfers, tensor parallelism), and the decoder before it runs as always, with its diagnostics.

Legend: R rows, T tokens, C hidden size, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.data.packing import IGNORE_INDEX

LOSSES = ("auto", "full", "chunked")
FULL_LOGITS_BYTES = 2**30  # assumption: "auto" takes chunks where logits in float32 would need more
CHUNK_WORDS = 32_768  # words of the vocabulary at a time, as TRL's own trainer takes them


class HeadLoss:
    """Makes a model's head return each position's loss instead of logits, inside `with loss.targets(…)`.

    Args:
        head: the output head, a linear layer without bias.
        kind: "full" computes all logits and torch's cross-entropy; "chunked" computes them in tiles, again in the
            backward pass, with TRL's function (in Triton on GPUs), and sums gradients in float32; "auto" takes the
            first while its logits fit into 1 GiB.
        compiled: compile the cross-entropy of full logits, which then are kept in the head's own precision.

    Raises:
        ValueError: an unknown kind, or "chunked" where TRL cannot be imported.
    """

    def __init__(self, head: nn.Linear, kind: str = "auto", compiled: bool = False):
        if kind not in LOSSES:
            raise ValueError(f"loss is {kind!r}: choose one of {', '.join(LOSSES)}")
        self.head, self.kind = head, kind
        if kind == "chunked":
            chunked_log_probabilities()
        self._logits = head.forward
        self._cross_entropy = torch.compile(cross_entropy, fullgraph=True) if compiled else cross_entropy
        self._targets: torch.Tensor | None = None
        head.forward = self._forward

    @contextmanager
    def targets(self, targets: torch.Tensor) -> Iterator[None]:
        """Inside the block, the head's result is the losses (R, T) float32, 0 where a target is -100.

        Args:
            targets: word that each position predicts, (R, T) int64.
        """
        self._targets = targets
        try:
            yield
        finally:
            self._targets = None

    def takes_chunks(self, tokens: int) -> bool:
        """Whether so many tokens at once are computed in chunks."""
        if self.kind != "auto":
            return self.kind == "chunked"
        split = isinstance(self.head.weight, DTensor)  # tensor parallelism; FSDP2 has gathered it by now
        return not split and 4 * tokens * self.head.out_features > FULL_LOGITS_BYTES

    def _forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        targets = self._targets
        if targets is None:
            return self._logits(hidden_states)
        if not self.takes_chunks(targets.numel()):
            return self._cross_entropy(self._logits(hidden_states), targets)  # (R, T)
        if isinstance(self.head.weight, DTensor):
            raise ValueError(
                "loss is 'chunked', but tensor parallelism splits the head's words: set loss full or auto"
            )
        log_probabilities = chunked_log_probabilities()(
            hidden_states.flatten(0, 1),  # (R T, C)
            self.head.weight,
            targets.flatten().clamp(min=0),
        )
        return -log_probabilities.view_as(targets).masked_fill(targets == IGNORE_INDEX, 0)  # (R, T)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (R, T) float32 of logits (R, T, V) and targets (R, T); 0 where a target is -100."""
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view_as(targets)


def chunked_log_probabilities():
    """A function of hidden states (N, C), head weight (V, C) and targets (N,): log-probabilities (N,) float32.

    Raises:
        ValueError: TRL cannot be imported.
    """
    try:
        import trl.trainer.utils  # noqa: F401  its backward imports it
        from trl.kernels import ChunkedLogProbFunction
    except ImportError as error:
        raise ValueError(
            f"the chunked loss is TRL's, which cannot be imported ({error}): pip install 'trl>=1.16,<1.17', or set "
            "loss full"
        ) from error

    def log_probabilities(hidden_states, weight, targets):
        return ChunkedLogProbFunction.apply(hidden_states, weight, None, targets, 1.0, CHUNK_WORDS, None, 1.0, ())[0]

    return log_probabilities
