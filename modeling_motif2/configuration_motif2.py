"""Configuration of Motif-2, in our layout (`model_type` "motif2") and in the official one ("Motif" or "motif")."""

import difflib
import warnings
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

PUBLISHED_VOCAB_SIZE = 219520
PUBLISHED_BOS_TOKEN_ID = 219396
PUBLISHED_EOS_TOKEN_ID = 219395

OFFICIAL_MODEL_TYPES = ("Motif", "motif")
# Keys of official config.json files that change nothing in the computation.
UNUSED_OFFICIAL_KEYS = ("auto_map", "expanded", "fused_rope", "use_bias", "transformers_version")
# Keys an official config.json must carry: no value of theirs can be guessed.
REQUIRED_OFFICIAL_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
# How alike an unknown key and a field must be for a warning (assumption: a letter or two off).
LIKENESS_OF_A_MISTYPED_KEY = 0.85


def from_official_dict(config_dict: dict[str, Any]) -> dict[str, Any]:
    """Translates the content of an official config.json into our terms; any other content is returned as it is.

    A key that is absent takes the value with which transformers 4 leaves it out: tied embeddings, no noise heads.

    Raises:
        ValueError: if a key that cannot be guessed is missing, or asks for something that is not built.
    """
    if config_dict.get("model_type") not in OFFICIAL_MODEL_TYPES:
        return config_dict
    missing = [name for name in REQUIRED_OFFICIAL_KEYS if config_dict.get(name) is None]
    if config_dict.get("rope_theta") is None and not (config_dict.get("rope_parameters") or {}).get("rope_theta"):
        missing.append("rope_theta")
    if missing:
        raise ValueError(f"the official config.json lacks {', '.join(missing)}: add the checkpoint's own values.")
    if config_dict.get("use_bias"):
        raise ValueError("use_bias=true in config.json is not built: no Motif-2 projection has a bias.")
    translated = {"num_noise_heads": None, "tie_word_embeddings": True} | config_dict
    for name in UNUSED_OFFICIAL_KEYS:
        translated.pop(name, None)
    translated["model_type"] = "motif2"
    architectures = config_dict.get("architectures") or []
    translated["architectures"] = [_in_our_terms(name) for name in architectures] or None
    return translated


def _in_our_terms(architecture: str) -> str:
    return (
        architecture.replace("Motif", "Motif2", 1)
        if architecture.startswith(("MotifFor", "MotifModel"))
        else architecture
    )


