"""What grows: the factors, the schedule of inserted blocks, and the shapes that follow from them.

Source: arXiv 2511.07464, section 2 (growth from Motif-2.6B); LLaMA-Pro, arXiv 2401.02415 (block insertion).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .configuration_motif2 import Motif2Config


@dataclass(frozen=True)
class Block:
    """One block of the grown model: the source layer it comes from, and whether it was inserted."""

    source: int
    inserted: bool


@dataclass(frozen=True)
class Growth:
    """What grows, and by how much.

    Args:
        source: configuration of the parent.
        width: factor on the hidden and intermediate sizes.
        signal_ratio: signal heads a group of the grown model, at least the parent's; None keeps it.
        insert_after: source layers after which a copy is inserted, ascending; an index given twice inserts two copies.
        untie: give the head its own weight; growing wider does so in any case.
        noise_snr_db: signal-to-noise ratio, in decibels, of the noise that tells copies apart; None is no noise.
        seed: of the noise.

    Raises:
        ValueError: a factor, ratio or schedule cannot be grown to from this parent, or nothing would grow.
    """

    source: Motif2Config
    width: int = 1
    signal_ratio: int | None = None
    insert_after: tuple[int, ...] = ()
    untie: bool = False
    noise_snr_db: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width}: the factor on the hidden size must be 1 (unchanged) or more")
        if self.ratio < self.source_ratio:
            raise ValueError(
                f"signal_ratio={self.ratio} is below the source's {self.source_ratio} signal heads a group: heads can "
                f"be copied, not merged. From {self.source_ratio} every ratio of {self.source_ratio} or more is exact."
            )
        self._check_schedule()
        grows_columns = self.width > 1 or self.ratio > self.source_ratio
        if not (grows_columns or self.insert_after or (self.untie and self.source.tie_word_embeddings)):
            raise ValueError(
                "nothing would grow: set width above 1, a larger signal_ratio, or a schedule of insertions"
            )
        if self.noise_snr_db is not None and not grows_columns:
            raise ValueError(
                f"noise_snr_db={self.noise_snr_db} has nothing to act on: noise tells copied columns apart, so it "
                "needs a width above 1 or a larger signal_ratio"
            )
        if self.noise_snr_db is not None and not 0 <= self.noise_snr_db < math.inf:
            raise ValueError(
                f"noise_snr_db={self.noise_snr_db} must be finite and 0 or more (below, noise would drown the "
                "weights), in decibels; leave it out for no noise"
            )

    def _check_schedule(self) -> None:
        layers = self.source.num_hidden_layers
        outside = [layer for layer in self.insert_after if not 0 <= layer < layers]
        if outside:
            raise ValueError(f"insert_after={outside} does not exist: the source's layers are 0 to {layers - 1}")
        if list(self.insert_after) != sorted(self.insert_after):
            raise ValueError(f"insert_after={list(self.insert_after)} must ascend: {sorted(self.insert_after)}")

    @property
    def source_ratio(self) -> int:
        """Signal heads a group of the parent."""
        return self.source.num_signal_heads_per_group

    @property
    def ratio(self) -> int:
        """Signal heads a group of the grown model."""
        return self.source_ratio if self.signal_ratio is None else self.signal_ratio

    @property
    def unties(self) -> bool:
        """Whether a tied head gets its own weight."""
        return self.source.tie_word_embeddings and (self.untie or self.width > 1)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The grown model's blocks in order."""
        blocks = []
        for layer in range(self.source.num_hidden_layers):
            blocks.append(Block(layer, inserted=False))
            blocks.extend([Block(layer, inserted=True)] * self.insert_after.count(layer))
        return tuple(blocks)

    def position(self, layer: int) -> int:
        """Index in the grown model of a source layer (of the end of the stack for its number of layers)."""
        return layer + sum(1 for inserted in self.insert_after if inserted < layer)

    def config_changes(self) -> dict[str, Any]:
        """The keys of config.json that growth changes, with their new values; None: what follows from the others."""
        source, changes = self.source, {}
        if self.insert_after:
            changes |= {"num_hidden_layers": len(self.blocks), "layer_types": None}
            if source.use_sliding_window:
                changes["max_window_layers"] = self.position(
                    min(source.max_window_layers or 0, source.num_hidden_layers)
                )
        if self.width > 1:
            changes |= {
                "hidden_size": self.width * source.hidden_size,
                "intermediate_size": self.width * source.intermediate_size,
            }
        if self.width > 1 or self.ratio > self.source_ratio:
            # Plain pairs are written as groups of one signal head: only then does official code heed `head_dim`.
            changes |= {
                "num_attention_heads": source.num_groups * (self.ratio + 1),
                "num_noise_heads": source.num_groups,
                "head_dim": source.head_dim,
            }
        if self.unties:
            changes["tie_word_embeddings"] = False
        return changes


def schedule(num_layers: int, insert_every: int | None, insert_after: list[int] | None) -> tuple[int, ...]:
    """The layers after which a copy is inserted.

    Args:
        num_layers: layers of the source.
        insert_every: insert after every so many layers.
        insert_after: or the layers themselves, from 0.

    Raises:
        ValueError: both are given, or `insert_every` never comes to an insertion.
    """
    if insert_every is None:
        return tuple(insert_after or ())
    if insert_after:
        raise ValueError(f"insert_every={insert_every} and insert_after={insert_after} exclude each other: give one")
    if not 1 <= insert_every <= num_layers:
        raise ValueError(
            f"insert_every={insert_every} inserts nothing into {num_layers} layers: use 1 to {num_layers}"
        )
    return tuple(range(insert_every - 1, num_layers, insert_every))


def tensor_shapes(config: Motif2Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a checkpoint, in the order of the forward pass."""
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (heads * dim, hidden),
        "self_attn.k_proj.weight": (keys * dim, hidden),
        "self_attn.v_proj.weight": (keys * dim, hidden),
        **{f"self_attn.lambda_{name}": (dim,) for name in ("q1", "k1", "q2", "k2")},
        "self_attn.subln.weight": (2 * dim,),
        "self_attn.o_proj.weight": (hidden, config.num_groups * config.num_signal_heads_per_group * 2 * dim),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.act_fn.weight": (3,),
        "mlp.act_fn.bias": (1,),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes
