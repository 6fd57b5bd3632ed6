"""Loss spikes: a loss far above the recent ones, measured against their median so that spikes do not hide each other.

Source: the rule (median absolute deviation, patience, rewind and skip) is ours (assumption); PaLM, arXiv 2204.02311,
section 5.1, went back about 100 steps and skipped 200 to 500 batches.
"""

from collections import deque
from statistics import median

SIGMA_PER_MAD = 1.4826  # of a normal distribution


class SpikeDetector:
    """Tells when the loss has spiked. Its state is part of a checkpoint, so that a restart decides alike.

    A loss is high when it lies above the median of the window by `deviations` * 1.4826 * MAD and by `min_rise`; the
    window, which only takes losses that are not high, must be full before anything is.

    Args:
        window_steps: losses of the window; 0 never detects anything.
        deviations: in standard deviations of a normal distribution, estimated by the median absolute deviation.
        min_rise: nats.
        patience_steps: high losses in a row that make a spike; one bad batch alone is left behind.
    """

    def __init__(self, window_steps: int, deviations: float, min_rise: float, patience_steps: int):
        self.deviations, self.min_rise, self.patience_steps = deviations, min_rise, patience_steps
        self.recent: deque[float] = deque(maxlen=window_steps)
        self.high_steps = 0

    @property
    def limit(self) -> float | None:
        """Loss above which a step is high; None while the window is not full."""
        if not self.recent.maxlen or len(self.recent) < self.recent.maxlen:
            return None
        middle = median(self.recent)
        deviation = SIGMA_PER_MAD * median(abs(loss - middle) for loss in self.recent)
        return middle + max(self.deviations * deviation, self.min_rise)

    def observe(self, loss: float) -> bool:
        """Take in a step's finite loss; returns whether the loss has now spiked."""
        limit = self.limit
        if limit is not None and loss > limit:
            self.high_steps += 1
        else:
            self.high_steps = 0
            self.recent.append(loss)
        return self.high_steps >= self.patience_steps

    def state_dict(self) -> dict:
        """Everything that `observe` depends on."""
        return {"recent": list(self.recent), "high_steps": self.high_steps}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`."""
        self.recent.clear()
        self.recent.extend(state["recent"])
        self.high_steps = state["high_steps"]
