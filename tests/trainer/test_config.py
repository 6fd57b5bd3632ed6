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
        ({"eval_steps": -1}, "eval_steps is -1"),
        ({"reasoning_domains": ["c"]}, "not among the domains"),
    ],
)
def test_wrong_settings_are_named(make_config, settings, named):
    with pytest.raises(ValueError, match=named):
        make_config(**settings)


def test_mappings_may_be_written_on_the_command_line(make_config):
    config = make_config(domains='{"a": {"start": 1, "end": 1}}', sequence_length_stages="{500: 64}")
    assert config.domains == {"a": {"start": 1, "end": 1}}
    assert config.batch_plan().shape(500) == (64, 2)


def test_settings_survive_a_recipe(make_config):
    config = make_config(sequence_length_stages={512: 64})
    assert type(config)(**config.to_dict()) == config
