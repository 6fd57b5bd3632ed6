"""What a block is made of beside attention: PolyNorm, root-mean-square norm, rotary embedding and MLP.

Shapes: B batch, T tokens, C hidden size, F intermediate size, G groups, D head dimension.

Source: arXiv 2511.07464 (Motif-2-12.7B), 2411.03884 (PolyNorm).
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_motif2 import Motif2Config


def lambda_init(layer_idx: int) -> float:
    """Returns the constant part of lambda for a layer counted from 0 (layer 0 gives -0.0099, layer 1 gives 0.2)."""
    return 0.8 - 0.6 * math.exp(-0.3 * (layer_idx - 1))


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in float32, or as it is when its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def poly_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """PolyNorm: a weighted sum of the root-mean-square normalised powers 3, 2 and 1 of the input.

    Args:
        x: (..., F), any floating dtype; the means run over all of F, in float32 or wider.
        weight: (3,), for x^3, x^2 and x in this order.
        bias: (1,).
        eps: added to each mean square.

    Returns:
        (..., F) in float32 or wider.

    Source: arXiv 2411.03884, section 3.
    """
    x = widen(x)
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    square = x * x
    powers = (square * x, square, x)
    terms = (
        factor * power * torch.rsqrt(power.square().mean(-1, keepdim=True) + eps)
        for factor, power in zip(weight.unbind(), powers, strict=True)
    )
    return sum(terms, start=bias)


@use_kernel_forward_from_hub("FusedMulPolyNorm")
class Motif2PolyNormMul(nn.Module):
    """PolyNorm of the gate, times the other branch.

    Args:
        eps: added to each mean square; not part of a checkpoint's configuration.
    """

    def __init__(self, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, mul: torch.Tensor) -> torch.Tensor:
        """Returns poly_norm(x) * mul, (..., F), in the dtype of x; both inputs are (..., F)."""
        return (poly_norm(x, self.weight, self.bias, self.eps) * mul).to(x.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


@use_kernel_forward_from_hub("RMSNorm")
class Motif2RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32 and returned in the input's dtype.

    Args:
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = widen(hidden_states)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * normed).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class Motif2RotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding, half-split ("NeoX") over all D dimensions."""

    def __init__(self, config: Motif2Config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config, None)
        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        """Moves the frequencies with the model and leaves them in float32: rounded, they would turn other angles."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    @staticmethod
    def compute_default_rope_parameters(config: Motif2Config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies (D / 2,) in float32, and the factor on cos and sin (1 without scaling)."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return (config.rope_parameters["rope_theta"] ** -exponents).to(device), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin, each (B, T, D), in the dtype of `hidden_states`; `position_ids` is (B, T)."""
        angles = position_ids[..., None].float() * self.inv_freq  # (B, T, D / 2)
        angles = torch.cat((angles, angles), dim=-1)  # (B, T, D)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Applies the rotary embedding to (B, T, G, heads a group, D); cos and sin are (B, T, D)."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cos[:, :, None, None] + turned * sin[:, :, None, None]).to(heads.dtype)


class Motif2MLP(nn.Module):
    """Gated MLP whose activation is PolyNorm."""

    def __init__(self, config: Motif2Config):
        super().__init__()
        self.intermediate_size = config.intermediate_size
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = Motif2PolyNormMul()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate = self.gate_proj(hidden_states)
        if gate.shape[-1] * getattr(self.act_fn, "reduces_over_ranks", 1) != self.intermediate_size:
            raise ValueError(
                f"PolyNorm sees {gate.shape[-1]} of {self.intermediate_size} features, so its means would be wrong: "
                "gather gate_proj and up_proj (the model's own tp_plan does), or use one that reduces over ranks."
            )
        return self.down_proj(self.act_fn(gate, self.up_proj(hidden_states)))
