import csv
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.train_step_cases import LARGE
from kernels_hub import use_polynorm
from modeling_motif2 import Motif2Config, Motif2ForCausalLM
from tests.trainer.storages import Storages
from trainer.execution import recompute_layers
from trainer.flops import (
    count_parameters,
    flops_per_token,
    layer_values,
    memory_by_rank,
    run_flops,
    training_flops,
)

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


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


def test_a_run_counts_each_stage_of_row_lengths():
    config = small()
    expected = 600 * flops_per_token(config, 8) + 400 * flops_per_token(config, 64)
    assert run_flops(config, 1000, {0: 8, 600: 64}) == pytest.approx(expected)
    assert run_flops(config, 1000, {0: 8, 5000: 64}) == pytest.approx(1000 * flops_per_token(config, 8))


def test_memory_is_shared_by_ranks_but_for_activations():
    one, four = (memory_by_rank(small(), 64, ranks, autocast=False, accumulates=True) for ranks in (1, 4))
    for name in ("weights", "gradients", "optimizer"):
        assert one[name] == 4 * four[name]
    assert one["activations"] == four["activations"] + four["gradients"]  # still empty when the values are most
    assert one["gathered"] == 0
    config = small()
    whole = count_parameters(config)["total"]
    assert memory_by_rank(config, 64, 4, accumulates=True)["gathered"] > 2 * whole
    assert memory_by_rank(config, 64, 1, muon=False)["optimizer"] == 8 * whole
    assert memory_by_rank(config, 64, 1)["optimizer"] == 4 * (2 * whole - count_parameters(config)["matrices"])
    assert one["loss"] == 2 * 4 * 64 * 100


def measured_rows(pattern):
    return [row for path in RESULTS.glob(pattern) for row in csv.DictReader(path.open())]


def test_memory_is_what_full_size_steps_took():
    """--dry_run tells with it whether a run fits."""
    rows = measured_rows("full_size_step_*.csv")
    assert len(rows) >= 5
    for row in rows:
        replicas = int(row["layout"].removeprefix("hsdp").split("x")[0]) if row["layout"].startswith("hsdp") else 1
        shards, tokens = int(row["world_size"]) // replicas, 4096 * int(row["rows_a_rank"])
        counted = memory_by_rank(Motif2Config(), tokens, shards, recompute=row["recompute"], chunked_loss=True)
        measured = max(float(peak) for peak in row["peak_gb_by_rank"].split())
        assert 0.88 < measured / (sum(counted.values()) / 1e9) < 0.99, row["row"]


def test_memory_is_what_accumulating_steps_took():
    rows = [row for row in measured_rows("train_step*.csv") if row["row"].startswith("Motif-2") and row["peak_gib"]]
    assert {row["world_size"] for row in rows} >= {"1", "2", "4"}
    for row in rows:
        tokens, ranks = 4096 * int(row["micro_rows"]), int(row["world_size"])
        assert row["recompute"] == "none"
        assert tokens * ranks < int(row["tokens_a_step"])
        counted = sum(memory_by_rank(LARGE.motif(), tokens, ranks, accumulates=True).values()) / 2**30
        low, high = (0.75, 0.98) if row["compiled"] == "True" else (1.15, 1.2)
        assert low < float(row["peak_gib"]) / counted < high, row["row"]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_of_a_layer_are_those_that_stay_alive(recompute):
    def live_bytes(num_layers):
        torch.manual_seed(0)
        proportions = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": num_layers}
        heads = {"num_attention_heads": 20, "num_key_value_heads": 8, "num_noise_heads": 4, "head_dim": 8}
        model = Motif2ForCausalLM(Motif2Config(vocab_size=100, **proportions, **heads))
        use_polynorm(model, "local")
        if recompute != "none":
            recompute_layers(model, recompute)
        ids = torch.arange(2 * 48).view(2, 48)
        with Storages() as storages:
            logits = model(ids, use_cache=False).logits
        assert logits.requires_grad
        for parameter in model.parameters():
            storages.sizes.pop(StorageWeakRef(parameter.untyped_storage()), None)
        return storages.live_bytes(), model.config

    (one, _), (three, config) = live_bytes(1), live_bytes(3)
    measured = (three - one) / 2 / 4 / (2 * 48)  # float32 values of a token
    assert layer_values(config, recompute) == pytest.approx(measured, rel=0.05)
