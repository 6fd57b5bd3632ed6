"""Grouped differential attention (GDA), on any of transformers' attention backends.

Shapes: B batch, T query tokens, S key tokens, C hidden size, G groups, r signal heads a group, H = G * (r + 1) query
heads, D head dimension. A group owns r signal queries, 1 noise query, 2 keys and 1 value that is 2D wide.

Source: arXiv 2510.06949 (grouped differential attention).
"""

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_choice import choose
from .attention_ways import Way, attend_with_kernel
from .configuration_motif2 import Motif2Config
from .diagnostics import keeps_max_logits, raise_max_logits, update_max_logits, update_output_norms
from .gradient_layout import keep_gradient_layout
from .layers import Motif2RMSNorm, lambda_init, rotate, widen
from .visible_intervals import is_intervals, positions_of_intervals

# Backends that multiply a value twice as wide as the key; the others get the two halves in separate calls.
WIDE_VALUE_BACKENDS = {"eager"}


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
        if name == "flex_attention" and query.shape[2] == 1 and not isinstance(mask, BlockMask):
            name = "sdpa"  # as `masks.for_tokens` says
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
        own_keys: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Does what lies between the projections; arguments as for `forward`, and four more.

        Args:
            query: (B, T, G * (r + 1) * D), what `q_proj` gave.
            key: (B, T, 2 * G * D).
            value: (B, T, 2 * G * D).
            own_keys: whether the mask is over these keys alone, whatever the cache has room for: it was empty.

        Returns:
            (B, T, G, r, 2D), and the differential map or None.
        """
        signal_query, noise_query, key, value = self._heads(query, key, value, position_embeddings)
        if self.config.single_attention_call:
            key, value = for_single_call(key, value)  # (B, G, 4, T, D)
        if past_key_values is not None:
            groups, tokens = key.shape[1], key.shape[3]
            cached = past_key_values.update(key.flatten(1, 2), value.flatten(1, 2), self.layer_idx)
            # A cache that holds nothing else gives back a copy, heads before tokens, which suits the kernel less.
            if cached[0].shape[2] > tokens and not own_keys:
                key, value = (states.unflatten(1, (groups, -1)) for states in cached)  # (B, G, 2 or 4, S, D)
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
                kwargs |= way.lengths(mask)
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
