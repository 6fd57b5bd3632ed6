import pytest


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"tokenizer": None}, "tokenizer is not set"),
        ({"total_tokens": 0}, "total_tokens is not set"),
        ({"domains": {"a": {"start": 1.0}}}, "'a' needs start and end"),
        ({"domains": {"a": {"start": 1.0, "end": 1.0, "weight": 2}}}, "weight"),
        ({"domains": {"a": {"start": 0.5, "end": 1.0}}}, "add up to 0.5"),
        ({"domains": {"a": {"start": 1, "end": 1, "sources": [{"file": "x"}]}}}, "needs `path`"),
        ({"domains": "[1]"}, "must be a mapping"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0"),
        ({"annealing_tokens": 10**9}, "annealing_tokens"),
        ({"sequence_length": 256, "batch_tokens": 512}, "max_position_embeddings"),
        ({"micro_batch_tokens": 16}, "less than one row"),
        ({"batch_tokens_end": 256}, "belong together"),
        ({"warmup_tokens": 10**6}, "shorten"),
        ({"batch_tokens": 16}, "raise batch_tokens"),
        ({"fp8": "rowwise", "compile_layers": True}, "set fp8 rowwise_with_gw_hp, or compile_layers false"),
        ({"muon_chunk_size": 0}, "muon_chunk_size is 0"),
        ({"muon_copy_engines": True, "optimizer": "adamw"}, "muon_copy_engines is set, and optimizer adamw moves no"),
        ({"eval_steps": -1}, "eval_steps is -1"),
        ({"reasoning_domains": ["c"]}, "not among the domains"),
        ({"dry_run_gpus": 0}, "dry_run_gpus is 0: use a value above 0"),
        ({"dry_run_mfu": 0.0}, "dry_run_mfu is 0.0"),
        ({"dry_run_mfu": 47.0}, "dry_run_mfu is 47.0"),
        ({"dry_run_shards": 16}, "dry_run_shards is 16 of dry_run_gpus 8"),
        ({"dry_run": True, "tensor_parallel": 2}, "reckon with dry_run_gpus 2"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0: use a value above 0, or null"),
        ({"qk_clip_threshold": -1.0}, "qk_clip_threshold is -1.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0: use 0 or more"),
        ({"momentum": 2.0}, "momentum is 2.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: use a finite number"),
        ({"adamw_learning_rate": float("inf")}, "adamw_learning_rate is inf"),
        ({"eval_tokens": -5}, "eval_tokens is -5"),
        ({"batch_tokens_end": 0, "batch_ramp_tokens": 10}, "batch_tokens_end is 0"),
        ({"batch_tokens_end": 16, "batch_ramp_tokens": 10}, "a batch of 16 tokens"),
        ({"seed": -1}, "seed is -1: use one from 0"),
        ({"average_checkpoints": 1}, "average_checkpoints is 1"),
        ({"keep_every_steps": 6}, "keep_every_steps is 6, .* a multiple of checkpoint_steps 4"),
        ({"sequence_length_stages": {"abc": 64}}, "sequence_length_stages is {'abc': 64}"),
        ({"sequence_length_stages": {0: 64}}, "sequence_length_stages is {0: 64}: write stages after 0"),
        ({"sequence_length_stages": {-5: 64}}, "sequence_length_stages is {-5: 64}"),
        ({"sequence_length_stages": {512: 64.5}}, "sequence_length_stages is {512: 64.5}: write whole numbers"),
        ({"domains": {"a": 1}}, "'a' needs start and end.* and is 1"),
        ({"domains": {"../a": {"start": 1, "end": 1}}}, "'../a' is no name for a folder"),
        ({"domains": {"..": {"start": 1, "end": 1}}}, "'..' is no name for a folder"),
        ({"domains": {"a": {"start": "x", "end": 1}}}, "start of domain 'a' is 'x'"),
        ({"domains": {"a": {"start": 1, "end": float("nan")}}}, "end of domain 'a' is nan"),
        ({"domains": {"a": {"start": 1, "end": 1, "anneal": 1}}}, "annealing_tokens is 0: set it"),
        ({"domains": {"a": {"start": 1, "end": 1, "sources": "file.jsonl"}}}, "'file.jsonl': write a list"),
        ({"domains": {"a": {"start": 1, "end": 1, "sources": {"path": "x"}}}}, "write a list"),
        ({"domains": {"a": {"start": 1, "end": 1, "sources": None}}}, "sources of domain 'a' are None"),
        ({"domains": {"a": {"start": 1, "end": 1, "sources": [3]}}}, "source 3 is neither"),
        (
            {"domains": {"a": {"start": 1, "end": 1, "sources": [{"path": "x", "max_documents": "many"}]}}},
            "max_documents of source 'x' is 'many'",
        ),
    ],
)
def test_wrong_settings_are_named(make_config, settings, named):
    with pytest.raises(ValueError, match=named):
        make_config(**settings)


def test_mappings_may_be_written_on_the_command_line(make_config):
    for stages in ("{500: 64}", '{"500": 64}'):  # YAML, JSON
        config = make_config(domains='{"a": {"start": 1, "end": 1}}', sequence_length_stages=stages)
        assert config.domains == {"a": {"start": 1, "end": 1}}
        assert config.batch_plan().shape(500) == (64, 2)


def test_settings_survive_a_recipe(make_config):
    config = make_config(sequence_length_stages={512: 64})
    assert type(config)(**config.to_dict()) == config
