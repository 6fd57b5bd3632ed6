"""Products of one token as torch.library operators: seen whole by torch.compile, without gradients.

Operators compute with Triton on a GPU (or in Triton's interpreter), else in plain torch.

Shapes: K features in, N features out of all weights together, F features of PolyNorm.
"""

import torch

from . import reference
from ._ops import add_op_namespace_prefix

try:
    from . import launch
except ImportError:  # torch for CPU comes without Triton
    launch = None

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _implementation(tensor: torch.Tensor):
    if tensor.is_cuda and launch is None:
        raise RuntimeError("products on a GPU need Triton, which could not be imported: install triton, or use CPU")
    return launch if launch is not None and (tensor.is_cuda or launch.INTERPRETED) else reference


def supports(num_features: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights of K features, of a type, can be multiplied on `device`."""
    if device.type != "cuda":
        return dtype.is_floating_point
    capable = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    fits = launch is not None and launch.power_of_two_in(num_features, 1024) >= launch.LEAST_COLUMNS
    return capable and fits and dtype in DTYPES


def _operator(name: str):
    return torch.library.custom_op(add_op_namespace_prefix(name), mutates_args=())


@_operator("product")
def _product(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return _implementation(x).product(x, weights, norm_weight, eps, residual)


@_product.register_fake
def _(x, weights, norm_weight, eps, residual):
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in weights)))


@_operator("poly_norm_mul")
def _poly_norm_mul(gate_and_up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    return _implementation(gate_and_up).poly_norm_mul(gate_and_up, weight, bias, eps)


@_poly_norm_mul.register_fake
def _(gate_and_up, weight, bias, eps):
    return gate_and_up.new_empty((*gate_and_up.shape[:-1], gate_and_up.shape[-1] // 2))


def _check_one_token(name: str, tensor: torch.Tensor) -> None:
    if tensor.numel() != tensor.shape[-1]:
        raise ValueError(f"{name} is {tuple(tensor.shape)}: one token is taken, all dimensions but the last of size 1")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: make it contiguous")


def product(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token times up to three weights, each read once: `norm(x) @ weight.T + residual`, in float32 inside.

    Args:
        x: (…, K) bfloat16, float16 or float32, one token.
        weights: one to three (N_i, K) of the type of x, as `nn.Linear` has them.
        norm_weight: (K,) of a root-mean-square norm of x before, or None for no norm.
        eps: added to the norm's mean square.
        residual: (…, N) to add, or None.

    Returns:
        torch.Tensor: (…, N) like x, what the weights give one after another; without gradients.

    Raises:
        ValueError: shapes or types do not fit, or there is more than one token.
    """
    _check_one_token("x", x)
    if not 1 <= len(weights) <= 3:
        raise ValueError(f"{len(weights)} weights are given: from one to three are taken")
    num_features = x.shape[-1]
    for weight in weights:
        if weight.dim() != 2 or weight.shape[1] != num_features or weight.dtype != x.dtype:
            raise ValueError(
                f"a weight is {tuple(weight.shape)} {weight.dtype}: it must be (N, {num_features}) {x.dtype} as x is"
            )
        if not weight.is_contiguous():
            raise ValueError(f"a weight has strides {weight.stride()}: make it contiguous")
    if _implementation(x) is launch and not (launch.power_of_two_in(num_features, 1024) >= launch.LEAST_COLUMNS):
        raise ValueError(f"{num_features} features cannot be tiled: a multiple of {launch.LEAST_COLUMNS} is needed")
    wanted = {"norm_weight": (norm_weight, (num_features,))}
    wanted["residual"] = (residual, (*x.shape[:-1], sum(weight.shape[0] for weight in weights)))
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or not tensor.is_contiguous()):
            raise ValueError(f"{name} must be contiguous of shape {shape}, got {tuple(tensor.shape)}")
    with torch.no_grad():
        return _product(x, list(weights), norm_weight, eps, residual)


def poly_norm_mul(
    gate_and_up: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """PolyNorm of one token's gate times its up, from both in one tensor, as `product` of their two weights gives it.

    Args:
        gate_and_up: (…, 2F), one token.
        weight: (3,), for x^3, x^2 and x in this order.
        bias: (1,).
        eps: added to each mean square.

    Returns:
        torch.Tensor: (…, F), like the input; without gradients.

    Raises:
        ValueError: there is more than one token, or the features do not halve.

    Source: arXiv 2411.03884, section 3.
    """
    _check_one_token("gate_and_up", gate_and_up)
    if gate_and_up.shape[-1] % 2 or weight.shape != (3,) or bias.shape != (1,):
        raise ValueError(
            f"gate_and_up, weight and bias must be (…, 2F), (3,) and (1,), got {tuple(gate_and_up.shape)}, "
            f"{tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    with torch.no_grad():
        return _poly_norm_mul(gate_and_up, weight, bias, eps)
