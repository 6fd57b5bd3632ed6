"""Floating-point operations of a Newton-Schulz pass, a multiply-add counted as two.

With s rows and l columns, s <= l: a symmetric product of depth k costs s^2 k when only its upper triangle is computed
and 2 s^2 k when it is computed whole; an (s, s) by (s, l) product costs 2 s^2 l and has no symmetry to use.
"""


def newton_schulz_flops(
    rows: int,
    columns: int,
    method: str = "gram",
    num_steps: int = 5,
    restarts: tuple[int, ...] = (2,),
    symmetric: bool = True,
) -> int:
    """Operations executed for one matrix.

    Args:
        rows: rows of the matrix, in either orientation.
        columns: columns of the matrix.
        method: `"gram"` or `"classic"`.
        num_steps: steps of the iteration.
        restarts: steps before which the Gram form goes back to X; without meaning for `"classic"`.
        symmetric: count symmetric products half, as the kernels compute them.

    Returns:
        Floating-point operations; `method="classic", symmetric=False` is the yardstick of classic-equivalent rates.

    Raises:
        ValueError: for an unknown method.
    """
    s, l = min(rows, columns), max(rows, columns)
    square = s**3 if symmetric else 2 * s**3
    gram = s * s * l if symmetric else 2 * s * s * l
    apply = 2 * s * s * l
    if method == "classic":
        return num_steps * (gram + square + apply)
    if method != "gram":
        raise ValueError(f"method={method!r} is unknown: use 'gram' or 'classic'")
    inner_restarts = {step for step in restarts if 0 < step < num_steps}
    starts = 1 + len(inner_restarts)
    # Every step makes Z. All but the first after a start multiply it into Q; all but the last before a restart or the
    # end update R by two products.
    square_products = num_steps + (num_steps - starts) + 2 * (num_steps - starts)
    return starts * (gram + apply) + square_products * square
