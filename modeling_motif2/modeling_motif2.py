"""Motif-2: a decoder with grouped differential attention (GDA) and PolyNorm.

Shapes: B batch, T query tokens, S key tokens, C hidden size, G groups, r signal heads a group, H = G * (r + 1) query
heads, D head dimension. A group owns r signal queries, 1 noise query, 2 keys and 1 value that is 2D wide.

Source: arXiv 2511.07464 (Motif-2-12.7B), 2510.06949 (grouped differential attention), 2411.03884 (PolyNorm).
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_kernel_forward_from_hub
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_choice import Way, attend_with_kernel, choose
from .configuration_motif2 import Motif2Config
from .diagnostics import keeps_max_logits, raise_max_logits, update_max_logits, update_output_norms
from .gradient_layout import keep_gradient_layout
from .hub import Motif2HubMixin
from .masks import (
    CacheWithFixedOffset,
    attention_masks,
    document_index,
    packed_lengths,
    positions_from_cumulative_lengths,
    takes_lengths,
    visible_positions,
)
from .one_token import one_token, takes_one_token
from .visible_intervals import is_intervals, positions_of_intervals, with_growing_padding

# Backends that multiply a value twice as wide as the key; the others get the two halves in separate calls.
WIDE_VALUE_BACKENDS = {"eager"}


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor in float32, or as it is when its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def lambda_init(layer_idx: int) -> float:
    """Returns the constant part of lambda for a layer counted from 0 (layer 0 gives -0.0099, layer 1 gives 0.2)."""
    return 0.8 - 0.6 * math.exp(-0.3 * (layer_idx - 1))


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

    @staticmethod
    def compute_default_rope_parameters(config: Motif2Config, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies (D / 2,) in float32, and the factor on cos and sin (1 without scaling)."""
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return (config.rope_parameters["rope_theta"] ** -exponents).to(device), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin, each (B, T, D), in the dtype of `hidden_states`; `position_ids` is (B, T)."""
        device_type = hidden_states.device.type if hidden_states.device.type != "mps" else "cpu"
        with maybe_autocast(device_type=device_type, enabled=False):
            angles = position_ids[..., None].float() * self.inv_freq.float()  # (B, T, D / 2)
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


def repeat_heads(states: torch.Tensor, repeats: int) -> torch.Tensor:
    """Repeats every head `repeats` times in place (interleaved, never tiled): (B, G, S, D) to (B, G * r, S, D)."""
    return states if repeats == 1 else states.repeat_interleave(repeats, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention of one stream in transformers' interface.

    Args:
        module: the stream, for its `num_key_value_groups`.
        query: (B, heads, T, D).
        key: (B, G, S, D).
        value: (B, G, S, 2D).
        attention_mask: (B or 1, 1, T, S), added to the logits, or None.
        scaling: factor on the logits.

    Returns:
        Output (B, T, heads, 2D) and the map (B, heads, T, S), both in the query's dtype.
    """
    key = repeat_heads(key, module.num_key_value_groups)
    value = repeat_heads(value, module.num_key_value_groups)
    logits = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, heads, T, S)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = nn.functional.softmax(widen(logits), dim=-1).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2), weights


