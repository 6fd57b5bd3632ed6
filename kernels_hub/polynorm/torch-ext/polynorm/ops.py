"""PolyNorm as torch.library operators: seen whole by torch.compile and torch.export, with their own backward.

Operators take any leading shape and compute with Triton on a GPU (or in Triton's interpreter), else in plain torch;
float64 is always computed in plain torch, the kernels' arithmetic being float32.
"""

import torch
from torch.autograd import forward_ad

from . import reference
from ._ops import add_op_namespace_prefix

try:
    from . import launch
except ImportError:  # torch for CPU comes without Triton
    launch = None


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _implementation(x: torch.Tensor):
    if x.is_cuda and launch is None and x.dtype != torch.float64:
        raise RuntimeError(
            "PolyNorm on a GPU needs Triton, which could not be imported: install triton, or move to CPU"
        )
    on_triton = launch is not None and (x.is_cuda or launch.INTERPRETED) and x.dtype != torch.float64
    return launch if on_triton else reference


def _check(x: torch.Tensor, up: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if x.dim() == 0:
        raise ValueError("x must have one dimension or more, got a single number: normalise over a row of them")
    if weight.shape != (3,) or bias.shape not in ((1,), ()):
        raise ValueError(
            f"weight must have the shape (3,) and bias (1,) or (), got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be of a type of {', '.join(map(str, DTYPES))}, got {tensor.dtype}: cast it")
    if up is not None and (up.shape != x.shape or up.dtype != x.dtype):
        raise ValueError(
            f"up must have x's shape and type, got {up.dtype} {tuple(up.shape)} for {x.dtype} {tuple(x.shape)}"
        )


def _check_mode(*tensors: torch.Tensor | None) -> None:
    """Refuses forward-mode differentiation, in which torch takes the tangent of an operator like these to be zero."""
    if forward_ad._current_level < 0:  # outside of it, without the microseconds of looking at each tensor
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            "PolyNorm's kernels have no forward-mode derivative: use the backward, or the plain torch implementation"
        )


def _operator(name: str):
    return torch.library.custom_op(add_op_namespace_prefix(name), mutates_args=())


@_operator("poly_norm")
def _forward(
    x: torch.Tensor, up: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _implementation(x).forward(x, up, weight, bias, eps)


@_forward.register_fake
def _(x, up, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 3), dtype=_wide(x.dtype))


@_operator("poly_norm_backward")
def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    inverse_rms: torch.Tensor,
) -> list[torch.Tensor]:
    return _implementation(x).backward(dy, x, up, weight, bias, inverse_rms)


@_backward.register_fake
def _(dy, x, up, weight, bias, inverse_rms):
    gradients = [x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)]
    return gradients if up is None else [*gradients, up.new_empty(up.shape)]


@_operator("poly_norm_power_sums")
def power_sums(x: torch.Tensor) -> torch.Tensor:
    """Sums of x^2, x^4, x^6 over the last dimension: (*x.shape[:-1], 3) float32."""
    return _implementation(x).power_sums(x)


@power_sums.register_fake
def _(x):
    return x.new_empty((*x.shape[:-1], 3), dtype=_wide(x.dtype))


@_operator("poly_norm_apply")
def apply(
    x: torch.Tensor, up: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, inverse_rms: torch.Tensor
) -> torch.Tensor:
    """y like x, from inverse root mean squares (*x.shape[:-1], 3) that are already known."""
    return _implementation(x).apply(x, up, weight, bias, inverse_rms)


@apply.register_fake
def _(x, up, weight, bias, inverse_rms):
    return x.new_empty(x.shape)


@_operator("poly_norm_gradient_sums")
def gradient_sums(
    dy: torch.Tensor, x: torch.Tensor, up: torch.Tensor | None, inverse_rms: torch.Tensor
) -> torch.Tensor:
    """A row's shares of the gradients of the three weights and the bias: (*x.shape[:-1], 4) float32."""
    return _implementation(x).gradient_sums(dy, x, up, inverse_rms)


