"""Motif-2: a decoder with grouped differential attention (GDA) and PolyNorm.

Shapes: B batch, T query tokens, S key tokens, C hidden size, D head dimension.

Source: arXiv 2511.07464 (Motif-2-12.7B), 2510.06949 (grouped differential attention), 2411.03884 (PolyNorm).
"""

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import CompileConfig, GenerationMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import Motif2Attention
from .configuration_motif2 import Motif2Config
from .diagnostics import keeps_max_logits
from .hub import Motif2HubMixin
from .layers import Motif2MLP, Motif2PolyNormMul, Motif2RMSNorm, Motif2RotaryEmbedding
from .masks import (
    CacheWithFixedOffset,
    attention_masks,
    document_index,
    for_tokens,
    packed_lengths,
    positions_from_cumulative_lengths,
    takes_lengths,
    visible_positions,
)
from .one_token import one_token, takes_one_token
from .visible_intervals import is_intervals, over_own_keys, with_growing_padding

logger = logging.get_logger(__name__)


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
        config.follow()
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
        own = over_own_keys(masks, past_key_values, inputs_embeds)
        masks = masks if own is None else own
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
                own_keys=own is not None,
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
    _compiled_without_guards: ClassVar[weakref.ref | None] = None  # the model that was, if any

    def __init__(self, config: Motif2Config):
        super().__init__(config)
        self.model = Motif2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(past_key_values: Cache, **kwargs) -> Any:
        """Makes the masks of a step with a static cache; `generate` calls it instead of transformers' function."""

        tokens = kwargs["inputs_embeds"].shape[1]
        kwargs["config"] = for_tokens(kwargs["config"], tokens)

        def make() -> Any:
            return create_masks_for_generate(past_key_values=CacheWithFixedOffset(past_key_values), **kwargs)

        return with_growing_padding(make, past_key_values, kwargs.get("attention_mask"), tokens)

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable:
        """Returns transformers' compiled call, after dropping code that would be mistaken for this model's.

        Compiled code belongs to the class. A step compiled with a `guard_filter_fn` may not look at whose it is: it
        would run for any other model too, with the first one's constants. Models in turns compile at every turn.
        """
        owner = Motif2ForCausalLM._compiled_without_guards
        if owner is not None and owner() is not self:
            logger.warning_once("Another model was compiled with a guard_filter_fn: all compiled code is dropped.")
            torch.compiler.reset()
            Motif2ForCausalLM._compiled_without_guards = None
        if compile_config is not None and "guard_filter_fn" in (compile_config.options or {}):
            Motif2ForCausalLM._compiled_without_guards = weakref.ref(self)
        return super().get_compiled_call(compile_config)

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