@strict
class Motif2Config(PreTrainedConfig):
    """Shape and constants of a Motif-2 model; the defaults are Motif-2-12.7B.

    Args:
        vocab_size: number of token embeddings.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: query heads, signal and noise together.
        num_key_value_heads: key heads, equal to the value heads: two a group.
        num_noise_heads: noise heads, one a group, so also the number of groups. None is plain differential attention
            (Motif-2.6B): every group has one signal and one noise head.
        head_dim: width of a query or key head; a group's value is twice as wide. May be left out only when
            `num_noise_heads` is None (then it is hidden_size / num_attention_heads) or every size is the default.
        k_ratio: keys a noise head; only 1 is defined.
        hidden_act: only "poly_norm".
        max_position_embeddings: longest sequence in tokens.
        initializer_range: standard deviation of linear and embedding weights.
        lambda_std_dev: standard deviation of the four lambda vectors.
        rms_norm_eps: epsilon of the norms over the hidden dimension.
        attn_rms_norm_eps: epsilon of the norm on attention's output.
        rope_parameters: `{"rope_theta": …}`, or that with a scaling; a `rope_theta` keyword is folded in.
        use_cache: whether forward returns a key-value cache by default.
        tie_word_embeddings: whether `lm_head` shares the embedding's weight.
        attention_dropout: must be 0; the report defines no dropout on a difference of two maps.
        use_sliding_window: whether layers from `max_window_layers` on see only `sliding_window` tokens.
        sliding_window: width of the window in tokens; set to None unless `use_sliding_window`.
        max_window_layers: index of the first layer with a window.
        layer_types: follows from the three fields above: "full_attention" or "sliding_attention" for every layer.
        single_attention_call: whether a layer does its attention in one standard call, for serving engines; the head
            counts are then those of that call (see `for_engines`), and `num_noise_heads` says the number of groups.
        bos_token_id, eos_token_id, pad_token_id: default to the published ids with the published vocabulary,
            otherwise to None.

    Raises:
        ValueError: if the settings contradict each other; the message names the value and the mend. A key that is
            unknown but nearly a field's name is warned of; others are kept, as official config.json files have some.

    Source: arXiv 2511.07464, section 2; the official checkpoints' config.json.
    """

    model_type = "motif2"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    default_theta = 1_000_000.0
    # Attention is cut between groups: a rank's heads are whole groups, so the ranks must divide their number. What is
    # replicated there sees only its rank's heads, so its gradient is summed. PolyNorm's means run over the whole
    # intermediate dimension, so its inputs are gathered.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise_rep",
        "layers.*.mlp.up_proj": "colwise_rep",
        "layers.*.mlp.down_proj": "rowwise_rep",
        "layers.*.self_attn.subln": "replicated_with_grad_allreduce",
        "layers.*.self_attn": "replicated_with_grad_allreduce",
    }
    base_model_pp_plan: ClassVar[dict[str, tuple]] = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    # trl reads `config.auto_map` of a model given as a path.
    auto_map: ClassVar[dict] = {}

    vocab_size: int = PUBLISHED_VOCAB_SIZE
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 40
    num_attention_heads: int = 40
    num_key_value_heads: int = 16
    num_noise_heads: int | None = 8
    head_dim: int | None = None
    k_ratio: int | float = 1
    hidden_act: str = "poly_norm"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    lambda_std_dev: float = 0.1
    rms_norm_eps: float = 1e-6
    attn_rms_norm_eps: float = 1e-5
    rope_parameters: RopeParameters | dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = False
    attention_dropout: int | float = 0.0
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int | None = None
    layer_types: list[str] | None = None
    single_attention_call: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        self.auto_map = dict(kwargs.pop("auto_map", None) or {})
        self._set_layer_types()
        if self.vocab_size == PUBLISHED_VOCAB_SIZE and self.eos_token_id is None:
            self.eos_token_id = PUBLISHED_EOS_TOKEN_ID
            self.bos_token_id = PUBLISHED_BOS_TOKEN_ID if self.bos_token_id is None else self.bos_token_id
            self.pad_token_id = PUBLISHED_EOS_TOKEN_ID if self.pad_token_id is None else self.pad_token_id
        self._check_heads()
        if self.head_dim is None:
            self.head_dim = self._infer_head_dim()
        self._check_the_rest(kwargs)
        self._check_theta(kwargs)
        self._warn_of_mistyped(kwargs)
        super().__post_init__(**kwargs)
        self._check_rope()

    def follow(self) -> None:
        """Lets `layer_types` follow from attributes that were set since construction, and checks them; models do it.

        Raises:
            ValueError: as at construction.
        """
        self.layer_types = None
        self._set_layer_types()
        self._check_heads()
        self._check_the_rest({})
        self._check_rope()

    @property
    def num_groups(self) -> int:
        """Groups of heads that share two keys, a value and a noise map."""
        return self.num_attention_heads // 2 if self.num_noise_heads is None else self.num_noise_heads

    @property
    def num_signal_heads_per_group(self) -> int:
        """Signal heads r that share their group's noise head."""
        if self.single_attention_call:
            return self.num_attention_heads // self.num_key_value_heads
        return self.num_attention_heads // self.num_groups - 1

    def _infer_head_dim(self) -> int:
        if self.num_noise_heads is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                    f"{self.num_attention_heads}, so head_dim cannot be inferred: set head_dim."
                )
            return self.hidden_size // self.num_attention_heads
        fields = type(self).__dataclass_fields__
        shape = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_noise_heads")
        if any(getattr(self, name) != fields[name].default for name in shape):
            raise ValueError(
                f"head_dim is missing while num_noise_heads={self.num_noise_heads}: with noise heads it does not "
                "follow from the other sizes, so set head_dim (128 in Motif-2-12.7B)."
            )
        return 128

    def _set_layer_types(self) -> None:
        layers, first = self.num_hidden_layers, self.max_window_layers or 0
        if not self.use_sliding_window:
            self.sliding_window = None
            first = layers
        elif self.sliding_window is None or self.sliding_window < 1:
            raise ValueError(
                f"use_sliding_window=True needs sliding_window >= 1 (tokens), got {self.sliding_window}: "
                "set sliding_window, or use_sliding_window=False."
            )
        elif not 0 <= first <= layers:
            raise ValueError(
                f"max_window_layers={first} is not one of the {layers} layers: it is the index of the first with a "
                f"window, so use 0 to {layers}."
            )
        types = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
        if self.layer_types is not None and list(self.layer_types) != types:
            raise ValueError(
                f"layer_types={self.layer_types} contradicts num_hidden_layers={layers}, use_sliding_window="
                f"{self.use_sliding_window} and max_window_layers={self.max_window_layers}, from which it follows: "
                "leave layer_types out."
            )
        self.layer_types = types

    def for_engines(self) -> "Motif2Config":
        """Returns a copy that runs each layer's attention as one call of plain grouped-query attention.

        Engines size their caches by the head counts and attend once a layer, so the copy tells those of an equal plain
        attention: each of a group's 2 keys is paired with each half of its value, and has r queries; the noise query
        is repeated r times. The weights are the same. Costs twice the cache and about twice the attention arithmetic.
        """
        settings = self.to_dict()
        if not self.single_attention_call:
            key_heads = 4 * self.num_groups
            settings.update(
                single_attention_call=True,
                num_noise_heads=self.num_groups,
                num_key_value_heads=key_heads,
                num_attention_heads=key_heads * self.num_signal_heads_per_group,
            )
        return type(self).from_dict(settings)

    def _check_heads_of_single_call(self) -> None:
        heads, keys, noise = self.num_attention_heads, self.num_key_value_heads, self.num_noise_heads
        if noise is None or keys != 4 * noise or heads < keys or heads % keys:
            raise ValueError(
                "single_attention_call=True needs num_key_value_heads = 4 * num_noise_heads and num_attention_heads a "
                f"multiple of it, got {keys}, {noise} and {heads}: make it with `Motif2Config.for_engines`."
            )

    def _check_heads(self) -> None:
        if self.single_attention_call:
            return self._check_heads_of_single_call()
        heads, keys, noise = self.num_attention_heads, self.num_key_value_heads, self.num_noise_heads
        if noise is None and (heads < 2 or heads % 2):
            raise ValueError(
                f"num_attention_heads={heads} is odd or below 2: plain differential attention (num_noise_heads=None) "
                "pairs heads, so use an even number, or set num_noise_heads."
            )
        if noise is not None and (noise < 1 or heads % noise or heads // noise < 2):
            raise ValueError(
                f"num_attention_heads={heads} is not a multiple (at least twofold) of num_noise_heads={noise}: every "
                f"group has one noise head and at least one signal head. Use num_attention_heads = num_noise_heads * "
                "(signal heads a group + 1), or num_noise_heads=None for plain pairs."
            )
        if keys % 2:
            raise ValueError(
                f"num_key_value_heads={keys} is odd: every group owns two keys, use {2 * self.num_groups}."
            )
        if keys != 2 * self.num_groups:
            raise ValueError(
                f"num_key_value_heads={keys} does not fit {self.num_groups} groups: every group owns two keys, "
                f"use {2 * self.num_groups}."
            )

    def _check_the_rest(self, extra: dict[str, Any]) -> None:
        if self.hidden_act != "poly_norm":
            raise ValueError(f"hidden_act={self.hidden_act!r} is not built: Motif-2 has only 'poly_norm'.")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even and at least 2: RoPE rotates its two halves.")
        if self.k_ratio != 1:
            raise ValueError(f"k_ratio={self.k_ratio} is not defined by the report: use k_ratio=1.")
        if self.attention_dropout:
            raise ValueError(
                f"attention_dropout={self.attention_dropout} has no meaning defined on a difference of two maps: "
                "use 0."
            )
        for name in ("use_bias", "attention_bias", "mlp_bias"):
            if extra.get(name):
                raise ValueError(f"{name}=True is not built: no Motif-2 projection has a bias. Use {name}=False.")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("rms_norm_eps", "attn_rms_norm_eps", "initializer_range", "lambda_std_dev"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token_id in value if isinstance(value, list) else [value]:
                if token_id is not None and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name}={token_id} lies outside the vocabulary of {self.vocab_size}: set it below, or None."
                    )

    def _check_theta(self, extra: dict[str, Any]) -> None:
        theta = extra.get("rope_theta")
        given = (self.rope_parameters or {}).get("rope_theta", theta)
        if theta is not None and theta != given:
            raise ValueError(
                f"rope_theta={theta} contradicts rope_parameters, whose rope_theta is {given}: give one of them."
            )

    def _check_rope(self) -> None:
        theta, kind = self.rope_parameters["rope_theta"], self.rope_parameters["rope_type"]
        if not theta > 0:
            raise ValueError(f"rope_theta={theta} must be positive: it is the base of RoPE's wavelengths.")
        if kind not in ("default", *ROPE_INIT_FUNCTIONS):
            raise ValueError(
                f"rope_type={kind!r} is unknown: use one of default, {', '.join(sorted(ROPE_INIT_FUNCTIONS))}."
            )
        factor = self.rope_parameters.get("partial_rotary_factor")
        if factor not in (None, 1):
            raise ValueError(
                f"partial_rotary_factor={factor} is not built: RoPE rotates whole heads, so leave it out."
            )

    def _warn_of_mistyped(self, extra: dict[str, Any]) -> None:
        fields = type(self).__dataclass_fields__
        for name in extra.keys() - fields.keys():
            alike = difflib.get_close_matches(name, fields, n=1, cutoff=LIKENESS_OF_A_MISTYPED_KEY)
            if alike:
                warnings.warn(
                    f"{name} is no field of Motif2Config and does nothing: is {alike[0]} meant?", stacklevel=4
                )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """Reads config.json; an official one comes back in our terms."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return from_official_dict(config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Builds the configuration from a config.json's content, ours or official; keywords replace what it says."""
        config_dict = from_official_dict(config_dict)
        # transformers would set them on the finished configuration, unchecked, and nothing would follow from them.
        own = Motif2Config.__annotations__.keys() & cls.__dataclass_fields__.keys() & kwargs.keys()
        if own:
            config_dict = {name: value for name, value in config_dict.items() if name != "layer_types"}
            config_dict |= {name: kwargs.pop(name) for name in own}
        return super().from_dict(config_dict, **kwargs)

    def to_official_dict(self) -> dict[str, Any]:
        """Returns this configuration as the config.json of an official checkpoint, without remote code.

        Raises:
            ValueError: if this is a configuration for engines, which the official layout cannot tell.
        """
        if self.single_attention_call:
            raise ValueError("single_attention_call=True has no official layout: use the model it was made from.")
        official = self.to_diff_dict()
        for name in ("auto_map", "lambda_std_dev", "layer_types", "rope_parameters", "single_attention_call"):
            official.pop(name, None)
        if self.num_noise_heads is None:
            official.pop("num_noise_heads")
        scaling = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
        official.update(
            model_type="Motif",
            architectures=[name.replace("Motif2", "Motif", 1) for name in self.architectures or ["Motif2ForCausalLM"]],
            rope_theta=self.rope_parameters["rope_theta"],
            rope_scaling=None if scaling.get("rope_type", "default") == "default" else scaling,
            use_bias=False,
        )
        return official


class OfficialMotifConfig(Motif2Config):
    """Lets `AutoConfig` read an official config.json (`model_type` "Motif"); what comes out is a `Motif2Config`."""

    model_type = "Motif"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        return Motif2Config.from_dict(config_dict, **kwargs)


class OfficialMotifLowerCaseConfig(OfficialMotifConfig):
    """Same for the spelling "motif", seen in ports of the official checkpoints."""

    model_type = "motif"


__all__ = ["Motif2Config"]
