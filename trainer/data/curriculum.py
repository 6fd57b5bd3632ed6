"""The data curriculum: mixture weights that change at every step, and which domain each row of a step comes from.

Source: arXiv 2511.07464, pre-training data ("changed at every step, like a learning rate") and arXiv 2508.09148, whose
linear form r(t) = r0 + (r1 - r0) t / T is used; the rule for annealing's composition is in `check_reasoning`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WEIGHT_TOLERANCE = 1e-6


@dataclass(frozen=True)
class DomainShare:
    """Scheduled share of one domain.

    Args:
        start: share at the first token.
        end: share at the end of the main phase.
        anneal: share at the end of annealing; `end` when None.
    """

    start: float
    end: float
    anneal: float | None = None

    @property
    def final(self) -> float:
        """Share at the last token of the run."""
        return self.end if self.anneal is None else self.anneal


class Mixture:
    """Shares of all domains as functions of the tokens seen.

    They go linearly from `start` to `end` over the main phase, and on to `anneal` over the annealing phase.

    Args:
        shares: a `DomainShare` for each domain; their order is kept everywhere.
        main_tokens: tokens of the main phase.
        annealing_tokens: tokens of the annealing phase, at the end of the run.

    Raises:
        ValueError: a share is negative, the shares at a knot do not add up to 1, or a phase has no length.
    """

    def __init__(self, shares: Mapping[str, DomainShare], main_tokens: float, annealing_tokens: float = 0):
        if not shares:
            raise ValueError("the mixture has no domain: name at least one under `domains`")
        if main_tokens <= 0 or annealing_tokens < 0:
            raise ValueError(f"main phase of {main_tokens} tokens, annealing of {annealing_tokens}: use positive ones")
        for knot in ("start", "end", "final"):
            total = sum(getattr(share, knot) for share in shares.values())
            if abs(total - 1) > WEIGHT_TOLERANCE:
                raise ValueError(f"the {knot} shares of {list(shares)} add up to {total:.6g}: make them add up to 1")
            for name, share in shares.items():
                if getattr(share, knot) < 0:
                    raise ValueError(f"{knot} share of {name!r} is {getattr(share, knot)}: use 0 or more")
        self.shares = dict(shares)
        self.main_tokens = main_tokens
        self.annealing_tokens = annealing_tokens

    def weights(self, tokens: float) -> dict[str, float]:
        """Share of each domain after `tokens` tokens; the last ones hold after the end."""
        annealed = tokens - self.main_tokens
        if annealed > 0 and self.annealing_tokens:
            part = min(1.0, annealed / self.annealing_tokens)
            return {name: share.end + (share.final - share.end) * part for name, share in self.shares.items()}
        part = min(1.0, tokens / self.main_tokens)
        return {name: share.start + (share.end - share.start) * part for name, share in self.shares.items()}


def check_reasoning(shares: Mapping[str, DomainShare], reasoning: Iterable[str], cap: float) -> None:
    """Hold the report's rule for annealing: reasoning stays under `cap`, and in it math outweighs code.

    Args:
        shares: share of each domain.
        reasoning: names of the reasoning domains; those with "math" or "code" in the name are compared.
        cap: largest share of reasoning data together.

    Raises:
        ValueError: a name is unknown, or the rule is broken.
    """
    reasoning = list(reasoning)
    unknown = [name for name in reasoning if name not in shares]
    if unknown:
        raise ValueError(f"reasoning domains {unknown} are not among the domains {list(shares)}")
    for knot in ("start", "end", "final"):
        total = sum(getattr(shares[name], knot) for name in reasoning)
        if total > cap + WEIGHT_TOLERANCE:
            raise ValueError(
                f"reasoning data has a {knot} share of {total:.4g}, more than reasoning_cap {cap}: lower it"
            )
    for knot in ("end", "final"):  # between them, in annealing, shares are linear
        math, code = (
            sum(getattr(shares[name], knot) for name in reasoning if kind in name) for kind in ("math", "code")
        )
        if code and (math < code or (knot == "final" and math == code)):
            when = "begins annealing" if knot == "end" else "ends"
            raise ValueError(
                f"reasoning {when} with math at {math:.4g} and code at {code:.4g}: math must outweigh code"
            )


class DomainAllocator:
    """Chooses the domain of every row so that realised tokens follow the scheduled ones to within a row or so.

    Each row goes to the domain that lags most behind its schedule (largest deficit), so nothing is drawn at random.

    Args:
        names: domains, in the mixture's order.
    """

    def __init__(self, names: Iterable[str]):
        self.deficit_tokens = dict.fromkeys(names, 0.0)

    def choose(self, weights: Mapping[str, float], row_tokens: int) -> str:
        """The domain of the next row, which will hold about `row_tokens` tokens."""
        return max(
            (name for name in self.deficit_tokens if weights[name] > 0),
            key=lambda name: self.deficit_tokens[name] + weights[name] * row_tokens,
        )

    def record(self, weights: Mapping[str, float], domain: str, row_tokens: int) -> None:
        """Book a row of `row_tokens` tokens taken from `domain`."""
        for name, weight in weights.items():
            self.deficit_tokens[name] += weight * row_tokens
        self.deficit_tokens[domain] -= row_tokens
