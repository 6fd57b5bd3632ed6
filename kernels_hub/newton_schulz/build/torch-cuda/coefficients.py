"""Newton-Schulz coefficients: one (a, b, c) a step for X <- a X + (b X X' + c (X X')^2) X."""

Step = tuple[float, float, float]

# Source: Motif-2-12.7B technical report, section 4.3 (the official optimizer's values).
MOTIF: tuple[Step, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)

# Source: Keller Jordan, Muon (2024): the same quintic five times.
JORDAN: tuple[Step, ...] = ((3.4445, -4.7750, 2.0315),) * 5

# Source: Polar Express, arXiv 2505.16932, algorithm 1: optimal quintics for singular values from 1e-3 to 1. The paper
# divides x by 1.01; the wider 1.05 leaves room for half precision, in which a singular value can come out above 1.
_POLAR_EXPRESS_SAFETY = 1.05
_POLAR_EXPRESS_PUBLISHED: tuple[Step, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_EXPRESS: tuple[Step, ...] = tuple(
    (a / _POLAR_EXPRESS_SAFETY, b / _POLAR_EXPRESS_SAFETY**3, c / _POLAR_EXPRESS_SAFETY**5)
    for a, b, c in _POLAR_EXPRESS_PUBLISHED
)

COEFFICIENTS: dict[str, tuple[Step, ...]] = {"motif": MOTIF, "polar_express": POLAR_EXPRESS, "jordan": JORDAN}


def resolve_coefficients(coefficients: str | tuple[Step, ...]) -> tuple[Step, ...]:
    """Steps behind a name, or the given steps once checked.

    Args:
        coefficients: `"motif"`, `"polar_express"`, `"jordan"`, or a non-empty sequence of (a, b, c).

    Returns:
        One (a, b, c) of floats a step.

    Raises:
        ValueError: for an unknown name, no steps, or a step that is not three finite numbers.
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            known = ", ".join(sorted(COEFFICIENTS))
            raise ValueError(
                f"coefficients={coefficients!r} is unknown: use one of {known}, or (a, b, c) for each step"
            )
        return COEFFICIENTS[coefficients]
    steps = tuple(tuple(float(value) for value in step) for step in coefficients)
    if not steps:
        raise ValueError("coefficients is empty: give (a, b, c) for at least one step")
    for index, step in enumerate(steps):
        if len(step) != 3 or any(value != value or abs(value) == float("inf") for value in step):
            raise ValueError(f"coefficients[{index}]={step} must be three finite numbers (a, b, c)")
    return steps
