import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from trainer.flops import count_parameters, flops_per_token, memory_by_rank, training_flops


def small(**settings):
    values = {
        "vocab_size": 100,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 10,
        "num_key_value_heads": 4,
        "num_noise_heads": 2,
        "head_dim": 8,
    }
    return Motif2Config(**{**values, **settings})


@pytest.mark.parametrize(
    "settings",
    [{}, {"tie_word_embeddings": True}, {"num_noise_heads": None, "num_attention_heads": 4, "num_key_value_heads": 4}],
)
def test_parameters_are_those_of_the_model(settings):
    config = small(**settings)
    model = Motif2ForCausalLM(config)
    counts = count_parameters(config)
    assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    assert counts["matrices"] == sum(parameter.numel() for parameter in matrices)


def test_published_sizes():
    assert count_parameters(Motif2Config())["total"] == 12_703_860_896


def test_flops_of_the_matrices_are_counted_by_torch():
    config = small()
    model = Motif2ForCausalLM(config)
    ids = torch.randint(0, 100, (2, 16))
    with FlopCounterMode(display=False) as counter:
        model.set_attn_implementation("eager")
        model(ids, use_cache=False).logits.sum().backward()
    by_operator = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    assert by_operator["aten.mm"] == training_flops(config, 2 * 16, attention_pairs=0)
    # eager attention computes all T * T pairs, in products of D and of 2D columns for each query head
    assert by_operator["aten.bmm"] == training_flops(config, 0, attention_pairs=2 * 16 * 16)


def test_flops_per_token_grow_with_the_row():
    config = small()
    difference = flops_per_token(config, 1025) - flops_per_token(config, 1)
    assert difference == pytest.approx(18 * 10 * 8 * 3 * 512)


def test_memory_is_shared_by_ranks_but_for_activations():
    one, four = (memory_by_rank(small(), 64, ranks, False, True) for ranks in (1, 4))
    assert one["weights"] == 4 * four["weights"]
    assert one["activations"] == four["activations"]
    assert memory_by_rank(small(), 64, 1, True, True)["activations"] < one["activations"]
