"""Arithmetic of a Motif-2 model: parameters, FLOPs and memory, counted from its configuration.

Legend: C hidden size, I intermediate size, H query heads, G groups, D head dimension, V vocabulary, L layers.
"""

from modeling_motif2 import Motif2Config

BYTES_FLOAT32, BYTES_BFLOAT16 = 4, 2


def count_parameters(config: Motif2Config) -> dict[str, int]:
    """Parameters of a model: `matrices` (MuonClip's), `embeddings`, `head` (0 when tied), `vectors` and `total`."""
    hidden, dim, heads, groups = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_groups
    signal = heads - groups
    attention = hidden * dim * (heads + 2 * config.num_key_value_heads) + 2 * signal * dim * hidden
    layer_vectors = 2 * hidden + 4 * dim + 2 * dim + 4  # two norms, four lambdas, subln, PolyNorm
    counts = {
        "matrices": config.num_hidden_layers * (attention + 3 * hidden * config.intermediate_size),
        "embeddings": config.vocab_size * hidden,
        "head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
        "vectors": config.num_hidden_layers * layer_vectors + hidden,
    }
    return counts | {"total": sum(counts.values())}


def training_flops(config: Motif2Config, tokens: int, attention_pairs: int) -> int:
    """FLOPs of one forward and backward pass, recomputation not counted.

    Every matrix costs 6 FLOPs a weight and token (the head as well, the embedding nothing). A pair of a query and a
    visible key costs, a query head, 2 D for its logit and 2 (2 D) for its 2D-wide value, three times with backward:
    18 D, where standard attention pays 12 D.

    Args:
        config: of the model.
        tokens: positions that went through the matrices.
        attention_pairs: visible (query, key) pairs, summed over the packed documents.
    """
    matrices = count_parameters(config)["matrices"] + config.vocab_size * config.hidden_size
    attention = 18 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    return 6 * matrices * tokens + attention * attention_pairs


def flops_per_token(config: Motif2Config, sequence_length: int) -> float:
    """Training FLOPs a token when every row is one document of `sequence_length` tokens."""
    pairs = sequence_length * (sequence_length + 1) // 2
    return training_flops(config, sequence_length, pairs) / sequence_length


def memory_by_rank(
    config: Motif2Config, micro_batch_tokens: int, num_ranks: int, checkpointing: bool, autocast: bool
) -> dict[str, float]:
    """Rough bytes on one of `num_ranks` ranks that shard everything (FSDP2).

    Weights, gradients, momentum in float32, AdamW's second moment for what is not a matrix. Activations (assumption):
    34 values of C and 8 of I a token and layer without recomputation, the layer's input alone with it, and the logits
    in float32 with their gradient.
    """
    counts = count_parameters(config)
    value = BYTES_BFLOAT16 if autocast else BYTES_FLOAT32
    states = counts["total"] + counts["total"] - counts["matrices"]
    per_layer = config.hidden_size if checkpointing else 34 * config.hidden_size + 8 * config.intermediate_size
    return {
        "weights": counts["total"] * BYTES_FLOAT32 / num_ranks,
        "gradients": counts["total"] * BYTES_FLOAT32 / num_ranks,
        "optimizer": states * BYTES_FLOAT32 / num_ranks,
        "activations": per_layer * config.num_hidden_layers * micro_batch_tokens * value
        + 2 * config.vocab_size * micro_batch_tokens * BYTES_FLOAT32,
    }