@gradient_sums.register_fake
def _(dy, x, up, inverse_rms):
    return x.new_empty((*x.shape[:-1], 4), dtype=_wide(x.dtype))


@_operator("poly_norm_input_gradients")
def input_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    inverse_rms: torch.Tensor,
    sums: torch.Tensor,
    count: int,
) -> list[torch.Tensor]:
    """[dx], and dup where there is an up, from sums (*x.shape[:-1], 4) over rows of `count` columns in all."""
    return _implementation(x).input_gradients(dy, x, up, weight, bias, inverse_rms, sums, count)


@input_gradients.register_fake
def _(dy, x, up, weight, bias, inverse_rms, sums, count):
    return [tensor.new_empty(tensor.shape) for tensor in (x, up) if tensor is not None]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _save(ctx, inputs, output):
    x, up, weight, bias, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, up, weight, bias, output[1])


def _differentiate(ctx, dy, _):
    x, up, weight, bias, inverse_rms = ctx.saved_tensors
    dx, dweight, dbias, *dup = _backward(dy, x, up, weight, bias, inverse_rms)
    return dx, dup[0] if dup else None, dweight, dbias, None


def _refuse_double_backward(ctx, *_):
    raise NotImplementedError(
        "PolyNorm's kernels have no double backward: for second derivatives use the plain torch implementation"
    )


def _each_of_batch(operator):
    """A vmap rule that calls `operator` once an example: right for every operator, made for correctness, not speed."""

    def rule(info, in_dims, *arguments):
        def example(index):
            return operator(
                *(a if dim is None else a.select(dim, index) for a, dim in zip(arguments, in_dims, strict=True))
            )

        if info.batch_size == 0:  # one example of zeros tells the shapes of the results
            arguments = [
                a if dim is None else a.new_zeros((*a.shape[:dim], 1, *a.shape[dim + 1 :]))
                for a, dim in zip(arguments, in_dims, strict=True)
            ]
        results = [example(index) for index in range(max(info.batch_size, 1))]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results)[: info.batch_size], 0
        stacked = [torch.stack(parts)[: info.batch_size] for parts in zip(*results, strict=True)]
        return (stacked, [0] * len(stacked)) if isinstance(results[0], list) else (tuple(stacked), (0,) * len(stacked))

    operator.register_vmap(rule)


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse_double_backward)
for _each in (_forward, _backward, power_sums, apply, gradient_sums, input_gradients):
    _each_of_batch(_each)


def poly_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """PolyNorm over the last dimension, `w0 n(x^3) + w1 n(x^2) + w2 n(x) + b` with `n(z) = z / sqrt(mean(z^2) + eps)`.

    Args:
        x: (..., N) bfloat16, float16, float32 or (in plain torch) float64, any strides; contiguous rows are fastest.
        weight: (3,) weights of the cube, the square and x itself, of any of these types.
        bias: (1,) or ().
        eps: added to each mean square.

    Returns:
        torch.Tensor: like x, contiguous. Differentiable once in x, weight and bias.

    Raises:
        ValueError: x has no dimension, weight or bias another shape, or one of them another type.
    """
    _check(x, None, weight, bias)
    _check_mode(x, weight, bias)
    return _forward(x, None, weight, bias, eps)[0]


def poly_norm_mul(
    x: torch.Tensor, up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """PolyNorm of `x` times `up`, the gated form `poly_norm(gate_proj(h)) * up_proj(h)`, rounded once.

    Args:
        x: (..., N) bfloat16, float16, float32 or (in plain torch) float64, any strides; contiguous rows are fastest.
        up: shape and type of x.
        weight: (3,) weights of the cube, the square and x itself, of any of these types.
        bias: (1,) or ().
        eps: added to each mean square.

    Returns:
        torch.Tensor: like x, contiguous. Differentiable once in x, up, weight and bias.

    Raises:
        ValueError: as `poly_norm`, or up differs from x in shape or type.
    """
    _check(x, up, weight, bias)
    _check_mode(x, up, weight, bias)
    return _forward(x, up, weight, bias, eps)[0]
