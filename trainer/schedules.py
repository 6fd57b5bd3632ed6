"""Closed forms over the tokens seen: learning rate, sequence length and batch size.

Source: arXiv 2511.07464, pre-training (Warmup-Stable-Decay to about 10% of the peak; batch from 16M to 80M tokens;
sequence length from 4,096 to 16,384 tokens).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SCHEDULES = ("wsd_linear", "wsd_inverse_sqrt", "cosine", "constant")


@dataclass(frozen=True)
class LearningRateSchedule:
    """Factor of the peak learning rate as a function of tokens.

    Args:
        kind: "wsd_linear" and "wsd_inverse_sqrt" warm up, stay at 1 and decay over the last `decay_tokens`;
            "cosine" decays from the end of the warm-up; "constant" stays.
        total_tokens: length of the run.
        warmup_tokens: linear warm-up from 0.
        decay_tokens: length of the decay of the `wsd_` kinds.
        floor: factor at the end of the decay.

    Raises:
        ValueError: an unknown kind, phases longer than the run, or a floor outside [0, 1].
    """

    kind: str
    total_tokens: int
    warmup_tokens: int = 0
    decay_tokens: int = 0
    floor: float = 0.1

    def __post_init__(self):
        if self.kind not in SCHEDULES:
            raise ValueError(f"lr_schedule is {self.kind!r}; use one of {SCHEDULES}")
        phases = self.warmup_tokens + (self.decay_tokens if self.kind.startswith("wsd") else 0)
        if min(self.warmup_tokens, self.decay_tokens) < 0 or phases > self.total_tokens:
            raise ValueError(
                f"warm-up of {self.warmup_tokens} and decay of {self.decay_tokens} tokens do not fit into a run of "
                f"{self.total_tokens}: shorten them"
            )
        if not 0 <= self.floor <= 1:
            raise ValueError(f"lr_floor is {self.floor}; use a share of the peak between 0 and 1")
        if self.kind == "wsd_inverse_sqrt" and self.floor == 0:
            raise ValueError(
                "lr_floor is 0, which an inverse square root never reaches: use wsd_linear or a floor > 0"
            )

    def factor(self, tokens: float) -> float:
        """Factor of the peak after `tokens` tokens."""
        if tokens < self.warmup_tokens:
            return tokens / self.warmup_tokens
        after_warmup = self.total_tokens - self.warmup_tokens
        decay_tokens = {"constant": 0, "cosine": after_warmup}.get(self.kind, self.decay_tokens)
        if not decay_tokens:
            return 1.0
        part = _part(tokens - (self.total_tokens - decay_tokens), decay_tokens)
        if self.kind == "cosine":
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * part))
        if self.kind == "wsd_linear":
            return 1.0 - (1 - self.floor) * part
        return 1 / math.sqrt(1 + part * (1 / self.floor**2 - 1))


@dataclass(frozen=True)
class BatchPlan:
    """Rows and row length of each step as a function of tokens.

    Args:
        batch_tokens: tokens of a step at the start.
        batch_tokens_end: tokens of a step after the ramp; `batch_tokens` when None.
        batch_ramp_tokens: tokens over which the batch grows linearly.
        lengths: row length from a number of tokens on, e.g. {0: 4096, 4_500_000_000_000: 16384}.
        rows_multiple: the number of rows is rounded down to a multiple of it, so that ranks can share them evenly.

    Raises:
        ValueError: no length from token 0 on, or a batch smaller than `rows_multiple` rows.
    """

    batch_tokens: int
    lengths: Mapping[int, int]
    batch_tokens_end: int | None = None
    batch_ramp_tokens: int = 0
    rows_multiple: int = 1

    def __post_init__(self):
        if 0 not in self.lengths or min(self.lengths.values()) < 2:
            raise ValueError(f"sequence lengths are {dict(self.lengths)}: give one of at least 2 from token 0 on")
        longest = max(self.lengths.values())
        ends = [self.batch_tokens] + ([] if self.batch_tokens_end is None else [self.batch_tokens_end])
        if min(ends) < longest * self.rows_multiple:
            raise ValueError(
                f"a batch of {min(ends)} tokens holds fewer than {self.rows_multiple} rows of {longest} "
                "tokens: raise batch_tokens or lower the sequence length"
            )

    def shape(self, tokens: int) -> tuple[int, int]:
        """(Row length, number of rows) of the step that starts after `tokens` tokens."""
        length = self.lengths[max(start for start in self.lengths if start <= tokens)]
        end = self.batch_tokens if self.batch_tokens_end is None else self.batch_tokens_end
        part = _part(tokens, self.batch_ramp_tokens)
        batch = self.batch_tokens + (end - self.batch_tokens) * part
        return length, int(batch / length) // self.rows_multiple * self.rows_multiple


def _part(tokens: float, length: float) -> float:
    """How much of a phase is over, from 0 to 1; a phase without length is over at once."""
    if not length:
        return 1.0
    return min(1.0, max(0.0, tokens / length))
