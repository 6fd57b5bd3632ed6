"""Signatures of a failing run, each a warning of its own name.

Source: arXiv 2511.07464 asks others to watch whether noise heads grow until they cancel the signal, and whether the
loss flattens without the curriculum. It gives no thresholds: those of `PretrainConfig` are ours (assumption).
"""

from collections import deque
from statistics import fmean, median

from trainer.config import PretrainConfig

MEMORY_WINDOW_STEPS = 50  # assumption


class FailureWarning(UserWarning):
    """Something that a run seldom recovers from by itself."""


class NoiseHeadsGrowingWarning(FailureWarning):
    """In some layer, lambda times the noise maps' outputs is about to cancel the signal maps' outputs."""


class MemorySpikeWarning(FailureWarning):
    """A step took much more accelerator memory than the steps before."""


class StalledLossWarning(FailureWarning):
    """The loss no longer falls."""


class LossSpikeWarning(FailureWarning):
    """The loss spiked."""


class CheckpointWarning(FailureWarning):
    """A checkpoint could not be written."""


class FailureSigns:
    """Reads the measurements of every step and says once when a sign appears; again only after it was gone.

    What it remembers is not part of a checkpoint: after a restart it needs its windows full again.

    Args:
        config: its `warn_` settings are the thresholds.
    """

    def __init__(self, config: PretrainConfig):
        self.config = config
        self.memory: deque[int] = deque(maxlen=MEMORY_WINDOW_STEPS)
        self.losses: deque[float] = deque(maxlen=config.warn_stall_steps)
        self.row_length = 0
        self.present: set[type] = set()

    def read(self, entry: dict) -> list[FailureWarning]:
        """Signs that appear with this step.

        Args:
            entry: the step's line of `metrics.jsonl`.
        """
        found = []
        for kind, message in (
            (NoiseHeadsGrowingWarning, self._noise(entry)),
            (MemorySpikeWarning, self._memory(entry)),
            (StalledLossWarning, self._stall(entry)),
        ):
            if message is None:
                continue
            if message and kind not in self.present:
                found.append(kind(f"step {entry['step']}: {message}"))
            self.present = self.present | {kind} if message else self.present - {kind}
        return found

    def _noise(self, entry: dict) -> str | None:
        """The sign's text, "" when it is gone, or None when this step does not tell."""
        if "noise_shares" not in entry:
            return None
        share = max(entry["noise_shares"])
        if share < self.config.warn_noise_share:
            return ""
        layer = entry["noise_shares"].index(share)
        return (
            f"noise heads are growing: in layer {layer} lambda ({entry['lambdas'][layer]:.2f}) times the noise "
            f"outputs is {share:.2f} of the signal outputs; at 1 they cancel. Lower the learning "
            "rate or qk_clip_threshold"
        )

    def _memory(self, entry: dict) -> str | None:
        if "peak_memory_bytes" not in entry:
            return None
        if entry["sequence_length"] != self.row_length:  # longer rows rightly take more
            self.row_length = entry["sequence_length"]
            self.memory.clear()
        used, full = entry["peak_memory_bytes"], len(self.memory) == MEMORY_WINDOW_STEPS
        usual = median(self.memory) if full else used
        self.memory.append(used)
        if used <= usual * (1 + self.config.warn_memory_rise):
            return ""
        return (
            f"memory rose to {used / 2**30:.2f} GiB from usually {usual / 2**30:.2f} GiB: lower micro_batch_tokens or "
            "recompute activations before it runs out"
        )

    def _stall(self, entry: dict) -> str | None:
        if not self.config.warn_stall_steps or entry["skipped"]:
            return None
        self.losses.append(entry["loss"])
        if len(self.losses) < self.losses.maxlen or self.losses.maxlen < 2:
            return ""
        half = len(self.losses) // 2
        losses = list(self.losses)
        before, now = fmean(losses[:half]), fmean(losses[half:])
        if before - now >= self.config.warn_stall_drop:
            return ""
        return (
            f"the loss stalled: {before:.4f} to {now:.4f} between the halves of the last {len(losses)} steps. Look at "
            "the learning rate, at loss_by_domain, and whether the mixture still changes"
        )