class Motif2AttentionStream(nn.Module):
    """One attention in transformers' interface; without parameters.

    transformers' attention functions read what they need from a module like this one. GDA takes the difference of two:
    signal (r queries a key) and noise (1 query a key).

    Args:
        config: gives the name of the backend.
        layer_idx: index of the layer.
        num_key_value_groups: queries that share one key.
    """

    is_causal = True

    def __init__(self, config: Motif2Config, layer_idx: int, num_key_value_groups: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = num_key_value_groups
        self.scaling = config.head_dim**-0.5

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, way: Way | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends with the backend that the configuration names, or that of a way.

        Args:
            query: (B, heads, T, D).
            key: (B, heads / num_key_value_groups, S, D).
            value: (B, heads / num_key_value_groups, S, D or 2D).
            mask: in the backend's own form.
            way: what was chosen where the configuration leaves the choice open.
            **kwargs: to the backend.

        Returns:
            Output (B, T, heads, D or 2D), and the backend's second result.

        Raises:
            ValueError: if flash attention is given float32.
        """
        name = self.config._attn_implementation if way is None else way.backend
        if "flash" in name and query.dtype == torch.float32:
            raise ValueError(
                f"attn_implementation={name!r} needs float16 or bfloat16: load the model with dtype=torch.bfloat16, "
                "run it under autocast, or use sdpa."
            )
        if name == "flex_attention" and query.device.type == "cuda":
            # FlexAttention's kernel for short queries has no tile for more than 128 of them a key.
            long = query.shape[2] * self.num_key_value_groups > 128
            kwargs.setdefault("kernel_options", {"FORCE_USE_FLEX_ATTENTION": True} if long else None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        module = self if way is None else way.stream(self)
        output, maps = attend(module, query, key, value, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        if name == "sdpa" and output.requires_grad and (output.is_cuda or torch.compiler.is_compiling()):
            output = keep_gradient_layout(output)  # eager too: the plan of its first gradient serves compiled code
        return output, maps


class Motif2Attention(nn.Module):
    """Grouped differential attention: r signal maps a group minus lambda times the group's one noise map.

    q_proj's rows are striped by group `[g0 s0 … s(r-1) n, g1 …]`, k_proj's and v_proj's alternate `k1_g, k2_g`.

    Args:
        config: shapes and constants.
        layer_idx: index of the layer, from 0; it sets `lambda_init`.

    Attributes:
        max_logits: (H,) float32 in q_proj's head order, the running maximum of the scaled logits over visible
            positions; None unless `diagnostics.track_max_logits` turned it on.
        max_logits_gate: logits up to which a bound may stand for the maximum; None: the maximum is exact.
        max_logits_only_with_grad: forwards without gradients do not count.
        output_norms: (H + 1,) float32, sums kept by `diagnostics.track_output_norms`; None when off.
        kernel: functions `attend`, `decode` and `supports` that do both maps and the norm in one, put in by
            `kernels_hub.use_gda_attention`, or None; `attention_choice` says when they run.

    Source: arXiv 2510.06949, section 3.
    """

    def __init__(self, config: Motif2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_groups = config.num_groups
        self.num_signal_heads_per_group = ratio = config.num_signal_heads_per_group
        self.scaling = self.head_dim**-0.5
        self.lambda_init = lambda_init(layer_idx)
        self.max_logits: torch.Tensor | None = None
        self.max_logits_gate: float | None = None
        self.max_logits_only_with_grad = False
        self.output_norms: torch.Tensor | None = None
        self.kernel: Any = None

        group_dim = self.num_groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, (ratio + 1) * group_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, 2 * group_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, 2 * group_dim, bias=False)
        self.o_proj = nn.Linear(2 * ratio * group_dim, config.hidden_size, bias=False)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(torch.empty(self.head_dim).normal_(0, config.lambda_std_dev)))
        self.subln = Motif2RMSNorm(2 * self.head_dim, eps=config.attn_rms_norm_eps)
        self.signal = Motif2AttentionStream(config, layer_idx, ratio)
        if not config.single_attention_call:
            self.noise = Motif2AttentionStream(config, layer_idx, 1)

    def lambda_value(self) -> torch.Tensor:
        """Returns lambda, the noise map's weight: one scalar a layer, in float32 or wider."""
        first = torch.sum(widen(self.lambda_q1) * widen(self.lambda_k1))
        second = torch.sum(widen(self.lambda_q2) * widen(self.lambda_k2))
        return torch.exp(first) - torch.exp(second) + self.lambda_init

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        visible: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends, and projects back to the residual stream.

        Args:
            hidden_states: (B, T, C).
            position_embeddings: cos and sin, each (B, T, D).
            attention_mask: in the backend's own form, from transformers' mask functions.
            past_key_values: cache of keys and values, each (B, 2G, S, D), or None.
            visible: (B or 1, 1, T, S) boolean, for the diagnostics only; None is plain causal.
            **kwargs: to the attention backend.

        Returns:
            (B, T, C), and with eager attention and `output_attentions` the differential map (B, G * r, T, S).
        """
        projected = (self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states))
        arguments = (position_embeddings, attention_mask, past_key_values, visible)
        output, differential_map = self.attend_projected(*projected, *arguments, **kwargs)
        return self.o_proj(output.flatten(2)), differential_map

    def attend_projected(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        visible: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Does what lies between the projections; arguments as for `forward`, and three more.

        Args:
            query: (B, T, G * (r + 1) * D), what `q_proj` gave.
            key: (B, T, 2 * G * D).
            value: (B, T, 2 * G * D).

        Returns:
            (B, T, G, r, 2D), and the differential map or None.
        """
        signal_query, noise_query, key, value = self._heads(query, key, value, position_embeddings)
        if self.config.single_attention_call:
            key, value = for_single_call(key, value)  # (B, G, 4, T, D)
        if past_key_values is not None:
            by_group = (key.shape[1], -1)
            cached = past_key_values.update(key.flatten(1, 2), value.flatten(1, 2), self.layer_idx)
            key, value = (states.unflatten(1, by_group) for states in cached)  # (B, G, 2 or 4, S, D)
        way = choose(self, signal_query, key, attention_mask, kwargs)
        arguments = (signal_query, noise_query, key, value, attention_mask)
        return self.attend(way, *arguments, visible=visible, **kwargs)

    def attend(
        self,
        way: Way | None,
        signal_query: torch.Tensor,
        noise_query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        visible: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the normed difference of the two maps' outputs (B, T, G, r, 2D), and the differential map or None.

        Args:
            way: what `attention_choice.choose` gave; None runs the backend that the configuration names.
            signal_query: (B, G * r, T, D).
            noise_query: (B, G, T, D).
            key: (B, G, 2 or 4, S, D).
            value: (B, G, 2 or 4, S, D).
            mask: as for `forward`.
            visible: as for `forward`; made from intervals where these are the mask.
            **kwargs: to the attention backend.
        """
        largest = None
        by_kernel = way is not None and not way.backend
        if by_kernel:
            output, largest = attend_with_kernel(self, signal_query, noise_query, key, value, mask, way)
        recorded = self.output_norms is not None or (keeps_max_logits(self) and largest is None)
        if recorded and visible is None and is_intervals(mask):
            visible = positions_of_intervals(mask, key.shape[3])  # (B, 1, T, S)
        if keeps_max_logits(self) and largest is None:
            update_max_logits(self, signal_query, noise_query, key, visible)
        elif keeps_max_logits(self):
            raise_max_logits(self, largest)
        if by_kernel:
            return output, None

        attend = self._attend_once if self.config.single_attention_call else self._attend_twice
        if way is None:
            signal, noise, maps = attend(signal_query, noise_query, key, value, mask, **kwargs)
        else:
            with way.context():
                mask = way.mask(mask, signal_query, key)
                signal, noise, maps = attend(signal_query, noise_query, key, value, mask, way=way, **kwargs)
        lambda_value = self.lambda_value().to(signal.dtype)
        if self.output_norms is not None:
            update_output_norms(self, signal, noise, visible)
        output = self.subln(signal - lambda_value * noise) * (1 - self.lambda_init)  # (B, T, G, r, 2D)
        differential_map = None
        if maps is not None and kwargs.get("output_attentions"):
            signal_map, noise_map = maps
            noise_map = repeat_heads(noise_map, self.num_signal_heads_per_group)
            differential_map = signal_map - lambda_value * noise_map  # (B, G * r, T, S)
        return output, differential_map

    def _heads(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns signal queries (B, G * r, T, D), noise queries (B, G, T, D), keys and values (B, G, 2, T, D)."""
        batch, tokens = query.shape[:2]
        ratio, dim = self.num_signal_heads_per_group, self.head_dim
        if query.shape[-1] % ((ratio + 1) * dim):
            raise ValueError(
                f"q_proj gave {query.shape[-1]} features, not whole groups of {(ratio + 1) * dim}: tensor parallelism "
                f"must cut between groups, so use a number of ranks that divides {self.num_groups}."
            )
        query = query.view(batch, tokens, -1, ratio + 1, dim)  # (B, T, G, r + 1, D)
        key = key.view(batch, tokens, -1, 2, dim)  # (B, T, G, 2, D)
        value = value.view(batch, tokens, -1, 2, dim)  # (B, T, G, 2, D)
        signal_query, noise_query = (
            rotate(heads, *position_embeddings).flatten(2, 3).transpose(1, 2)
            for heads in query.split((ratio, 1), dim=3)
        )
        key, value = (heads.permute(0, 2, 3, 1, 4) for heads in (rotate(key, *position_embeddings), value))
        return signal_query, noise_query, key, value

    def _attend_twice(
        self,
        signal_query: torch.Tensor,
        noise_query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        way: Way | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Returns the outputs of signal (B, T, G, r, 2D) and noise (B, T, G, 1, 2D), and eager's two maps."""
        name = self.config._attn_implementation
        if name in WIDE_VALUE_BACKENDS or (way is not None and way.wide):
            values = (value.transpose(2, 3).flatten(3),)  # (B, G, S, 2D), a view when nothing is cached
        else:
            values = tuple(dense(half) for half in value.unbind(2))
        outputs, maps = [], []
        for stream, query, keys in zip(
            (self.signal, self.noise), (signal_query, noise_query), key.unbind(2), strict=True
        ):
            parts, attention_maps = zip(
                *(stream(query, dense(keys), part, mask, way=way, **kwargs) for part in values), strict=True
            )
            outputs.append(torch.cat(parts, dim=-1).unflatten(2, (-1, stream.num_key_value_groups)))
            maps.append(attention_maps[0])
        return *outputs, tuple(maps) if name == "eager" else None

    def _attend_once(
        self,
        signal_query: torch.Tensor,
        noise_query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Does the same in one call of plain grouped-query attention, with 4 keys a group and r queries a key."""
        ratio = self.num_signal_heads_per_group
        signal_query = signal_query.unflatten(1, (-1, 1, ratio)).expand(-1, -1, 2, -1, -1, -1)
        noise_query = noise_query[:, :, None, None].expand_as(signal_query)
        query = torch.cat((signal_query, noise_query), dim=2).flatten(1, 3)  # (B, 4G * r, T, D)
        output, _ = self.signal(query, key.flatten(1, 2), value.flatten(1, 2), mask, **kwargs)
        batch, _, tokens, dim = query.shape
        output = output.reshape(batch, tokens, -1, 2, 2, ratio, dim)  # stream, half of the value, query
        signal, noise = output.transpose(4, 5).flatten(5).unbind(3)  # (B, T, G, r, 2D)
        return signal, noise[:, :, :, :1], None


def for_single_call(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs each group's two keys with each half of its value: (B, G, 2, T, D) to (B, G, 4, T, D), twice."""
    return key.repeat_interleave(2, dim=2), value.repeat(1, 1, 2, 1, 1)


def dense(states: torch.Tensor) -> torch.Tensor:
    """Returns the states without gaps when their gradient is wanted: compiled backwards have misread strided keys."""
    return states.contiguous() if states.requires_grad else states


class Motif2DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: attention, then the MLP, each added to the residual stream.

    Attributes:
        products: functions that multiply one token with the weights, put in by `kernels_hub.use_decode_products`, or
            None; `one_token` says when they run.
    """

    def __init__(self, config: Motif2Config, layer_idx: int):
        super().__init__()
        self.products: Any = None
        self.self_attn = Motif2Attention(config, layer_idx)
        self.mlp = Motif2MLP(config)
        self.input_layernorm = Motif2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Motif2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """Returns the block's output (B, T, C); `kwargs` are those of `Motif2Attention.forward`."""
        own_classes = (Motif2Attention, Motif2MLP, Motif2RMSNorm, Motif2PolyNormMul)
        if self.products is not None and takes_one_token(self, hidden_states, own_classes):
            return one_token(self, hidden_states, **kwargs)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Motif2PreTrainedModel(Motif2HubMixin, PreTrainedModel):
    """Loading, saving and initialisation shared by the backbone and its heads."""

    config: Motif2Config
    config_class = Motif2Config
    base_model_prefix = "model"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Motif2DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # Whatever the dtype asked for: these are small, and lambda is an exponential.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [
        *("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2", "subln", "act_fn"),
        *("input_layernorm", "post_attention_layernorm", "norm"),
    ]
    _supports_attention_backend = True
    _can_record_outputs: ClassVar[dict[str, type]] = {
        "hidden_states": Motif2DecoderLayer,
        "attentions": Motif2Attention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Motif2Attention):
            for parameter in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                init.normal_(parameter, mean=0.0, std=self.config.lambda_std_dev)
        elif isinstance(module, Motif2PolyNormMul):
            init.constant_(module.weight, 1 / 3)
            init.zeros_(module.bias)


class Motif2Model(Motif2PreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: Motif2Config):
        super().__init__(config)
        # No padding_idx: Motif's padding token is also its end-of-text token, whose embedding must be trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Motif2DecoderLayer(config, layer) for layer in range(config.num_hidden_layers)])
        self.norm = Motif2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Motif2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Runs the decoder.

        Args:
            input_ids: (B, T) token ids; exactly one of it and `inputs_embeds`.
            attention_mask: (B, S) with 0 on padding; or a prepared mask (B or 1, 1, T, S), boolean (True: visible) or
                added to the logits, which is used as it is; or a dictionary by layer type, in the backend's own form;
                or None.
            position_ids: (B, T); where they restart, a new packed document begins. Default: from the cache's length.
            past_key_values: keys and values of earlier tokens.
            inputs_embeds: (B, T, C).
            use_cache: whether to return `past_key_values`.
            **kwargs: `output_attentions`, `output_hidden_states` …, passed on to attention; `cu_seq_lens_q`, the
                borders of the documents of one packed row, (documents + 1,) from 0 to T.

        Returns:
            `last_hidden_state` (B, T, C) after the final norm, and the cache.

        Raises:
            ValueError: if neither or both inputs are given, packed documents do not fit the row or the cache, or the
                attention backend cannot do what is asked.
        """
        self._check_backend(attention_mask, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        mask_arguments = (self.config, inputs_embeds, attention_mask, past_key_values)
        documents = document_index(*mask_arguments, position_ids, kwargs)
        masks = attention_masks(*mask_arguments, documents)
        visible = {}
        if self._is_recording() and not all(is_intervals(mask) for mask in masks.values()):
            visible = visible_positions(*mask_arguments, documents)
        if documents is not None and takes_lengths(self.config):
            kwargs |= packed_lengths(documents, attention_mask, past_key_values)
        if position_ids is None:
            position_ids = self._default_positions(inputs_embeds, past_key_values, kwargs.get("cu_seq_lens_q"))
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                visible=visible.get(layer_type),
                sliding_window=self.config.sliding_window if layer_type == "sliding_attention" else None,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def _check_backend(self, attention_mask: Any, kwargs: dict[str, Any]) -> None:
        name, once = self.config._attn_implementation, self.config.single_attention_call
        if not once and name not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
            raise ValueError(
                f"attn_implementation={name!r} cannot run grouped differential attention as it stands: it has no "
                "registered mask, or pages its cache while a layer here attends more than once. Use eager, sdpa, "
                "flex_attention or flash_attention_2; register a mask for a backend of your own with "
                'AttentionMaskInterface; or save the model for a serving engine with layout="engine".'
            )
        if kwargs.get("output_attentions") and (name != "eager" or once):
            raise ValueError(
                f"output_attentions needs every probability, which attn_implementation={name!r} does not return: load "
                'the model with attn_implementation="eager".'
            )
        if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim == 2:
            return
        if attention_mask.ndim != 4:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: give (batch, tokens) with 0 on padding, or "
                "(batch, 1, queries, keys)."
            )
        if takes_lengths(self.config):
            raise ValueError(
                f"attn_implementation={name!r} takes no mask of queries by keys: give (batch, tokens) with 0 on "
                "padding and position_ids that restart with every document, or use sdpa."
            )
        if attention_mask.shape[1] != 1:
            raise ValueError(
                f"attention_mask has {attention_mask.shape[1]} heads: signal and noise heads share one mask, so give "
                "(batch, 1, queries, keys)."
            )

    def _is_recording(self) -> bool:
        modules = (layer.self_attn for layer in self.layers if isinstance(layer, Motif2DecoderLayer))
        return any(keeps_max_logits(module) or module.output_norms is not None for module in modules)

    @staticmethod
    def _default_positions(
        inputs_embeds: torch.Tensor, past_key_values: Cache | None, cumulative_lengths: torch.Tensor | None
    ) -> torch.Tensor:
        tokens = inputs_embeds.shape[1]
        if cumulative_lengths is not None:
            return positions_from_cumulative_lengths(cumulative_lengths.to(inputs_embeds.device), tokens)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        return (torch.arange(tokens, device=inputs_embeds.device) + past)[None]


class Motif2ForCausalLM(Motif2PreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_rep"}
    _pp_plan: ClassVar[dict[str, tuple]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: Motif2Config):
        super().__init__(config)
        self.model = Motif2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(past_key_values: Cache, **kwargs) -> Any:
        """Makes the masks of a step with a static cache; `generate` calls it instead of transformers' function."""

        def make() -> Any:
            return create_masks_for_generate(past_key_values=CacheWithFixedOffset(past_key_values), **kwargs)

        tokens = kwargs["inputs_embeds"].shape[1]
        return with_growing_padding(make, past_key_values, kwargs.get("attention_mask"), tokens)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Runs the decoder and the head; arguments as in `Motif2Model.forward`, and two more.

        Args:
            labels: (B, T) token ids, -100 where no loss is wanted; shifted here.
            logits_to_keep: compute only the last so many positions (0: all), or those at the given indices.

        Returns:
            `loss` when labels are given, `logits` (B, kept, vocabulary), the cache and what was recorded.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# The heads below have constructors of their own: transformers' would ask AutoModel for the backbone, which it does not
# know where this file is loaded as remote code.


class Motif2ForSequenceClassification(GenericForSequenceClassification, Motif2PreTrainedModel):
    """The decoder with a classification head on a row's last token."""

    def __init__(self, config: Motif2Config):
        Motif2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = Motif2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class Motif2ForTokenClassification(GenericForTokenClassification, Motif2PreTrainedModel):
    """The decoder with a classification head on every token; `classifier_dropout` in its configuration, or 0.1."""

    def __init__(self, config: Motif2Config):
        Motif2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = Motif2Model(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(0.1 if dropout is None else dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class Motif2ForQuestionAnswering(GenericForQuestionAnswering, Motif2PreTrainedModel):
    """The decoder with a head for the start and the end of an answer."""

    def __init__(self, config: Motif2Config):
        Motif2PreTrainedModel.__init__(self, config)
        self.model = Motif2Model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


__all__ = [
    "Motif2ForCausalLM",
    "Motif2ForQuestionAnswering",
    "Motif2ForSequenceClassification",
    "Motif2ForTokenClassification",
    "Motif2Model",
    "Motif2PreTrainedModel",
]
