"""A miniature corpus, tokenizer and run for the trainer's tests."""

import pytest

from tests.trainer.data.conftest import make_documents, make_tokenizer
from trainer.config import PretrainConfig
from trainer.data.shards import build_shards
from trainer.loop import run_pretraining

MINIATURE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 4,
    "num_noise_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sequence_length": 32,
    "batch_tokens": 128,
    "total_tokens": 128 * 8,
    "warmup_tokens": 128 * 2,
    "decay_tokens": 128 * 3,
    "learning_rate": 2e-2,
    "adamw_learning_rate": 5e-3,
    "mixed_precision": "no",
    "polynorm": "torch",
    "checkpoint_steps": 4,
    "eval_steps": 4,
    "eval_tokens": 256,
    "progress": False,
    "trackers": [],
}


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """Folder with `tokenizer/` and `shards/` of the domains a and b."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    domains = {"a": make_documents(300), "b": make_documents(200, shift=3)}
    build_shards(folder / "shards", domains, tokenizer, heldout_fraction=0.1, shard_tokens=3000, progress=False)
    return folder


def miniature(corpus_folder, output_dir, **settings) -> PretrainConfig:
    """A miniature run's settings."""
    defaults = {
        "output_dir": str(output_dir),
        "tokenizer": str(corpus_folder / "tokenizer"),
        "data_dir": str(corpus_folder / "shards"),
        "domains": {"a": {"start": 0.75, "end": 0.25}, "b": {"start": 0.25, "end": 0.75}},
    }
    return PretrainConfig(**{**MINIATURE, **defaults, **settings})


@pytest.fixture
def make_config(corpus_folder, tmp_path):
    """A function that gives a miniature `PretrainConfig`, with any setting replaced."""

    def make(output_dir=tmp_path / "run", **settings) -> PretrainConfig:
        return miniature(corpus_folder, output_dir, **settings)

    return make


@pytest.fixture(scope="session")
def trained_run(corpus_folder, tmp_path_factory):
    """Folder of a finished run of 8 steps, with checkpoints at 4 and 8; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_pretraining(miniature(corpus_folder, folder, eval_steps=0))
    return folder
