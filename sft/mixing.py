"""Domain ratios held by tokens: how many tokens each domain may give, and which rows give them."""

import math
import random
from collections import defaultdict
from collections.abc import Sequence


def parse_ratios(pairs: Sequence[str]) -> dict[str, float]:
    """Read `domain=share` words into shares that sum to 1.

    Raises:
        ValueError: a word is no `domain=share`, a domain comes twice, or a share is not above 0.
    """
    ratios: dict[str, float] = {}
    for pair in pairs:
        domain, _, share = pair.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if not domain or not 0 < value < math.inf or domain in ratios:
            raise ValueError(f"ratio {pair!r} is not a new domain=share with a share above 0, such as math=0.3")
        ratios[domain] = value
    total = sum(ratios.values())
    return {domain: share / total for domain, share in ratios.items()}


def domain_budgets(available: dict[str, int], ratios: dict[str, float], total_tokens: int = 0) -> dict[str, int]:
    """Tokens each domain gives so that the ratios hold.

    Args:
        available: tokens there are, by domain.
        ratios: share of each domain; sums to 1.
        total_tokens: tokens wanted in all; 0 takes as many as the scarcest domain allows.

    Returns:
        dict: tokens by domain.

    Raises:
        ValueError: a domain of the ratios has no data, data has a domain without a ratio, or `total_tokens` is more
            than the scarcest domain allows.
    """
    if set(available) != set(ratios):
        raise ValueError(
            f"ratios name the domains {sorted(ratios)} and the data has {sorted(available)}; "
            "give every domain of the data a ratio, and only those"
        )
    most = min(available[domain] / share for domain, share in ratios.items())
    if total_tokens > most:
        scarce = min(ratios, key=lambda domain: available[domain] / ratios[domain])
        raise ValueError(
            f"total_tokens is {total_tokens}, but {scarce} has {available[scarce]} tokens, enough for {int(most)} in "
            f"all at its ratio {ratios[scarce]:.3f}; lower total_tokens or that ratio, or add data"
        )
    total = total_tokens or most
    return {domain: round(total * share) for domain, share in ratios.items()}


def fill_budgets(
    domains: Sequence[str], num_tokens: Sequence[int], budgets: dict[str, int], seed: int = 0
) -> tuple[list[int], list[int]]:
    """Draw rows at random until each domain's budget is used up.

    A row that would pass the budget is left out and the next one tried, so a domain falls short of its budget by less
    than its shortest row left out, and never passes it.

    Args:
        domains: domain of each row.
        num_tokens: tokens of each row.
        budgets: tokens by domain.
        seed: of the drawing.

    Returns:
        tuple: indices kept and indices left out, both in rising order.
    """
    order = list(range(len(domains)))
    random.Random(seed).shuffle(order)
    used: dict[str, int] = defaultdict(int)
    kept, left = [], []
    for index in order:
        domain = domains[index]
        if used[domain] + num_tokens[index] <= budgets[domain]:
            used[domain] += num_tokens[index]
            kept.append(index)
        else:
            left.append(index)
    return sorted(kept), sorted(left)
