"""Motif-2 in float64 and plain loops, written from its published description and sharing no code with the model.

Shapes: T tokens, C hidden size, D head dimension. One document at a time, so padding and packing are the caller's.
"""

import math

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def poly_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    out = torch.zeros_like(x) + bias
    for coefficient, power in zip(weight, (3, 2, 1), strict=True):
        z = x**power
        out = out + coefficient * z / torch.sqrt((z**2).mean(-1, keepdim=True) + eps)
    return out


def rope(x: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotates the pairs (i, i + D/2) of one head, (T, D)."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    for i in range(half):
        angle = positions.double() * theta ** (-2 * i / x.shape[-1])
        out[:, i] = x[:, i] * torch.cos(angle) - x[:, i + half] * torch.sin(angle)
        out[:, i + half] = x[:, i + half] * torch.cos(angle) + x[:, i] * torch.sin(angle)
    return out


def lambda_init(layer: int) -> float:
    return 0.8 - 0.6 * math.exp(-0.3 * (layer - 1))


def layer_lambda(weights: dict, prefix: str, layer: int) -> torch.Tensor:
    q1, k1, q2, k2 = (weights[f"{prefix}.lambda_{name}"] for name in ("q1", "k1", "q2", "k2"))
    return torch.exp(q1 @ k1) - torch.exp(q2 @ k2) + lambda_init(layer)


def attention(x: torch.Tensor, weights: dict, prefix: str, layer: int, config, record: dict | None) -> torch.Tensor:
    """One layer's attention on one document, (T, C) to (T, C), head by head."""
    groups = config.num_noise_heads or config.num_attention_heads // 2
    ratio = config.num_attention_heads // groups - 1
    dim, theta = config.head_dim, config.rope_parameters["rope_theta"]
    positions = torch.arange(len(x))
    causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    if config.sliding_window and config.layer_types[layer] == "sliding_attention":
        causal = causal & ~torch.ones_like(causal).tril(-config.sliding_window)

    def head(projection: str, index: int) -> torch.Tensor:
        rows = weights[f"{prefix}.{projection}.weight"][index * dim : (index + 1) * dim]
        return x @ rows.T

    def attention_map(query_head: int, key_head: int) -> torch.Tensor:
        logits = (
            rope(head("q_proj", query_head), positions, theta) @ rope(head("k_proj", key_head), positions, theta).T
        )
        logits = (logits / math.sqrt(dim)).masked_fill(~causal, -math.inf)
        if record is not None:
            record.setdefault("max_logits", {})[layer, query_head] = logits.max()
        return torch.softmax(logits, dim=-1)

    weight = layer_lambda(weights, prefix, layer)
    outputs, maps = [], []
    for group in range(groups):
        value = torch.cat([head("v_proj", 2 * group), head("v_proj", 2 * group + 1)], dim=-1)
        noise = attention_map(group * (ratio + 1) + ratio, 2 * group + 1)
        for j in range(ratio):
            signal = attention_map(group * (ratio + 1) + j, 2 * group)
            difference = signal @ value - weight * (noise @ value)
            normed = rms_norm(difference, weights[f"{prefix}.subln.weight"], config.attn_rms_norm_eps)
            outputs.append(normed * (1 - lambda_init(layer)))
            maps.append(signal - weight * noise)
            if record is not None:
                norms = record.setdefault("signal_norms", {})
                norms[layer, group * ratio + j] = (signal @ value).norm(dim=-1).mean()
        if record is not None:
            record.setdefault("noise_norms", {})[layer, group] = (noise @ value).norm(dim=-1).mean()
    if record is not None:
        record.setdefault("attentions", []).append(torch.stack(maps))
    return torch.cat(outputs, dim=-1) @ weights[f"{prefix}.o_proj.weight"].T


def reference_logits(model, input_ids: torch.Tensor, record: dict | None = None) -> torch.Tensor:
    """Logits (T, vocabulary) of one document (T,), in float64, from the weights of a `Motif2ForCausalLM`.

    Args:
        model: only its `state_dict()` and `config` are read.
        input_ids: (T,) token ids without padding.
        record: filled with `attentions`, `hidden_states` (the last one normed), `max_logits`, `signal_norms` and
            `noise_norms` when given.
    """
    config = model.config
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    x = weights["model.embed_tokens.weight"][input_ids]
    states = [x]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        h = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], config.rms_norm_eps)
        x = x + attention(h, weights, f"{prefix}.self_attn", layer, config, record)
        h = rms_norm(x, weights[f"{prefix}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate, up = h @ weights[f"{prefix}.mlp.gate_proj.weight"].T, h @ weights[f"{prefix}.mlp.up_proj.weight"].T
        act = poly_norm(gate, weights[f"{prefix}.mlp.act_fn.weight"], weights[f"{prefix}.mlp.act_fn.bias"])
        x = x + (act * up) @ weights[f"{prefix}.mlp.down_proj.weight"].T
        states.append(x)
    states[-1] = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    if record is not None:
        record["hidden_states"] = states
    return states[-1] @ weights["lm_head.weight"].T
