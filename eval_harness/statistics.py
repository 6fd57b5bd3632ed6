"""What a difference between two scores is worth: standard errors, intervals, paired tests, pass@k.

Shapes: R rows, V different values among them, S resamples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000


def standard_error(values: Sequence[float]) -> float:
    """Standard error of a mean over rows (sample variance); 0 for fewer than two rows."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95% confidence interval of a share; it stays inside [0, 1] and is honest at 0 and 1.

    Raises:
        ValueError: no trial, or more successes than trials.

    Source: Wilson, JASA 22 (1927).
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials; use 0 <= successes <= trials, and a trial")
    share = successes / trials
    centre = share + z * z / (2 * trials)
    reach = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, min(share, (centre - reach) / scale)), min(1.0, max(share, (centre + reach) / scale))


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that k of `samples` drawn programs hold a correct one: `1 - C(n - c, k) / C(n, k)`.

    Raises:
        ValueError: k exceeds the samples, or the counts are impossible.

    Source: arXiv 2107.03374, section 2.1.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(
            f"pass@{k} of {correct} correct in {samples} samples; use 1 <= k <= samples and correct <= samples"
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / count for count in range(samples - correct + 1, samples + 1))


@dataclass(frozen=True)
class PairedDifference:
    """Second run minus first, over the rows that both scored.

    Attributes:
        difference: of the means.
        low, high: 95% interval from the paired bootstrap.
        p_value: two-sided; exact sign test on the rows that differ (McNemar's for right and wrong).
        better, worse: rows on which the second run scores higher and lower.
        rows: rows compared.
    """

    difference: float
    low: float
    high: float
    p_value: float
    better: int
    worse: int
    rows: int


def paired_difference(first: Sequence[float], second: Sequence[float], seed: int = 0) -> PairedDifference:
    """Compare two runs row by row.

    Args:
        first, second: (R,) scores of the same rows in the same order.
        seed: of the bootstrap.

    Raises:
        ValueError: the runs have different lengths, or no row.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"{len(first)} and {len(second)} rows; give the same rows of both runs, at least one")
    differences = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)  # (R,)
    values, counts = np.unique(differences, return_counts=True)  # (V,), (V,)
    draws = np.random.default_rng(seed).multinomial(len(differences), counts / counts.sum(), RESAMPLES)  # (S, V)
    means = draws @ values / len(differences)  # (S,)
    low, high = np.quantile(means, [0.025, 0.975])
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = sign_test(better, worse)
    return PairedDifference(
        float(differences.mean()), float(low), float(high), p_value, better, worse, len(differences)
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact p-value of `better` against `worse` under a fair coin."""
    trials = better + worse
    tail = sum(math.comb(trials, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**trials)
