"""Floating-point operations of a Newton-Schulz pass, a multiply-add counted as two.

With s rows and l columns, s <= l: a symmetric product of depth k costs s^2 k when only its upper triangle is computed
and 2 s^2 k when it is computed whole; an (s, s) by (s, l) product costs 2 s^2 l and has no symmetry to use.
"""

NEARLY_SQUARE = 1.25


def default_restarts(rows: int, columns: int, num_steps: int = 5) -> tuple[int, ...]:
    """Restarts of the Gram form: before step 2, before step 3 where a matrix is nearly square, and later every second.

    A nearly square matrix has singular values close to zero, which the Gram matrix holds squared: with one restart its
    error in float16 can exceed that of the classic form in bfloat16. The second restart costs 3 s^2 (l - s), nothing
    for a square. `NEARLY_SQUARE`, the ratio below which it is made, is an assumption. Three steps after the last
    restart are as many as five steps need. Where there are more, the drift goes on growing, to NaN after ten: then
    X is updated before step 4, step 6 and so on.
    """
    nearly_square = max(rows, columns) < NEARLY_SQUARE * min(rows, columns)
    later = range(4, num_steps, 2) if num_steps > 5 else ()
    return tuple(step for step in (2, *((3,) if nearly_square else ()), *later) if step < num_steps)


def newton_schulz_flops(
    rows: int,
    columns: int,
    method: str = "gram",
    num_steps: int = 5,
    restarts: tuple[int, ...] | None = None,
    symmetric: bool = True,
) -> int:
    """Operations executed for one matrix.

    Args:
        rows: rows of the matrix, in either orientation.
        columns: columns of the matrix.
        method: `"gram"` or `"classic"`.
        num_steps: steps of the iteration.
        restarts: steps before which the Gram form goes back to X, by default `default_restarts`; without meaning for
            `"classic"`.
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
    if restarts is None:
        restarts = default_restarts(rows, columns, num_steps)
    inner_restarts = {step for step in restarts if 0 < step < num_steps}
    starts = 1 + len(inner_restarts)
    # Every step makes Z. All but the first after a start multiply it into Q; all but the last before a restart or the
    # end update R by two products.
    square_products = num_steps + (num_steps - starts) + 2 * (num_steps - starts)
    return starts * (gram + apply) + square_products * square
