"""A decoder layer's step of one token through kernels that read each weight once, at the memory's rate.

`kernels_hub.use_decode_products` puts them in. The layer is then four products, PolyNorm, and attention as it stands:
both norms and both sums of the residual stream happen inside the products. What is multiplied is the same; the normed
states and the products are rounded to the weights' type less often than the layer's own code rounds them.

Shapes: C hidden size, F intermediate size, G groups, r signal heads a group, D head dimension.
"""

import torch
from torch import nn


def _is_quiet(module: nn.Module) -> bool:
    """Whether nobody hooked on to a module that would not be called (transformers' recording of attentions does)."""
    return not module._forward_hooks and not module._forward_pre_hooks


def _is_plain(linear: nn.Module, hidden_states: torch.Tensor) -> bool:
    """Whether a projection is its weight and nothing else: no adapter, quantisation, bias, hook, share of a rank."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and linear.bias is None
        and linear.weight.dtype == hidden_states.dtype
        and linear.weight.device == hidden_states.device
        and linear.weight.is_contiguous()
        and _is_quiet(linear)
    )


def takes_one_token(layer: nn.Module, hidden_states: torch.Tensor, classes: tuple[type, ...]) -> bool:
    """Whether this call of a layer can go through `one_token`, which calls none of its modules.

    Args:
        layer: the `Motif2DecoderLayer`, with products.
        hidden_states: (B, T, C).
        classes: what attention, MLP, norms and activation must be: the model's own.
    """
    if hidden_states.shape[0] * hidden_states.shape[1] != 1 or torch.is_grad_enabled():
        return False
    if torch.is_autocast_enabled(hidden_states.device.type):
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    linears += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    return (
        all(type(module) in classes and _is_quiet(module) for module in (attention, mlp, *norms, mlp.act_fn))
        and mlp.gate_proj.out_features == mlp.intermediate_size
        and all(_is_plain(linear, hidden_states) for linear in linears)
        and all(
            layer.products.supports(linear.in_features, hidden_states.dtype, hidden_states.device)
            for linear in (attention.q_proj, attention.o_proj, mlp.down_proj)
        )
    )


def one_token(layer: nn.Module, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
    """Returns the layer's output (1, 1, C) for one token.

    Args:
        layer: the `Motif2DecoderLayer`, with products.
        hidden_states: (1, 1, C).
        **kwargs: of the layer's forward.
    """
    attention, mlp, product = layer.self_attn, layer.mlp, layer.products.product
    hidden_states = hidden_states.contiguous()
    norm = layer.input_layernorm
    weights = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    projected = product(hidden_states, weights, norm_weight=norm.weight, eps=norm.variance_epsilon)
    query, key, value = projected.split([len(weight) for weight in weights], dim=-1)
    output, _ = attention.attend_projected(query, key, value, **kwargs)  # (1, 1, G, r, 2D)
    output = output.flatten(2).contiguous()
    hidden_states = product(output, [attention.o_proj.weight], residual=hidden_states)

    norm, activation = layer.post_attention_layernorm, mlp.act_fn
    weights = [mlp.gate_proj.weight, mlp.up_proj.weight]
    both = product(hidden_states, weights, norm_weight=norm.weight, eps=norm.variance_epsilon)  # (1, 1, 2F)
    activated = layer.products.poly_norm_mul(both, activation.weight, activation.bias, activation.eps)
    return product(activated, [mlp.down_proj.weight], residual=hidden_states)
