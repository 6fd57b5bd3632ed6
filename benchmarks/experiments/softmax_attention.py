"""Standard attention in the place of grouped differential attention: the control of an experiment.

Everything around it is Motif-2's own. Shapes: B batch, T tokens, K key heads, q queries a key, H = K * q, D head_dim.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from modeling_motif2.attention import Motif2AttentionStream
from modeling_motif2.layers import Motif2RMSNorm, rotate


class SoftmaxConfig(Motif2Config):
    """A Motif-2 configuration whose heads are plain: `num_attention_heads` queries over `num_key_value_heads` keys.

    `norm_output` puts a norm on each head's output, as grouped differential attention has it on the difference.
    """

    model_type = "motif2_softmax"
    norm_output: bool = False


class SoftmaxAttention(nn.Module):
    """Grouped-query attention with one softmax, without noise map and lambda, and without a norm unless asked for.

    Args:
        config: shapes.
        layer_idx: index of the layer.

    Raises:
        ValueError: the key heads do not share out the queries.
    """

    def __init__(self, config: SoftmaxConfig, layer_idx: int):
        super().__init__()
        heads, keys, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        if heads % keys:
            raise ValueError(f"num_attention_heads is {heads}: use a multiple of num_key_value_heads {keys}")
        self.layer_idx, self.head_dim, self.num_keys = layer_idx, dim, keys
        self.max_logits = self.max_logits_gate = self.output_norms = None  # what the trainer looks for
        self.max_logits_only_with_grad = False
        self.q_proj = nn.Linear(config.hidden_size, heads * dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys * dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)
        self.subln = Motif2RMSNorm(dim, eps=config.attn_rms_norm_eps) if config.norm_output else nn.Identity()
        self.signal = Motif2AttentionStream(config, layer_idx, heads // keys)

    def lambda_value(self) -> torch.Tensor:
        """There is no noise map: 0."""
        return torch.zeros((), device=self.q_proj.weight.device)

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, visible=None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend; arguments and result as in `Motif2Attention.forward`, without a cache."""
        if past_key_values is not None:
            raise ValueError("the control of the experiment keeps no cache: call it with use_cache=False")
        batch, tokens = hidden_states.shape[:2]
        shape = (batch, tokens, self.num_keys, -1, self.head_dim)
        query = rotate(self.q_proj(hidden_states).view(shape), *position_embeddings)  # (B, T, K, q, D)
        key = rotate(self.k_proj(hidden_states).view(shape), *position_embeddings)  # (B, T, K, 1, D)
        value = self.v_proj(hidden_states).view(shape)  # (B, T, K, 1, D)
        query, key, value = (heads.flatten(2, 3).transpose(1, 2) for heads in (query, key, value))  # (B, H or K, T, D)
        output, attention_map = self.signal(query, key, value, attention_mask, **kwargs)  # (B, T, H, D)
        return self.o_proj(self.subln(output).flatten(2)), attention_map


class SoftmaxForCausalLM(Motif2ForCausalLM):
    """Motif-2 with `SoftmaxAttention` in every layer."""

    config_class = SoftmaxConfig

    def __init__(self, config: SoftmaxConfig):
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = SoftmaxAttention(config, index)
        self.post_init()


AutoConfig.register(SoftmaxConfig.model_type, SoftmaxConfig)
AutoModelForCausalLM.register(SoftmaxConfig, SoftmaxForCausalLM)


def softmax_config(config: Motif2Config, norm_output: bool = False) -> SoftmaxConfig:
    """The same shape with standard attention."""
    settings = config.to_dict()
    settings.pop("model_type")
    return SoftmaxConfig(**settings, norm_output=norm_output)
