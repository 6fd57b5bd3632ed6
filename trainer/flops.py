"""Arithmetic of a Motif-2 model: parameters, FLOPs and memory, counted from its configuration.

Legend: C hidden size, I intermediate size, H query heads, G groups, D head dimension, V vocabulary, L layers.
"""

from modeling_motif2 import Motif2Config

BYTES_FLOAT32, BYTES_BFLOAT16 = 4, 2
# Of the values that a layer keeps, what its backward holds at once when it recomputes them: gradients and attention's
# copies besides. From the peaks of full-size steps on 4 and 8 GPUs (benchmarks/results/full_size_step_*.csv).
BACKWARD_OF_A_LAYER = 3.2


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


def run_flops(config: Motif2Config, total_tokens: int, length_stages: dict[int, int]) -> float:
    """Training FLOPs of a whole run whose rows are one document each.

    Args:
        config: of the model.
        total_tokens: of the run.
        length_stages: row length from a number of tokens on, from 0.
    """
    starts = sorted(length_stages)
    ends = [min(start, total_tokens) for start in (*starts[1:], total_tokens)]
    return sum(
        max(0, end - start) * flops_per_token(config, length_stages[start])
        for start, end in zip(starts, ends, strict=True)
    )


def layer_values(config: Motif2Config, recompute: str) -> int:
    """Values that one layer keeps of each token for the backward pass, with PolyNorm's kernel.

    Full recomputation keeps the layer's input. Selective keeps the results of products and attention besides. Without,
    there are PolyNorm's result and about 10 C more for norms, rotated heads and the difference of the two maps
    (assumption; the sum is measured in tests/trainer/test_flops.py).
    """
    hidden, dim, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    if recompute == "full":
        return hidden
    projections = dim * (heads + 2 * config.num_key_value_heads)
    kept = hidden + projections + 2 * heads * dim + 2 * config.intermediate_size + 2 * hidden
    return kept if recompute == "selective" else kept + config.intermediate_size + 10 * hidden


def memory_by_rank(
    config: Motif2Config,
    micro_batch_tokens: int,
    shards: int,
    *,
    recompute: str = "none",
    recompute_every: int = 1,
    autocast: bool = True,
    chunked_loss: bool = False,
    accumulates: bool = False,
    muon: bool = True,
) -> dict[str, float]:
    """Rough bytes on one rank; the sum is about the peak of a step.

    Measured peaks lie below it: by 2 to 12% in full-size steps under FSDP2 and HSDP (full recomputation, no
    accumulation), and without recomputation, 1.5B and accumulating, by 3 to 22% on one GPU and 22 to 23% under FSDP2.
    Not compiled, one GPU took 20% more. tests/trainer/test_flops.py compares.

    Args:
        config: of the model.
        micro_batch_tokens: tokens of one forward.
        shards: ranks that share one copy of weights, gradients and optimizer state (FSDP2; HSDP: within a replica).
        recompute: "none", "selective" or "full".
        recompute_every: only every so many-th layer recomputes.
        autocast: forward and backward in bfloat16.
        chunked_loss: no logits over the whole vocabulary.
        accumulates: several micro-batches a step; then FSDP2 holds whole gradients until the last, in the dtype that
            they are reduced in.
        muon: matrices have one momentum; otherwise AdamW's two.

    Returns:
        dict: bytes of `weights`, `gradients`, `optimizer`, `gathered` (two layers and the head, or autocast's copies),
        `activations` and `loss`. Gradients come as the layers' values go, which count only beyond them; but not where
        an earlier micro-batch left gradients on a single rank.
    """
    counts = count_parameters(config)
    value = BYTES_BFLOAT16 if autocast else BYTES_FLOAT32
    total, matrices, layers = counts["total"], counts["matrices"], config.num_hidden_layers
    states = 2 * total - (matrices if muon else 0)
    vocabulary = config.vocab_size * config.hidden_size
    if shards > 1:
        gathered = 2 * matrices // layers + vocabulary + (total if accumulates else 0)
    else:
        gathered = total if autocast else 0
    recomputed = -(-layers // recompute_every) if recompute != "none" else 0
    kept = recomputed * layer_values(config, recompute) + (layers - recomputed) * layer_values(config, "none")
    at_work = BACKWARD_OF_A_LAYER * layer_values(config, "none") if recomputed else 0
    gradients = total * BYTES_FLOAT32 / shards
    room = 0 if accumulates and shards == 1 else gradients  # for the layers' values, until gradients come
    logits = 2 * config.vocab_size * micro_batch_tokens * BYTES_FLOAT32  # and their gradient
    return {
        "weights": total * BYTES_FLOAT32 / shards,
        "gradients": gradients,
        "optimizer": states * BYTES_FLOAT32 / shards,
        "gathered": gathered * value,
        "activations": max(0, kept * micro_batch_tokens * value - room) + at_work * micro_batch_tokens * value,
        "loss": vocabulary * BYTES_FLOAT32 if chunked_loss else logits,
    }
